"""Principal directions of vectors whose second moment is known (not centred, as SliceGPT wants them)."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.errors import NumericsError


def principal_basis(moment: Tensor, width: int, centred: bool = False) -> tuple[Tensor, float]:
    """The `width` directions in which vectors are longest, and what of their squared length lies outside.

    Args:
        moment: Σ x xᵀ [n, n], float64.
        centred: the entries of every x sum to 0. The direction of equal entries, in which no x has a part, then comes last,
            also where other directions have none either.

    Returns: Q [n, width], orthonormal columns, longest direction first, float64; the share of Σ |x|² that Q Qᵀ x loses.
    Raises: NumericsError if `moment` is not finite.
    """
    if not torch.isfinite(moment).all():
        raise NumericsError("the second moment of hidden states is not finite; use calibration.dtype=float32")
    n = len(moment)
    total = moment.trace()
    shifted = moment - (total / n**2 + 1 / n) if centred else moment  # less a positive multiple of 1 1^T
    values, vectors = torch.linalg.eigh(shifted)  # ascending
    basis = vectors[:, n - width :].flip(1)
    if width == n or total <= 0:
        return basis, 0.0
    return basis, float((1 - values[n - width :].sum() / total).clamp(min=0))
