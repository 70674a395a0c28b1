"""Linears whose weight is a sum of sign matrices times magnitudes of low rank.

    sign_planes_linear:  x @ weight.T + bias,  weight = (sum_b signs_b * (left_b @ right_b.T)) * scale  per column,
                         summed in float32 block by block, then taken in the dtype of x

The blocks are given as lists of tensors, so that a longer or shorter list is another product over the same memory.

On the CPU compiled kernels run (compress/kernels/cpu); for TABLE_TOKENS tokens or less no weight is rebuilt: what the signs of
neighbours make of the activations is looked up in tables of sums. With activations in 16 bits these are 16-bit integers where
the processor has AVX-512, rounded so that they add 1e-4 to 5e-4 of the output to its error (bfloat16 itself: 17e-4). For
more tokens rows of the weight are rebuilt, a tile at a time, and multiplied. Elsewhere, and in float64, the references run.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from compress.errors import RecipeError
from compress.kernels import native
from compress.kernels.ops import LIBRARY, row_tiles
from compress.linalg.signs import sign_bytes, unpack_signs

TABLE_TOKENS = 6  # up to so many, one after the other, cost less than rebuilding the weight (measured with AVX-512)
TABLES_FLOAT, TABLES_WORD = 0, 1  # CK_TABLES_*

LIBRARY.define(
    "sign_planes_linear(Tensor x, Tensor[] signs, Tensor[] left, Tensor[] right, Tensor? scale, Tensor? bias, "
    "int in_features) -> Tensor"
)


def sign_planes_linear(
    x: Tensor,
    signs: Sequence[Tensor],
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    scale: Tensor | None,
    bias: Tensor | None,
    in_features: int,
) -> Tensor:
    """A linear layer with weights in sign planes.

    Args:
        x: [..., in_features], float32, bfloat16 or float16; any strides, may be empty.
        signs: of each block, uint8 [out, ceil(in_features / 8)] as `linalg.signs` packs them.
        left: of each block, [out, rank]; right: [in_features, rank]; float16, ranks may differ.
        scale: [in_features], of the columns of the weight.
        bias: [out].

    Returns: [..., out] in the dtype of x.
    """
    return torch.ops.compress.sign_planes_linear(x, list(signs), list(left), list(right), scale, bias, in_features)


def rebuilt(
    signs: Sequence[Tensor], left: Sequence[Tensor], right: Sequence[Tensor], scale: Tensor | None, in_features: int
) -> Iterator[tuple[slice, Tensor]]:
    """The weight that the tensors stand for, some rows at a time, float32 [rows, in_features]."""
    inner = [factor.float().T for factor in right]
    columns = None if scale is None else scale.float()
    for rows in row_tiles(len(signs[0]), in_features):
        weight: Tensor | None = None
        for plane, outer, factor in zip(signs, left, inner, strict=True):
            term = (outer[rows].float() @ factor).mul_(unpack_signs(plane[rows], in_features))  # [rows, in]
            weight = term if weight is None else weight.add_(term)
        assert weight is not None
        yield rows, weight if columns is None else weight.mul_(columns)


def _reference(
    x: Tensor,
    signs: list[Tensor],
    left: list[Tensor],
    right: list[Tensor],
    scale: Tensor | None,
    bias: Tensor | None,
    in_features: int,
) -> Tensor:
    flat = x.reshape(-1, in_features)
    out = x.new_empty(len(flat), len(signs[0]))
    for rows, weight in rebuilt(signs, left, right, scale, in_features):
        out[:, rows] = functional.linear(flat, weight.to(x.dtype), None if bias is None else bias[rows].to(x.dtype))
    return out.view(*x.shape[:-1], len(signs[0]))


class _Workspace(threading.local):
    """Memory of one thread that products use one after the other: fresh pages for each would cost as much as the product."""

    buffer: Tensor | None = None

    def take(self, n_bytes: int) -> Tensor:
        if self.buffer is None or self.buffer.numel() < n_bytes:
            self.buffer = torch.empty(n_bytes, dtype=torch.uint8)  # torch aligns to 64 bytes
        return self.buffer


_WORKSPACE = _Workspace()


def _cpu(
    x: Tensor,
    signs: list[Tensor],
    left: list[Tensor],
    right: list[Tensor],
    scale: Tensor | None,
    bias: Tensor | None,
    in_features: int,
) -> Tensor:
    library = native.library()
    if library is None or x.dtype not in native.DTYPES:
        return _reference(x, signs, left, right, scale, bias, in_features)
    n_out = len(signs[0])
    _check(x, signs, left, right, scale, bias, in_features)
    flat = x if x.dim() == 2 and x.stride(1) == 1 else x.reshape(-1, in_features).contiguous()
    signs, left, right = ([t.contiguous() for t in parts] for parts in (signs, left, right))
    kept = scale if scale is None else scale.contiguous()
    blocks = (native.SignBlock * len(signs))()
    for block, s, u, v in zip(blocks, signs, left, right, strict=True):
        block.signs, block.left, block.right, block.rank = s.data_ptr(), u.data_ptr(), v.data_ptr(), u.shape[1]
    if len(flat) > TABLE_TOKENS:
        out = _rebuilt_product(library, flat, blocks, n_out, in_features, kept, bias)
        return out.view(*x.shape[:-1], n_out)
    out = x.new_empty(*x.shape[:-1], n_out)
    given = None if bias is None else bias.detach().to(x.dtype).contiguous()
    n_bytes = library.ck_sign_planes_workspace(n_out, in_features)
    native.check(n_bytes, "sign_planes_linear")
    workspace = _WORKSPACE.take(n_bytes)
    status = library.ck_sign_planes_linear(
        blocks, len(blocks), n_out, in_features, _address(kept), flat.data_ptr(), native.DTYPES[x.dtype], len(flat),
        flat.stride(0), _address(given), native.DTYPES[x.dtype], out.data_ptr(), n_out,
        TABLES_FLOAT if x.dtype == torch.float32 else TABLES_WORD, workspace.data_ptr(), workspace.numel(),
        torch.get_num_threads(),
    )  # fmt: skip
    native.check(status, "sign_planes_linear")
    return out


def _rebuilt_product(
    library: ctypes.CDLL,
    x: Tensor,
    blocks: ctypes.Array[native.SignBlock],
    n_out: int,
    in_features: int,
    scale: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """x [tokens, in] times the weight, whose rows are rebuilt some at a time."""
    n_threads = torch.get_num_threads()
    n_bytes = library.ck_sign_planes_rows_workspace(blocks, len(blocks), n_out, in_features)
    native.check(n_bytes, "sign_planes_linear")
    workspace = _WORKSPACE.take(n_bytes)
    status = library.ck_sign_planes_factors(
        blocks, len(blocks), n_out, in_features, workspace.data_ptr(), workspace.numel(), n_threads
    )
    native.check(status, "sign_planes_linear")
    out = x.new_empty(len(x), n_out)
    tiles = row_tiles(n_out, in_features)
    weight = x.new_empty(tiles[0].stop, in_features)
    for rows in tiles:
        n_rows = rows.stop - rows.start
        status = library.ck_sign_planes_rows(
            blocks, len(blocks), n_out, in_features, _address(scale), rows.start, n_rows, weight.data_ptr(),
            native.DTYPES[x.dtype], in_features, workspace.data_ptr(), workspace.numel(), n_threads,
        )  # fmt: skip
        native.check(status, "sign_planes_linear")
        out[:, rows] = functional.linear(x, weight[:n_rows], None if bias is None else bias[rows].to(x.dtype))
    return out


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _check(
    x: Tensor,
    signs: list[Tensor],
    left: list[Tensor],
    right: list[Tensor],
    scale: Tensor | None,
    bias: Tensor | None,
    in_features: int,
) -> None:
    """Raises: RecipeError where the tensors do not belong together: the kernels believe their sizes."""
    n_out = len(signs[0]) if signs else 0
    wrong = None
    if x.shape[-1] != in_features or not len(signs) == len(left) == len(right) > 0:
        wrong = f"activations have {x.shape[-1]} features, the weight takes {in_features}, in {len(signs)} blocks"
    for plane, outer, inner in zip(signs, left, right, strict=False):
        if plane.dtype != torch.uint8 or outer.dtype != torch.float16 or inner.dtype != torch.float16:
            wrong = f"blocks are {plane.dtype}, {outer.dtype}, {inner.dtype}, not uint8 and float16"
        elif plane.shape != (n_out, sign_bytes(in_features)) or (outer.shape, inner.shape) != (
            (n_out, outer.shape[-1]),
            (in_features, outer.shape[-1]),
        ):
            wrong = f"a block of {list(plane.shape)}, {list(outer.shape)}, {list(inner.shape)} is not of {n_out} x {in_features}"
    if scale is not None and (scale.dtype != torch.float16 or scale.shape != (in_features,)):
        wrong = f"scale is {scale.dtype} {list(scale.shape)}, not float16 [{in_features}]"
    if bias is not None and bias.shape != (n_out,):
        wrong = f"bias is {list(bias.shape)}, not [{n_out}]"
    if wrong is not None:
        raise RecipeError(f"sign_planes_linear: {wrong}")


def _meta(x: Tensor, signs: list[Tensor], *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], signs[0].shape[0])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, signs, left, right, scale, bias, ctx.in_features = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.n_blocks = len(signs)
    ctx.has_scale = scale is not None
    ctx.save_for_backward(*signs, *left, *right, *([] if scale is None else [scale]))


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Gradients of input and bias; signs, factors and scale are constants."""
    saved, n = ctx.saved_tensors, ctx.n_blocks
    signs, left, right = saved[:n], saved[n : 2 * n], saved[2 * n : 3 * n]
    grad_x = None
    if ctx.needs_input_grad[0]:
        grad_x = grad.new_zeros(*grad.shape[:-1], ctx.in_features)
        for rows, weight in rebuilt(signs, left, right, saved[-1] if ctx.has_scale else None, ctx.in_features):
            grad_x += grad[..., rows] @ weight.to(grad.dtype)
    grad_bias = grad.reshape(-1, len(signs[0])).sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[5] else None
    none = [None] * n  # torch wants the structure of the inputs
    return grad_x, none, none, none, None, grad_bias, None


LIBRARY.impl("sign_planes_linear", _reference, "CompositeExplicitAutograd")
LIBRARY.impl("sign_planes_linear", _cpu, "CPU")
LIBRARY.impl("sign_planes_linear", _meta, "Meta")
torch.library.register_autograd("compress::sign_planes_linear", _backward, setup_context=_remember, lib=LIBRARY)
