"""Iterative absolute value decomposition: a matrix as a sum of sign matrices times magnitudes of low rank.

    R = W;   for b = 1 .. blocks:
        M = U V^T = the best matrix of rank `rank` to |R|, by its singular value decomposition, the values split evenly
        ROUNDS times:  M = the best matrix of that rank to |R| * sign(M)
        S_b = sign(R) * sign(M), sign(0) = +1
        R = R - S_b * (U_b V_b^T)          with U_b, V_b as they are stored, in float16

so W = sum_b S_b * (U_b V_b^T) + R, and any prefix of the sum approximates W. The entries of |R| are not negative, so its
leading singular vector is positive and carries most of its energy; rounding aside, ||R||^2 falls by at least the sum of the
squared singular values that are kept. It falls by more because entries of M may be negative, and S turns them: for given M these
signs are the best, for given signs that M is, so no round makes it worse. Because the rounded factors are subtracted, each
block also mends the rounding of those before it, and the stored sum telescopes. A block that would not lower the error
(R is below what float16 can say) is zero.

Singular vectors come from subspace iteration with OVERSAMPLING more directions than asked for, ITERATIONS times there and
back. What it loses beside the full decomposition is in the flat tail of the spectrum; for matrices of independent
normal entries, where that tail is largest, the error is at most ACCURACY of itself larger.

Source: BitStack, Wang et al., 2024, arXiv:2410.23918; rounded factors and turned signs are our departures (S_b = sign(R) there).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import NumericsError
from compress.linalg.signs import pack_signs

FACTOR_DTYPE = torch.float16
OVERSAMPLING = 16  # directions beside those that are kept
ITERATIONS = 8  # products with |R| |R|^T
ROUNDS = 2  # of turning signs and fitting anew
ACCURACY = 0.002  # of the error with full decompositions: how much larger it may be


@dataclass(frozen=True)
class Block:
    """One term: signs uint8 [out, ceil(in / 8)] as `linalg.signs` packs them, left float16 [out, rank], right [in, rank].

    `energy` is ||R||_F^2 with this term subtracted too.
    """

    signs: Tensor
    left: Tensor
    right: Tensor
    energy: float


def decompose(
    weight: Tensor, rank: int, blocks: int, *, exact: bool = False, generator: torch.Generator
) -> Iterator[Block]:
    """The terms of `weight`, one by one.

    Args:
        weight: [out, in], float32; it is not changed.
        rank: of the magnitudes, from 1 to min(out, in).
        blocks: how many terms.
        exact: full singular value decompositions instead of subspace iteration.
        generator: of the directions that the iteration starts from.

    Raises: NumericsError if an entry is not finite, or a factor beyond the range of float16.
    """
    rest = weight.detach().to(torch.float32, copy=True)
    if not torch.isfinite(rest).all():
        raise NumericsError("a weight is NaN or infinite; the checkpoint is damaged: fetch it again")
    energy = squared_norm(rest)
    for _ in range(blocks):
        left, right = _rounded(magnitude_factors(rest.abs(), rank, exact=exact, generator=generator), rest)
        for _ in range(ROUNDS):
            turned = torch.where(left.float() @ right.float().T < 0, -rest.abs(), rest.abs())
            start = None if exact else right.float()
            left, right = _rounded(magnitude_factors(turned, rank, exact=exact, generator=generator, start=start), rest)
        magnitude = left.float() @ right.float().T  # [out, in]
        negative = rest < 0  # so that zeros of either sign count as positive
        signs = pack_signs(negative == (magnitude < 0))
        term = torch.where(negative, -magnitude.abs(), magnitude.abs())
        after = rest.sub_(term)
        left_over = squared_norm(after)
        if left_over >= energy and energy > 0:
            rest = after.add_(term)
            left, right = torch.zeros_like(left), torch.zeros_like(right)
        else:
            energy = left_over
        yield Block(signs, left, right, energy)


def _rounded(factors: tuple[Tensor, Tensor], rest: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of `rest` as they are stored. Raises: NumericsError if float16 cannot hold them."""
    left, right = (factor.to(FACTOR_DTYPE) for factor in factors)
    if not (torch.isfinite(left).all() and torch.isfinite(right).all()):
        raise NumericsError(
            f"weights times input scales reach {float(rest.abs().max()):.3g}, and float16 cannot hold their factors; "
            f"scale them to a mean of about 1"
        )
    return left, right


def magnitude_factors(
    magnitude: Tensor,
    rank: int,
    *,
    exact: bool = False,
    generator: torch.Generator,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """left [out, rank], right [in, rank] with left right^T the best approximation of `magnitude` [out, in], all float32.

    Corresponding columns have the same norm, the root of the singular value. `start` [in, rank]: directions that are nearly
    those, to begin with; a few products then do.
    """
    if exact:
        u, sigma, vt = torch.linalg.svd(magnitude, full_matrices=False)
        root = sigma[:rank].sqrt()
        return u[:, :rank] * root, vt[:rank].T * root
    width = min(rank + OVERSAMPLING, *magnitude.shape)
    drawn = torch.randn(magnitude.shape[1], width, generator=generator, device=generator.device).to(magnitude.device)
    if start is not None:
        drawn[:, :rank] = start
    basis = torch.linalg.qr(magnitude @ drawn).Q  # [out, width]
    for _ in range(ITERATIONS if start is None else ITERATIONS // 2):
        other = torch.linalg.qr(magnitude.T @ basis).Q  # [in, width]
        basis = torch.linalg.qr(magnitude @ other).Q
    inner = (basis.T @ magnitude).double()  # [width, in]
    values, vectors = torch.linalg.eigh(inner @ inner.T)  # rising
    kept = vectors[:, -rank:].flip(1)  # [width, rank]
    root = values[-rank:].flip(0).clamp(min=0).pow(0.25)
    floor = root.max() * math.sqrt(torch.finfo(torch.float32).eps)  # a direction that is not there has no length
    scale = torch.where(root > floor, 1 / root.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    return (basis.double() @ kept * root).float(), (inner.T @ kept * scale).float()


def squared_norm(matrix: Tensor) -> float:
    """||matrix||_F^2, summed in float64 row by row."""
    return float(matrix.square().sum(1, dtype=torch.float64).sum())
