"""The first few directions of `decompose` (low_rank.py), without the others: a fraction of the work where the rank is small.

    U_k: first k eigenvectors of G = W H W^T.    Block Krylov: K = [Q, G Q, G^2 Q, ...], Q [out, k + OVERSAMPLED] random,
    orthonormalised block by block; of the eigenvectors of K^T G K the first k, led back by K

G is not formed: G Q = W (H (W^T Q)). The energy that k directions of K hold rises from step to step and is never more than the
best; it has converged where a step adds less than TOLERANCE of what is left out. Rounding errors, whose spectra are flat, take
about 6 steps. Where it does not converge, or G says nothing about so many directions, there is no answer, and the full
decomposition is the one to make.

Source: Musco and Musco, 2015, arXiv:1504.05477.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.linalg.low_rank import GRAM_FLOOR, fixed_signs, times_moment

OVERSAMPLED = 8
MAX_STEPS = 12
USUAL_STEPS = 7
TOLERANCE = 1e-7  # of the energy left out
LEAST = 512  # the smaller side: below it a full decomposition takes less than a second
NARROW = 16  # a block is at most the smaller side over this: wider ones gain nothing
INDEPENDENT = 1e-10  # of the largest: a column of a new block that has less than this left is rounding


@dataclass(frozen=True)
class Leading:
    """`basis` U_k [out, k], float64, orthonormal; `held`: the sum of the first k eigenvalues of W H W^T; `total`: of all."""

    basis: Tensor
    held: float
    total: float


def leading(weight: Tensor, rank: int, moment: Tensor | None) -> Leading | None:
    """The best `rank` directions of the outputs; None: as said above, or where the full decomposition is as quick.

    Args:
        weight: [out, in], any float dtype.
        moment: H [in, in], its diagonal [in], or None for the identity.
    """
    if not narrow(weight.shape[0], weight.shape[1], rank):
        return None
    out_features, width = weight.shape[0], rank + OVERSAMPLED
    weight = weight.double()
    generator = torch.Generator().manual_seed(0)  # where it begins decides nothing but rounding
    first = torch.randn(out_features, width, generator=generator, dtype=torch.float64).to(weight.device)
    blocks, images = [torch.linalg.qr(first).Q], []
    held = 0.0
    total = _total(weight, moment)
    for _ in range(MAX_STEPS):
        images.append(_times_gram(weight, moment, blocks[-1]))
        basis = torch.cat(blocks, dim=1)
        inner = basis.T @ torch.cat(images, dim=1)
        values, vectors = torch.linalg.eigh((inner + inner.T) / 2)
        values, vectors = values.flip(0), vectors.flip(1)
        before, held = held, float(values[:rank].sum())
        if held - before <= TOLERANCE * (total - held):
            if values[rank - 1] <= GRAM_FLOOR * values[0]:
                return None
            return Leading(fixed_signs(torch.linalg.qr(basis @ vectors[:, :rank]).Q), held, total)
        block = images[-1]
        for _ in range(2):  # once leaves what cancellation brought in
            block = block - basis @ (basis.T @ block)
        block, rest = torch.linalg.qr(block)
        sizes = rest.diagonal().abs()
        if sizes.min() <= INDEPENDENT * sizes.max():
            return None
        blocks.append(block)
    return None


def narrow(out_features: int, in_features: int, rank: int) -> bool:
    """Whether the rank is small enough to look for no other directions."""
    smaller = min(out_features, in_features)
    return smaller >= LEAST and NARROW * (rank + OVERSAMPLED) <= smaller


def flops(out_features: int, in_features: int, rank: int) -> float:
    """Floating-point operations in float64 of `leading`."""
    step = 4.0 * out_features * in_features + 2.0 * in_features**2
    return 2.0 * out_features * in_features**2 + USUAL_STEPS * (rank + OVERSAMPLED) * step


def _times_gram(weight: Tensor, moment: Tensor | None, block: Tensor) -> Tensor:
    """W (H (W^T Q))."""
    inner = block.T @ weight  # [width, in]
    return weight @ (inner if moment is None else times_moment(inner, moment)).T


def _total(weight: Tensor, moment: Tensor | None) -> float:
    """tr(W H W^T)."""
    return float(((weight if moment is None else times_moment(weight, moment)) * weight).sum())
