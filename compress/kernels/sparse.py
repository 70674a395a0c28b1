"""Linears with pruned weights: the packed places of the weights that are kept, the weight they stand for, the operation.

    sparse_linear:  x @ weight.T + bias,  weight zero but for the kept places, which take the values row by row, in order

`n`, `m` say which places (`position_layout`): n of m, or 0 of 0 for any. Values are floats, or codes in words with a scale
per row and group of columns; the zero point is the middle code, so a place that is not kept has that code.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import combinations
from math import comb
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from compress.kernels import native
from compress.kernels.ops import LIBRARY, row_tiles
from compress.kernels.packing import dequantize, pack, unpack
from compress.kernels.position_layout import MAX_SETS, position_layout
from compress.kernels.rows import expanded, few, flat_input, multiplied, sparse_rows

LIBRARY.define(
    "sparse_linear(Tensor x, Tensor values, Tensor positions, Tensor? scale, Tensor? bias, int bits, int n, int m, "
    "int in_features) -> Tensor"
)


def pack_positions(mask: Tensor, n: int, m: int) -> Tensor:
    """mask bool [rows, in_features] -> words int32 [rows, words]. Of n:m, exactly n of every m are True."""
    layout, n_rows = position_layout(n, m), len(mask)
    if layout.kind == "bits":
        return pack(mask, 1)
    places = (mask.nonzero()[:, 1] % m).view(n_rows, -1, n)  # [rows, groups, n], ascending
    if layout.kind == "indices":
        return pack(places.flatten(1), layout.bits)
    # [n, m]; what is larger than the number of sets, and may be than an int64, is never a summand
    binomials = [[min(comb(p, i + 1), MAX_SETS) for p in range(m)] for i in range(n)]
    choose = torch.tensor(binomials, device=mask.device)
    ranks = sum(choose[i][places[..., i]] for i in range(n))
    assert isinstance(ranks, Tensor)
    return pack(ranks, layout.bits)


def unpack_positions(words: Tensor, n: int, m: int, in_features: int) -> Tensor:
    """The inverse of `pack_positions`: bool [rows, in_features]."""
    layout = position_layout(n, m)
    if layout.kind == "bits":
        return unpack(words, 1, in_features).bool()
    n_groups = in_features // m
    codes = unpack(words, layout.bits, n_groups * layout.per_group).long()
    if layout.kind == "ranks":
        return _sets(n, m).to(words.device)[codes.clamp_(max=comb(m, n) - 1)].flatten(1)
    first = torch.arange(n_groups, device=words.device).mul_(m).repeat_interleave(n)
    mask = torch.zeros(len(words), in_features, dtype=torch.bool, device=words.device)
    return mask.scatter_(1, codes.add_(first), True)


def wrong_positions(words: Tensor, n: int, m: int, in_features: int, kept: int) -> str | None:
    """What is impossible about packed places that should keep n of every m weights, or `kept` of all; None: nothing."""
    layout = position_layout(n, m)
    if layout.kind == "bits":
        mask = unpack_positions(words, n, m, in_features)
        if not m:
            found = int(mask.sum())
            return None if found == kept else f"{found} weights are marked as kept, and there are values for {kept}"
        wrong = mask.unflatten(1, (-1, m)).sum(-1) != n
    elif layout.kind == "ranks":
        wrong = unpack(words, layout.bits, in_features // m).int() >= comb(m, n)
    else:
        places = unpack(words, layout.bits, in_features // m * n).unflatten(1, (-1, n))
        wrong = (places.diff(dim=-1).view(torch.int8) <= 0).any(-1)
    if not wrong.any():
        return None
    row, group = wrong.nonzero()[0].tolist()
    return f"group {group} of row {row} does not say which {n} of its {m} weights are kept"


@lru_cache(maxsize=32)
def _sets(n: int, m: int) -> Tensor:
    """bool [C(m, n), m]: the sets of n places among m by their number."""
    table = torch.zeros(comb(m, n), m, dtype=torch.bool)
    for places in combinations(range(m), n):
        table[sum(comb(p, i + 1) for i, p in enumerate(places)), list(places)] = True
    return table


def kept_entries(matrix: Tensor, mask: Tensor, n: int, m: int) -> Tensor:
    """The entries of `matrix` [rows, in_features] that are kept: [rows, in_features n / m], or all in one row for 0:0."""
    kept = matrix[mask]
    return kept.view(len(matrix), -1) if m else kept


def rebuilt(
    values: Tensor, positions: Tensor, scale: Tensor | None, bits: int, n: int, m: int, in_features: int
) -> Iterator[tuple[slice, Tensor]]:
    """The weight that the tensors stand for, some rows at a time, [rows, in_features], in the dtype of values or scale."""
    flat = unpack(values[None], bits, _capacity(values, bits))[0] if scale is not None and not m else values
    before = torch.zeros(
        (), dtype=torch.long, device=positions.device
    )  # values of earlier rows; a tensor, to be traced
    for rows in row_tiles(len(positions), in_features):
        mask = unpack_positions(positions[rows], n, m, in_features)
        if not m:
            place = mask.flatten().cumsum(0) + before
            before = place[-1]
            kept = flat[(place - 1).clamp_(0, len(flat) - 1)].view(mask.shape)
        else:
            kept = values[rows] if scale is None else unpack(values[rows], bits, in_features // m * n)
            kept = torch.zeros(mask.shape, dtype=kept.dtype, device=kept.device).masked_scatter_(mask, kept)
        if scale is None:
            yield rows, kept.masked_fill_(~mask, 0)
        else:
            yield rows, dequantize(kept.masked_fill_(~mask, 2 ** (bits - 1)), scale[rows], None, bits)


def _capacity(words: Tensor, bits: int) -> int:
    return words.shape[0] * 32 // bits


def sparse_linear(
    x: Tensor,
    values: Tensor,
    positions: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    bits: int,
    n: int,
    m: int,
    in_features: int,
) -> Tensor:
    """A linear layer with pruned weights.

    Args:
        x: [..., in_features], float32, bfloat16 or float16; any strides, may be empty.
        values: float, or int32 words of codes: [out, ...] of n:m; in one row, all rows end to end, where n = m = 0.
        positions: int32 [out, words].
        scale: [out, groups] of codes; None: values are floats.
        bias: [out].
        bits: of a code; 0 for floats.

    Returns: [..., out] in the dtype of x.
    """
    return torch.ops.compress.sparse_linear(x, values, positions, scale, bias, bits, n, m, in_features)


def _reference(
    x: Tensor,
    values: Tensor,
    positions: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    bits: int,
    n: int,
    m: int,
    in_features: int,
) -> Tensor:
    flat = x.reshape(-1, in_features)
    out = x.new_empty(len(flat), len(positions))
    for rows, weight in rebuilt(values, positions, scale, bits, n, m, in_features):
        out[:, rows] = functional.linear(flat, weight.to(x.dtype), None if bias is None else bias[rows].to(x.dtype))
    return out.view(*x.shape[:-1], len(positions))


def _cpu(
    x: Tensor,
    values: Tensor,
    positions: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    bits: int,
    n: int,
    m: int,
    in_features: int,
) -> Tensor:
    """Compiled kernels for float values with a bit per weight or two places of four; else the reference."""
    arguments = (x, values, positions, scale, bias, bits, n, m, in_features)
    floats = x.dtype in native.DTYPES and (bias is None or bias.dtype in native.DTYPES) and scale is None
    library = native.library() if floats and x.numel() and len(positions) else None
    found = sparse_rows(values, positions, n, m, in_features) if library is not None else None
    if found is None:
        return _reference(*arguments)
    flat, shape = flat_input(x, in_features), (*x.shape[:-1], len(positions))
    if len(flat) > few(found, flat):
        bias = None if bias is None else bias.to(x.dtype)
        return functional.linear(flat, expanded(found, x.dtype), bias).view(shape)
    return multiplied(flat, found, bias, torch.empty(len(flat), len(positions), dtype=x.dtype)).view(shape)


def _meta(x: Tensor, values: Tensor, positions: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], positions.shape[0])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, values, positions, scale, bias, *ctx.layout = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(values, positions, scale)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of input and bias; values and places are constants."""
    values, positions, scale = ctx.saved_tensors
    bits, n, m, in_features = ctx.layout
    grad_x = None
    if ctx.needs_input_grad[0]:
        grad_x = grad.new_zeros(*grad.shape[:-1], in_features)
        for rows, weight in rebuilt(values, positions, scale, bits, n, m, in_features):
            grad_x += grad[..., rows] @ weight.to(grad.dtype)
    grad_bias = grad.reshape(-1, len(positions)).sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[4] else None
    return grad_x, None, None, None, grad_bias, None, None, None, None


LIBRARY.impl("sparse_linear", _reference, "CompositeExplicitAutograd")
LIBRARY.impl("sparse_linear", _cpu, "CPU")
LIBRARY.impl("sparse_linear", _meta, "Meta")
torch.library.register_autograd("compress::sparse_linear", _backward, setup_context=_remember, lib=LIBRARY)
