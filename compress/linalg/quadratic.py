"""Energies of rows in the metric of a second moment: what a layer's weights, or their errors, come to in its output."""

from __future__ import annotations

import torch
from torch import Tensor

TILE = (
    1024  # columns of the second moment at a time: large enough for GEMM speed, small enough to skip the mirrored half
)


def row_energy(matrix: Tensor, hessian: Tensor) -> Tensor:
    """diag(M H M^T): for H = sum_t x_t x_t^T, the sum over tokens of each output squared.

    Args:
        matrix: M [rows, n].
        hessian: H [n, n], symmetric; only tiles on and above the diagonal are read.

    Returns: [rows], in the dtype of `matrix`.
    """
    total = torch.zeros(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
    for start in range(0, matrix.shape[1], TILE):
        tile = matrix[:, start : start + TILE]
        stop = start + tile.shape[1]
        total += ((tile @ hessian[start:stop, start:stop]) * tile).sum(1)
        if stop < matrix.shape[1]:
            total += 2 * ((tile @ hessian[start:stop, stop:]) * matrix[:, stop:]).sum(1)
    return total
