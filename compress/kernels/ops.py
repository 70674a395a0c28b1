"""The operations of compressed modules: their schemas, and a reference in torch for each.

The reference is what a faster implementation must equal, and what runs where there is none. This room knows torch, and
of ours what Hadamard matrices are.

    quantized_linear:   x @ weight.T + bias,  weight = (codes - zero_point) * scale  rounded to the dtype of `scale`,
                        then taken in the dtype of x
    hadamard_transform: x @ H or x @ H.T,  H block-diagonal, orthonormal
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from compress.kernels.cuda.ops import transformed_on_gpu
from compress.kernels.packing import dequantize, unpack, unpack_entries
from compress.kernels.transform import transformed_on_cpu
from compress.linalg import hadamard

TILE = 1 << 20  # weights dequantised at a time: 4 MB in float32, whatever the size of the matrix

LIBRARY = torch.library.Library("compress", "DEF")
LIBRARY.define(
    "quantized_linear(Tensor x, Tensor weight_packed, Tensor weight_scale, Tensor? weight_zero_point, Tensor? bias, "
    "int bits, int group_size, int in_features) -> Tensor"
)
LIBRARY.define("hadamard_transform(Tensor x, int block_size, bool transposed) -> Tensor")


def quantized_linear(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> Tensor:
    """A linear layer with weights in packed integer codes.

    Args:
        x: [..., in_features], float32, bfloat16 or float16; any strides, may be empty.
        weight_packed: int32 [out, ceil(in_features * bits / 32)].
        weight_scale: [out, groups].
        weight_zero_point: int32 [ceil(out * bits / 32), groups]; None: 2^(bits-1) everywhere.
        bias: [out].
        group_size: inputs that share a scale; -1: all.

    Returns: [..., out] in the dtype of x.
    """
    return torch.ops.compress.quantized_linear(
        x, weight_packed, weight_scale, weight_zero_point, bias, bits, group_size, in_features
    )


def _reference(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> Tensor:
    n_out = weight_packed.shape[0]
    flat = x.reshape(-1, in_features)
    out = x.new_empty(flat.shape[0], n_out)
    for rows in row_tiles(n_out, in_features):
        weight = dequantize_rows(weight_packed, weight_scale, weight_zero_point, bits, in_features, rows).to(x.dtype)
        out[:, rows] = functional.linear(flat, weight, None if bias is None else bias[rows].to(x.dtype))
    return out.view(*x.shape[:-1], n_out)


def row_tiles(n_out: int, in_features: int) -> list[slice]:
    """Slices of whole rows of about TILE weights."""
    step = max(1, TILE // in_features)
    return [slice(start, min(start + step, n_out)) for start in range(0, n_out, step)]


def dequantize_rows(
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bits: int,
    in_features: int,
    rows: slice,
) -> Tensor:
    """Rows of the weight that the tensors stand for, [rows, in_features], in the dtype of `weight_scale`."""
    codes = unpack(weight_packed[rows], bits, in_features)
    zero_point = None
    if weight_zero_point is not None:
        index = torch.arange(rows.start, rows.stop, device=weight_packed.device)
        zero_point = unpack_entries(weight_zero_point, bits, index)
    return dequantize(codes, weight_scale[rows], zero_point, bits)


def _meta(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight_packed.shape[0])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight_packed, weight_scale, weight_zero_point, bias, ctx.bits, _, ctx.in_features = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(weight_packed, weight_scale, weight_zero_point)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of input and bias; the codes are constants."""
    weight_packed, weight_scale, weight_zero_point = ctx.saved_tensors
    n_out = weight_packed.shape[0]
    grad_x = None
    if ctx.needs_input_grad[0]:
        grad_x = grad.new_zeros(*grad.shape[:-1], ctx.in_features)
        for rows in row_tiles(n_out, ctx.in_features):
            weight = dequantize_rows(weight_packed, weight_scale, weight_zero_point, ctx.bits, ctx.in_features, rows)
            grad_x += grad[..., rows] @ weight.to(grad.dtype)
    grad_bias = grad.reshape(-1, n_out).sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[4] else None
    return grad_x, None, None, None, grad_bias, None, None, None


LIBRARY.impl("quantized_linear", _reference, "CompositeExplicitAutograd")
LIBRARY.impl("quantized_linear", _meta, "Meta")
torch.library.register_autograd("compress::quantized_linear", _backward, setup_context=_remember, lib=LIBRARY)


def hadamard_transform(x: Tensor, block_size: int, transposed: bool = False) -> Tensor:
    """The Hadamard transform of activations, along the last axis: x @ H, or x @ H.T.

    Args:
        x: [..., n], any float dtype; computed in float64 if x is, else in float32; any strides, may be empty.
        block_size: of the diagonal blocks of H; divides n, and has a matrix (`compress.linalg.hadamard_orders.factors`).

    Returns: [..., n] in the dtype of x.
    """
    return torch.ops.compress.hadamard_transform(x, block_size, transposed)


def _transform_meta(x: Tensor, block_size: int, transposed: bool) -> Tensor:
    return x.new_empty(x.shape)


def _transform_remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.block_size, ctx.transposed = inputs


def _transform_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return hadamard_transform(grad, ctx.block_size, not ctx.transposed), None, None


LIBRARY.impl("hadamard_transform", hadamard.transformed, "CompositeExplicitAutograd")
LIBRARY.impl("hadamard_transform", transformed_on_cpu, "CPU")
LIBRARY.impl("hadamard_transform", transformed_on_gpu, "CUDA")
LIBRARY.impl("hadamard_transform", _transform_meta, "Meta")
torch.library.register_autograd(
    "compress::hadamard_transform", _transform_backward, setup_context=_transform_remember, lib=LIBRARY
)
