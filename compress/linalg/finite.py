"""Whether a matrix is finite, without a temporary of its size: torch.isfinite makes two."""

from __future__ import annotations

import torch
from torch import Tensor

STRIPE = 256  # rows looked at together


def all_finite(matrix: Tensor) -> bool:
    """Whether no element of `matrix` [rows, ...] is NaN or infinite."""
    return all(bool(torch.isfinite(stripe).all()) for stripe in matrix.split(STRIPE))
