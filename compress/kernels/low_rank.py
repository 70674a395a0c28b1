"""Products with a pair of thin matrices, alone or on top of a packed weight, as one operation.

    low_rank_linear:         x @ right.T @ left.T + bias
    packed_low_rank_linear:  x @ (W + left @ right).T + bias,   W packed as packed.py has it

What lies between the factors is kept in float32 by the compiled kernels, which run for few tokens (rows.py); more are
multiplied by torch, whose products with thin matrices are quick there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from compress.errors import RecipeError
from compress.kernels import native
from compress.kernels.cuda.ops import low_rank_linear_on_gpu
from compress.kernels.ops import LIBRARY
from compress.kernels.packed import PackedWeight
from compress.kernels.rows import FEW, dense_rows, flat_input, multiplied

LIBRARY.define("low_rank_linear(Tensor x, Tensor left, Tensor right, Tensor? bias) -> Tensor")
LIBRARY.define(
    "packed_low_rank_linear(Tensor x, Tensor buffer, Tensor left, Tensor right, Tensor? bias, int bits, int group_size, "
    "int out_features, int in_features, int zero_point, int scale_dtype, int activations) -> Tensor"
)


def low_rank_linear(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer with the weight left @ right.

    Args:
        x: [..., in_features], any float dtype; any strides, may be empty.
        left: [out_features, rank].
        right: [rank, in_features].
        bias: [out_features].

    Returns: [..., out_features] in the dtype of x.
    """
    return torch.ops.compress.low_rank_linear(x, left, right, bias)


def packed_low_rank_linear(
    x: Tensor, weight: PackedWeight, left: Tensor, right: Tensor, bias: Tensor | None = None, activations: int = 8
) -> Tensor:
    """A linear layer with a packed weight and a low-rank pair added to it; arguments as of packed_linear and low_rank_linear."""
    w = weight.layout
    return torch.ops.compress.packed_low_rank_linear(
        x, weight.buffer, left, right, bias, w.bits, w.group_size, w.out_features, w.in_features, w.zero_point,
        w.scale_dtype, activations,
    )  # fmt: skip


def _reference(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    inner = functional.linear(x, right.to(x.dtype))
    return functional.linear(inner, left.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _cpu(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    n = right.shape[1]
    _check(x, left, right)
    if not _has_kernels(x, left, right, bias) or x.numel() > FEW * n:
        return _reference(x, left, right, bias)
    out = torch.empty((*x.shape[:-1], left.shape[0]), dtype=x.dtype)
    if x.numel():
        _pair(flat_input(x, n), left, right, bias, out.view(-1, left.shape[0]), add=False)
    return out


def _pair(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, out: Tensor, add: bool) -> None:
    inner = multiplied(x, dense_rows(right), None, torch.empty(len(x), len(right)))
    multiplied(inner, dense_rows(left), bias, out, add)


def _has_kernels(*tensors: Tensor | None) -> bool:
    return all(t is None or t.dtype in native.DTYPES for t in tensors) and native.library() is not None


def _check(x: Tensor, left: Tensor, right: Tensor) -> None:
    if x.shape[-1] != right.shape[1] or left.shape[1] != right.shape[0]:
        raise RecipeError(
            f"low_rank_linear: activations {tuple(x.shape)}, right {tuple(right.shape)} and left {tuple(left.shape)} do not fit"
        )


def _packed(
    x: Tensor, buffer: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, *layout: int
) -> Tensor:  # fmt: skip
    """On any device: two operations and a sum."""
    out = torch.ops.compress.packed_linear(x, buffer, bias, *layout)
    return out + torch.ops.compress.low_rank_linear(x, left, right, None)


def _packed_cpu(x: Tensor, buffer: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, *layout: int) -> Tensor:
    _check(x, left, right)
    if left.shape[0] != layout[2]:
        raise RecipeError(f"packed_low_rank_linear: left has {left.shape[0]} rows, the packed weight {layout[2]}")
    n = right.shape[1]
    if not _has_kernels(x, left, right) or x.numel() > FEW * n:
        return _packed(x, buffer, left, right, bias, *layout)
    out = torch.ops.compress.packed_linear(x, buffer, bias, *layout)
    if x.numel():
        _pair(flat_input(x, n), left, right, None, out.view(-1, out.shape[-1]), add=True)
    return out


def _meta(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], left.shape[0])


def _packed_meta(x: Tensor, buffer: Tensor, left: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], left.shape[0])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, left, right, bias = ctx.saved_tensors
    flat, rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    inner = flat @ left.to(grad.dtype)  # [tokens, rank]
    needs = ctx.needs_input_grad
    return (
        (inner @ right.to(grad.dtype)).view(x.shape) if needs[0] else None,
        (flat.T @ (rows @ right.to(rows.dtype).T)).to(left.dtype) if needs[1] else None,
        (inner.T @ rows).to(right.dtype) if needs[2] else None,
        flat.sum(0).to(bias.dtype) if bias is not None and needs[3] else None,
    )


def _packed_remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, buffer, left, right, bias, *ctx.layout = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(buffer, left, right)


def _packed_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of input and bias; the weights are constants."""
    from compress.kernels.packed import _dense
    from compress.kernels.packed_layout import Layout

    buffer, left, right = ctx.saved_tensors
    grad_x = None
    if ctx.needs_input_grad[0]:
        weight = _dense(buffer, Layout(*ctx.layout[:-1])) + left.float() @ right.float()
        grad_x = (grad.float() @ weight).to(grad.dtype)
    grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[4] else None
    return grad_x, None, None, None, grad_bias, *(None,) * 7


for _name, _functions in (
    ("low_rank_linear", (_reference, _cpu, _meta)),
    ("packed_low_rank_linear", (_packed, _packed_cpu, _packed_meta)),
):
    for _key, _function in zip(("CompositeExplicitAutograd", "CPU", "Meta"), _functions, strict=True):
        LIBRARY.impl(_name, _function, _key)
LIBRARY.impl("packed_low_rank_linear", low_rank_linear_on_gpu, "CUDA")
torch.library.register_autograd("compress::low_rank_linear", _backward, setup_context=_remember, lib=LIBRARY)
torch.library.register_autograd(
    "compress::packed_low_rank_linear", _packed_backward, setup_context=_packed_remember, lib=LIBRARY
)
