"""Energies of rows in the metric of a second moment: what a layer's weights, or their errors, come to in its output."""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 1024  # columns of a tile of the second moment: large enough for GEMM speed; temporaries have as many


def row_energy(matrix: Tensor, hessian: Tensor) -> Tensor:
    """diag(M H M^T): for H = sum_t x_t x_t^T, the sum over tokens of each output squared.

    Args:
        matrix: M [rows, n].
        hessian: H [n, n], symmetric; only tiles on and above the diagonal are read.

    Returns: [rows], in the dtype of `matrix`.
    """
    total = torch.zeros(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
    starts = range(0, matrix.shape[1], TILE)
    for start in starts:
        tile = matrix[:, start : start + TILE]
        for other in starts[start // TILE :]:
            block = hessian[start : start + TILE, other : other + TILE]
            share = (tile @ block).mul_(matrix[:, other : other + TILE]).sum(1)
            total.add_(share, alpha=1 if other == start else 2)
    return total


def energy(matrix: Tensor, hessian: Tensor | None) -> float:
    """tr(M H M^T), H the identity if None; not below 0, where rounding may lead."""
    rows = matrix.double().square().sum(1) if hessian is None else row_energy(matrix, hessian.to(matrix.dtype))
    return max(float(rows.double().sum()), 0.0)


def fraction(part: float, whole: float) -> float:
    """part / whole; 0 where there is nothing to be a part of."""
    return part / whole if whole > 0 else 0.0
