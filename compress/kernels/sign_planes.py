"""Linears whose weight is a sum of sign matrices times magnitudes of low rank.

    sign_planes_linear:  x @ weight.T + bias,  weight = (sum_b signs_b * (left_b @ right_b.T)) * scale  per column,
                         summed in float32 block by block, then taken in the dtype of x

The blocks are given as lists of tensors, so that a longer or shorter list is another product over the same memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from compress.kernels.ops import LIBRARY, row_tiles
from compress.linalg.signs import unpack_signs

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
LIBRARY.impl("sign_planes_linear", _meta, "Meta")
torch.library.register_autograd("compress::sign_planes_linear", _backward, setup_context=_remember, lib=LIBRARY)
