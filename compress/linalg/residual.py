"""Another basis for what flows between the linears of a decoder, written into their weights.

Row vectors, y = x W^T + b, W [out, in], R [n, n] orthogonal. In the new basis a vector x is x R.

    reader     its input is in the new basis        W <- W R                                     `rotated_inputs`
    writer     its output is                        W <- R^T W,  b <- b R                        `rotated_outputs`
    table      its rows are (embeddings)            E <- E R                                     `rotated_rows`
    values     the rows of each key/value head      W[rows] <- R^T W[rows],  b[rows] <- b[rows] R   `rotated_heads`
    output     the columns of each query head       W[:, columns] <- W[:, columns] R             `rotated_head_inputs`

One R for all heads of a layer, so that it does not matter which value head a query head reads. A linear whose input is
transformed while the model runs, x -> x H, is a reader of x H: W <- W H.

A norm between writer and reader must not see the basis. x / rms(x) does not: rms(x R) = rms(x). Its gain does, and belongs to
the readers (`folded`, `folded_bias`):

    reader(x / rms(x) * gain + shift):   W <- W diag(gain),   b <- b + W_old shift

LayerNorm is rms of x less its mean over entries. The mean is taken out where x is written (`centred`): E <- E - mean, W <- W -
mean over outputs, b likewise; LayerNorm is rms from then on. RMSNorm models must not be centred: rms(x - mean) is not rms(x).

All functions take any float dtype and answer in float64: they can be chained, and what is stored is rounded once. R may have
fewer columns than rows: outputs and inputs are cut (SliceGPT).

Sources: QuaRot, Ashkboos et al., 2024, arXiv:2404.00456; SliceGPT, Ashkboos et al., 2024, arXiv:2401.15024. The published code of
both centres RMSNorm models as well; that of QuaRot leaves out the bias of values.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from compress.linalg.exact import exact_product
from compress.linalg.rotation import Rotation


def folded(weight: Tensor, gain: Tensor) -> Tensor:
    """W diag(gain) [out, in] of a reader [out, in] behind a norm with `gain` [in]."""
    return weight.double() * gain.double()


def folded_bias(weight: Tensor, bias: Tensor | None, shift: Tensor) -> Tensor:
    """b + W shift [out] of a reader behind a norm with `shift` [in]; `weight` [out, in] without the gain in it. Each entry is
    the same, whichever others it is made with."""
    product = exact_product(weight, shift.unsqueeze(-1)).squeeze(-1)
    return product if bias is None else product + bias.double()


def centred(x: Tensor, dim: int) -> Tensor:
    """x less its mean along `dim`, the one that is written to the stream: 0 of a writer's weight or bias, 1 of a table."""
    x = x.double()
    return x - x.mean(dim, keepdim=True)


def rotated_inputs(weight: Tensor, rotation: Rotation) -> Tensor:
    """W R of a reader [out, in]. Its bias does not change."""
    return rotation.times(weight)


def rotated_rows(rows: Tensor, rotation: Rotation) -> Tensor:
    """E R of any rows of a table or a head [rows, n]: each comes out the same, whichever others it is made with."""
    return rotation.times_rows(rows)


def rotated_outputs(weight: Tensor, rotation: Rotation) -> Tensor:
    """R^T W of a writer's weight [out, in]; b R of its bias [out]."""
    if weight.ndim == 1:
        return rotation.times(weight)
    return rotation.times(weight.T).T


def rotated_heads(weight: Tensor, starts: Sequence[int], head_dim: int, rotation: Rotation) -> Tensor:
    """Values: rows `start : start + head_dim` of a weight [out, in] or bias [out] through R; the other rows as they are.

    Args:
        starts: one for each key/value head, wherever a fused linear has them.
    """
    out = weight.double().clone()
    for start in starts:
        rows = slice(start, start + head_dim)
        out[rows] = rotated_outputs(out[rows], rotation)
    return out


def rotated_head_inputs(weight: Tensor, head_dim: int, rotation: Rotation) -> Tensor:
    """The attention's output projection [out, heads * head_dim]: each head's columns through R."""
    heads = weight.unflatten(1, (-1, head_dim))  # [out, heads, head_dim]
    return rotation.times(heads).flatten(1)
