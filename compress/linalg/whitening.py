"""Inputs brought to one size in every direction, by a triangular factor of their second moment.

    H + a I = L^T L,  L upper triangular;      |X (W - W')^T|_F = |(W - W') L^T|_F  for a = 0

So what is fitted to W L^T in the plain norm is fitted to the outputs. `a` is damping times the mean of diag(H): a singular H
(fewer tokens than inputs, an input that is always 0) is repaired by it, and the inverse, which leads back, amplifies the less.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import NumericsError
from compress.linalg.finite import all_finite

REPAIR = 1e-6  # of the mean of diag(H), where the damping asked for does not make H definite
REPAIR_GROWTH = 10.0  # per failure
REPAIR_ATTEMPTS = 8


@dataclass(frozen=True)
class Whitening:
    """`upper` L [in, in], float64; `damping`: what was added to diag(H), as a fraction of its mean."""

    upper: Tensor
    damping: float

    def forward(self, weight: Tensor) -> Tensor:
        """W L^T [rows, in], float64, for W [rows, in]."""
        return weight.double() @ self.upper.T

    def back(self, rows: Tensor) -> Tensor:
        """The inverse of `forward`, by a triangular solve."""
        return torch.linalg.solve_triangular(self.upper, rows.double().T, upper=True).T


def whitening(moment: Tensor, damping: float) -> Whitening:
    """Factor `moment` H [in, in], symmetric, with `damping` (0: none, as long as that works).

    Raises: NumericsError if H holds NaN or infinity, or no damping makes it definite.
    """
    if not all_finite(moment):
        raise NumericsError("the second moment of the inputs holds NaN or infinity")
    hessian = moment.double()
    mean = float(hessian.diagonal().mean())
    used = damping
    for attempt in range(REPAIR_ATTEMPTS + 1):
        damped = hessian.clone()
        damped.diagonal().add_(used * mean if mean > 0 else 1.0)
        lower, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            return Whitening(lower.T, used)
        used = max(damping, REPAIR) * REPAIR_GROWTH**attempt
    raise NumericsError(
        f"the second moment of the inputs could not be factored up to damping {used:.3g}; calibrate on more, and more "
        f"varied, tokens"
    )
