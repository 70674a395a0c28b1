"""The factor of an inverse, from a matrix that is barely positive definite.

GPTQ needs U, upper triangular, with

    (H + damping I)^-1 = U^T U

The original forms the inverse and factors it: three steps of n^3/3 to 2n^3/3 operations, three chances to fail. With J
the matrix that reverses the order of rows, and the ordinary Cholesky factor J H J = L L^T:

    H = (J L J) (J L J)^T,   J L J upper triangular,   hence   U = (J L J)^-1 = J L^-1 J

one factorisation and one triangular inverse, n^3/3 each; the inverse of H never exists.

A second moment of few tokens (tokens < n), or of repeated ones, is singular: damping makes it definite, rounding may
undo that. Ladder, from mild to coarse, always from the undamped matrix, never on top of the last attempt:

    1. damping = fraction * mean(diag H), with the fraction asked for; in float32, then float64: it mends most failures
    2. the fraction 0.01, 0.02, ... larger, while below 1; each in float32, then float64
    3. a floor of 1e-6 * max |diag H| besides, times 10 for up to 6 attempts; 1 and 2 again for each
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import NumericsError
from compress.linalg.finite import all_finite

DAMPING_STEP = 0.01  # by which the fraction grows after a failure; GPTQModel, `damp_auto_increment`
FLOOR = 1e-6  # of max |diag H|, the first floor
FLOOR_ATTEMPTS = 6
STRIPE = 512  # rows copied at a time
REVERSED = 1 << 20  # elements exchanged at a time
INVERSE_LEAF = 256  # triangles up to this size are inverted by one call; above, by halves, which skips the zeros


@dataclass(frozen=True)
class InverseFactor:
    """`upper` U [n, n], float32, with (H + added * I)^-1 = U^T U, and what it took.

    Attributes:
        damping: `added` as a fraction of mean(diag H); the one asked for if all went well.
        precision: dtype in which the factorisation succeeded.
        n_attempts: 1 if all went well.
    """

    upper: Tensor
    added: float
    damping: float
    precision: torch.dtype
    n_attempts: int


def inverse_factor(
    hessian: Tensor, damping: float, order: Tensor | None = None, diagonal: Tensor | None = None
) -> InverseFactor:
    """Factor the inverse of the damped `hessian` [n, n], symmetric; climbs the ladder above until it succeeds.

    Args:
        order: [n], rows and columns to take, in this order, for `upper`; None is the natural one.
        diagonal: [n], in natural order, in place of that of `hessian`.

    Allocates one matrix of the size of `hessian`, which is left as it is.
    Raises: NumericsError if `hessian` is not finite, or if the last rung fails.
    """
    diagonal = (hessian.diagonal() if diagonal is None else diagonal).double()
    if order is not None:
        diagonal = diagonal[order]
    if not all_finite(hessian):
        raise NumericsError("the second moment of the inputs holds NaN or infinity")
    mean, largest = float(diagonal.mean()), float(diagonal.abs().max())
    n_attempts = 0
    for fraction, floor in _ladder(damping, largest):
        for precision in (torch.float32, torch.float64):
            n_attempts += 1
            added = fraction * mean + floor
            matrix = _reversed(hessian, order, precision)
            matrix.diagonal().copy_(diagonal.flip(0) + added)
            lower = matrix.mT  # symmetric; column-major, so that LAPACK works in place
            _, info = torch.linalg.cholesky_ex(
                lower, out=(lower, torch.empty((), dtype=torch.int32, device=lower.device))
            )
            if int(info) != 0:
                continue
            reverse_(invert_lower_(lower).mT.view(-1))
            upper = lower.float()
            if all_finite(upper):
                return InverseFactor(upper, added, fraction + floor / mean, precision, n_attempts)
    raise NumericsError(
        f"the second moment of the inputs could not be factored in {n_attempts} attempts, up to damping {added:.3g}; "
        f"calibrate on more, and more varied, tokens"
    )


def _reversed(hessian: Tensor, order: Tensor | None, dtype: torch.dtype) -> Tensor:
    """J H J in `order`, a new matrix, made stripe by stripe so that no other copy exists."""
    n = hessian.shape[0]
    natural = torch.arange(n, device=hessian.device) if order is None else order
    columns = natural.flip(0)
    matrix = torch.empty(n, n, dtype=dtype, device=hessian.device)
    for start in range(0, n, STRIPE):
        rows = columns[start : start + STRIPE]
        matrix[start : start + STRIPE] = hessian.index_select(0, rows).index_select(1, columns)
    return matrix


def _ladder(damping: float, largest: float) -> Iterator[tuple[float, float]]:
    """(fraction of the mean diagonal, floor), from mild to coarse."""
    fractions = [damping]
    while fractions[-1] + DAMPING_STEP < 1:
        fractions.append(fractions[-1] + DAMPING_STEP)
    for floor in (0.0, *(FLOOR * 10**k * largest for k in range(FLOOR_ATTEMPTS))):
        for fraction in fractions:
            yield fraction, floor


def invert_lower_(lower: Tensor) -> Tensor:
    """Inverse of a lower triangular matrix [n, n], written over it. The upper triangle must be zero, and stays so.

    By halves: [[A, 0], [B, C]]^-1 = [[A^-1, 0], [-C^-1 B A^-1, C^-1]], n^3/3 operations, nearly all in matrix products.
    """
    n = lower.shape[0]
    if n <= INVERSE_LEAF:
        identity = torch.eye(n, dtype=lower.dtype, device=lower.device)
        return lower.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
    half = n // 2
    first, corner, last = lower[:half, :half], lower[half:, :half], lower[half:, half:]
    invert_lower_(first)
    invert_lower_(last)
    corner.copy_(-(last @ (corner @ first)))
    return lower


def reverse_(values: Tensor) -> None:
    """Reverse `values` [n] in place. Of a matrix laid out in memory that is J M J."""
    n = len(values)
    for start in range(0, n // 2, REVERSED):
        stop = min(start + REVERSED, n // 2)
        front, back = values[start:stop], values[n - stop : n - start]
        kept = front.flip(0)
        front.copy_(back.flip(0))
        back.copy_(kept)
