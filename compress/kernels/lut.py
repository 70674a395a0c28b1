"""Linears whose weights are values of tables: the weight that codes and tables stand for, and the operation.

lut_linear:  x @ weight.T + bias,  weight = table[code] * scale  rounded to the dtype of the table, or table[row, code],
             then taken in the dtype of x

Compiled kernels read the tensors as they are stored. A row is read once for up to four tokens; for more than FEW the weight
is expanded, some rows at a time, and multiplied by torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from ctypes import Structure, byref, c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from compress.kernels import native
from compress.kernels.ops import LIBRARY, row_tiles
from compress.kernels.packing import unpack
from compress.kernels.rows import FEW, flat_input

VECTOR = 16  # columns: groups of the kernels are multiples

LIBRARY.define(
    "lut_linear(Tensor x, Tensor weight_packed, Tensor weight_table, Tensor? weight_scale, Tensor? bias, int bits, "
    "int in_features) -> Tensor"
)


def lut_linear(
    x: Tensor,
    weight_packed: Tensor,
    weight_table: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    bits: int,
    in_features: int,
) -> Tensor:
    """A linear layer with weights that are values of tables.

    Args:
        x: [..., in_features], float32, bfloat16 or float16; any strides, may be empty.
        weight_packed: int32 [out, ceil(in_features * bits / 32)].
        weight_table: [2^bits], or [out, 2^bits] without scales.
        weight_scale: [out, groups].
        bias: [out].

    Returns: [..., out] in the dtype of x.
    """
    return torch.ops.compress.lut_linear(x, weight_packed, weight_table, weight_scale, bias, bits, in_features)


def table_values(codes: Tensor, table: Tensor, scale: Tensor | None) -> Tensor:
    """Values of codes uint8 [rows, n], in the dtype of `table`.

    Args:
        table: [2^bits] where there is a scale, else [rows, 2^bits].
        scale: [rows, groups], groups of n / groups columns.
    """
    index = codes.int()
    if scale is None:
        return table.gather(1, index.long())
    return table[index].unflatten(1, (scale.shape[1], -1)).mul_(scale.unsqueeze(-1)).flatten(1)


def lut_rows(
    weight_packed: Tensor, weight_table: Tensor, weight_scale: Tensor | None, bits: int, in_features: int
) -> Iterator[tuple[slice, Tensor]]:
    """The weight that the tensors stand for, some rows at a time, [rows, in_features], in the dtype of the table."""
    for rows in row_tiles(len(weight_packed), in_features):
        codes = unpack(weight_packed[rows], bits, in_features)
        if weight_scale is None:
            yield rows, table_values(codes, weight_table[rows], None)
        else:
            yield rows, table_values(codes, weight_table, weight_scale[rows])


def _reference(
    x: Tensor,
    weight_packed: Tensor,
    weight_table: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    bits: int,
    in_features: int,
) -> Tensor:
    flat = x.reshape(-1, in_features)
    out = x.new_empty(len(flat), len(weight_packed))
    for rows, weight in lut_rows(weight_packed, weight_table, weight_scale, bits, in_features):
        out[:, rows] = functional.linear(flat, weight.to(x.dtype), None if bias is None else bias[rows].to(x.dtype))
    return out.view(*x.shape[:-1], len(weight_packed))


def _cpu(
    x: Tensor,
    weight_packed: Tensor,
    weight_table: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    bits: int,
    in_features: int,
) -> Tensor:
    """Compiled kernels where groups are whole vectors; else the reference."""
    arguments = (x, weight_packed, weight_table, weight_scale, bias, bits, in_features)
    known = {x.dtype, weight_table.dtype, x.dtype if bias is None else bias.dtype} <= native.DTYPES.keys()
    group_size = in_features if weight_scale is None else in_features // weight_scale.shape[1]
    fits = known and (group_size == in_features or group_size % VECTOR == 0)
    library = native.library() if fits and x.numel() and len(weight_packed) else None
    if library is None:
        return _reference(*arguments)
    flat, shape = flat_input(x, in_features), (*x.shape[:-1], len(weight_packed))
    out = torch.empty(len(flat), len(weight_packed), dtype=x.dtype)
    if len(flat) <= FEW:
        lut = Lut.of(weight_packed, weight_table, weight_scale, bits, in_features)
        return multiplied(flat, lut, bias, out).view(shape)
    for rows in row_tiles(len(weight_packed), in_features):
        table, scale = (weight_table[rows], None) if weight_scale is None else (weight_table, weight_scale[rows])
        weight = expanded(Lut.of(weight_packed[rows], table, scale, bits, in_features), x.dtype)
        out[:, rows] = functional.linear(flat, weight, None if bias is None else bias[rows].to(x.dtype))
    return out.view(shape)


class Lut(Structure):
    """ck_lut, and the tensors that it points to."""

    _fields_ = [
        ("bits", c_int32),
        ("dtype", c_int32),
        ("out_features", c_int64),
        ("in_features", c_int64),
        ("group_size", c_int64),
        ("codes", c_void_p),
        ("row_bytes", c_int64),
        ("table", c_void_p),
        ("scale", c_void_p),
    ]
    kept: tuple[Tensor | None, ...]

    @classmethod
    def of(cls, packed: Tensor, table: Tensor, scale: Tensor | None, bits: int, in_features: int) -> Lut:
        """Tensors as in `lut_linear`."""
        packed, table = packed.detach().contiguous(), table.detach().contiguous()
        scale = None if scale is None else scale.detach().contiguous()
        group_size = in_features if scale is None else in_features // scale.shape[1]
        made = cls(
            bits, native.DTYPES[table.dtype], len(packed), in_features, group_size, packed.data_ptr(), 4 * packed.shape[1],
            table.data_ptr(), None if scale is None else scale.data_ptr(),
        )  # fmt: skip
        made.kept = (packed, table, scale)
        return made


def multiplied(x: Tensor, lut: Lut, bias: Tensor | None, out: Tensor) -> Tensor:
    """out = x W^T + bias. x [tokens, in] with dense rows, out [tokens, out], of any dtypes with kernels."""
    library = native.library()
    assert library is not None
    bias = None if bias is None else bias.detach().contiguous()
    workspace = torch.empty(max(library.ck_lut_workspace(lut.in_features, len(x)), 0), dtype=torch.uint8)
    status = library.ck_lut_linear(
        byref(lut), x.data_ptr(), native.DTYPES[x.dtype], len(x), x.stride(0), None if bias is None else bias.data_ptr(),
        0 if bias is None else native.DTYPES[bias.dtype], out.data_ptr(), native.DTYPES[out.dtype], out.stride(0),
        workspace.data_ptr(), workspace.numel(), torch.get_num_threads(),
    )  # fmt: skip
    native.check(status, "a product with tables")
    return out


def expanded(lut: Lut, dtype: torch.dtype) -> Tensor:
    """The weight [out, in]."""
    library = native.library()
    assert library is not None
    weight = torch.empty(lut.out_features, lut.in_features, dtype=dtype)
    status = library.ck_lut_dense(
        byref(lut), weight.data_ptr(), native.DTYPES[dtype], lut.in_features, torch.get_num_threads()
    )
    native.check(status, "expanding tables")
    return weight


def _meta(x: Tensor, weight_packed: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight_packed.shape[0])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight_packed, weight_table, weight_scale, bias, ctx.bits, ctx.in_features = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(weight_packed, weight_table, weight_scale)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of input and bias; codes and tables are constants."""
    weight_packed, weight_table, weight_scale = ctx.saved_tensors
    grad_x = None
    if ctx.needs_input_grad[0]:
        grad_x = grad.new_zeros(*grad.shape[:-1], ctx.in_features)
        for rows, weight in lut_rows(weight_packed, weight_table, weight_scale, ctx.bits, ctx.in_features):
            grad_x += grad[..., rows] @ weight.to(grad.dtype)
    grad_bias = grad.reshape(-1, len(weight_packed)).sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[4] else None
    return grad_x, None, None, None, grad_bias, None, None


LIBRARY.impl("lut_linear", _reference, "CompositeExplicitAutograd")
LIBRARY.impl("lut_linear", _cpu, "CPU")
LIBRARY.impl("lut_linear", _meta, "Meta")
torch.library.register_autograd("compress::lut_linear", _backward, setup_context=_remember, lib=LIBRARY)
