"""Gradient descent among matrices with orthonormal rows: Cayley SGD on the Stiefel manifold.

For P [p, n], P P^T = I, X = P^T, g = dL/dP and a step t:

    M  = momentum * M - g^T                                   the direction, [n, p]
    A  = A0 - A0^T,   A0 = M P - P^T (P M P) / 2              skew: t A is an infinitesimal rotation of the rows
    Y  = (I - t A / 2)^-1 (I + t A / 2) X,   P <- Y^T         orthogonal again, exactly
    M  <- A X                                                 the direction that was gone in

A without the part that moves a vector v, (I - v v^T) A (I - v v^T), leaves P v alone: for rotations that keep the mean.

t = min(lr, 1 / |A|_1): |A|_1 bounds the spectral norm, so the angle of a step stays below about 53 degrees, and the published
approximation, five times Y <- X + t A (X + Y) / 2 from Y = X + t M, converges: it avoids the solve, and leaves P orthogonal to
1e-4 or so. P must then be brought back now and then: rows to length 1 in every step, all of them by QR in a hundredth of
the steps, at random. Solved exactly in float64, the default, it needs none of that; rounding adds 1e-16 a step.

A rotation that is merged into weights has to be orthogonal to 1e-8: `projected` gives the nearest that is.

Source: Li, Li, Todorovic, 2020, arXiv:2002.01113, algorithm 1, as SpinQuant (arXiv:2405.16406) uses it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.errors import NumericsError

ITERATIONS = 5  # of the approximation; SpinQuant's code
QR_PROBABILITY = 0.01  # of making rows orthonormal before a step of the approximation; likewise
LARGEST_TURN = 1.0  # t |A|_1: 2 q with q = 0.5 in the paper's code
EPSILON = 1e-8  # against a gradient of 0
TOLERANCE = 1e-8  # |P P^T - I| of a projected matrix, largest entry


def cayley_step(
    point: Tensor,
    gradient: Tensor,
    lr: float,
    direction: Tensor | None = None,
    momentum: float = 0.0,
    fixed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step, solved exactly.

    Args:
        point: P [p, n], p <= n, orthonormal rows.
        gradient: dL/dP [p, n].
        lr: the largest step t.
        direction: M [n, p] of the step before, for `momentum`.
        fixed: a vector v [n] of length 1; P v stays what it is. If v P = v for a square P, that stays so.

    Returns: P and M after the step, float64.
    Raises: NumericsError if the gradient is not finite.
    """
    point = point.double()
    skew = _skew(point, _direction(gradient.double(), direction, momentum), fixed)
    half = skew * (_step(skew, lr) / 2)
    identity = torch.eye(len(half), dtype=half.dtype, device=half.device)
    turned = torch.linalg.solve(identity - half, (identity + half) @ point.T)
    return turned.T.contiguous(), skew @ point.T


def cayley_step_approximate(
    point: Tensor,
    gradient: Tensor,
    lr: float,
    direction: Tensor | None = None,
    momentum: float = 0.0,
    fixed: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """One step as published, in the dtype of `point`: products only.

    Args:
        as of `cayley_step`; generator: draws when rows are made orthonormal; None: never.

    Returns: P and M after the step; P is orthonormal to about 1e-4.
    """
    point = point / point.norm(dim=1, keepdim=True)
    if generator is not None and float(torch.rand((), generator=generator, device=generator.device)) < QR_PROBABILITY:
        point = _by_qr(point)
    moved = _direction(gradient.to(point), direction, momentum)
    skew = _skew(point, moved, fixed)
    step = _step(skew, lr)
    start = point.T
    turned = start + step * (moved if fixed is None else skew @ start)
    for _ in range(ITERATIONS):
        turned = start + (step / 2) * (skew @ (start + turned))
    return turned.T.contiguous(), skew @ start


def projected(point: Tensor) -> Tensor:
    """The nearest matrix [p, n] with orthonormal rows (Frobenius), float64: U V^T of the singular value decomposition.

    Raises: NumericsError if the rows do not span p dimensions, or are not finite.
    """
    if not bool(torch.isfinite(point).all()):
        raise NumericsError("a learned rotation is not finite; use a smaller learning rate")
    left, _, right = torch.linalg.svd(point.double(), full_matrices=False)
    nearest = left @ right
    if deviation(nearest) > TOLERANCE:
        raise NumericsError(
            f"a learned rotation is {deviation(nearest):.1e} away from orthogonal; use a smaller learning rate"
        )
    return nearest


def deviation(point: Tensor) -> float:
    """The largest entry of |P P^T - I|."""
    point = point.double()
    return float((point @ point.T - torch.eye(len(point), dtype=point.dtype, device=point.device)).abs().max())


def _direction(gradient: Tensor, before: Tensor | None, momentum: float) -> Tensor:
    if not bool(torch.isfinite(gradient).all()):
        raise NumericsError(
            "the gradient of a rotation is not finite; use a smaller learning rate, or compute in float32"
        )
    return -gradient.T if before is None or momentum == 0 else momentum * before.to(gradient) - gradient.T


def _skew(point: Tensor, moved: Tensor, fixed: Tensor | None) -> Tensor:
    across = moved @ point - point.T @ (point @ moved @ point) / 2
    skew = across - across.T
    if fixed is None:
        return skew
    fixed = fixed.to(skew)
    kept = torch.outer(skew @ fixed, fixed)  # A v = 0 afterwards, and the steps leave v alone
    return skew - kept + kept.T


def _step(skew: Tensor, lr: float) -> float:
    return min(lr, LARGEST_TURN / (float(torch.linalg.matrix_norm(skew, 1)) + EPSILON))


def _by_qr(point: Tensor) -> Tensor:
    q, r = torch.linalg.qr(point.T)
    return (q * torch.where(r.diagonal() < 0, -1.0, 1.0)).T
