"""What a decoder block does with one token between its products, by compiled kernels: a call each in place of a dozen operations.

For the decoding loop alone (compress/runtime/steps.py): no operations of torch, no gradients; tensors are contiguous, on the
CPU, of one dtype with kernels, and the caller owns what is written. `references` has the same formulas in torch, operation
by operation as transformers computes them; values are rounded at the same places.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional

from compress.kernels import native


def norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> Tensor:
    """out = weight * (x / sqrt(mean(x^2) + eps)), all [n]."""
    status = _library().ck_token_norm(
        x.data_ptr(), weight.data_ptr(), out.data_ptr(), native.DTYPES[x.dtype], x.numel(), eps
    )
    native.check(status, "the norm of a token")
    return out


def gated(gate_up: Tensor, out: Tensor) -> Tensor:
    """out [n] = silu(first half of gate_up) * second half; gate_up [2 n]."""
    n, first = out.numel(), gate_up.data_ptr()
    status = _library().ck_token_gated(
        first, first + n * gate_up.element_size(), out.data_ptr(), native.DTYPES[out.dtype], n
    )
    native.check(status, "the gate of a token")
    return out


def turn(qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, place: int) -> None:
    """Turn queries where they lie, and keys into the cache; copy values there.

    Args:
        qkv: [heads + 2 key heads, head_dim]: queries, keys, values of the token.
        cos, sin: [head_dim].
        keys, values: [1, key heads, capacity, head_dim] of the cache; strides of the last two axes dense.
        place: of the token in the cache.
    """
    key_heads, head = keys.shape[1], keys.shape[3]
    n_bytes = place * head * keys.element_size()
    status = _library().ck_token_turn(
        qkv.data_ptr(), cos.data_ptr(), sin.data_ptr(), native.DTYPES[qkv.dtype], qkv.shape[0] - 2 * key_heads, key_heads,
        head, keys.data_ptr() + n_bytes, values.data_ptr() + n_bytes, keys.stride(1), values.stride(1),
    )  # fmt: skip
    native.check(status, "turning a token")


def _library() -> native.ctypes.CDLL:
    library = native.library()
    assert library is not None
    return library


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def _gated(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2)
    return functional.silu(gate) * up


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


references = SimpleNamespace(norm=_norm, gated=_gated, turned=_turned)
