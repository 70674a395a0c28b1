"""Linears whose weights are values of tables: the weight that codes and tables stand for, and the operation.

lut_linear:  x @ weight.T + bias,  weight = table[code] * scale  rounded to the dtype of the table, or table[row, code],
             then taken in the dtype of x
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from compress.kernels.ops import LIBRARY, row_tiles
from compress.kernels.packing import unpack

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
LIBRARY.impl("lut_linear", _meta, "Meta")
torch.library.register_autograd("compress::lut_linear", _backward, setup_context=_remember, lib=LIBRARY)
