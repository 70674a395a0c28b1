"""Orthogonal matching pursuit, K-SVD and the orthogonal dictionary, row by row and atom by atom, as their papers write them."""

from __future__ import annotations

import torch
from torch import Tensor


def omp(targets: Tensor, atoms: Tensor, n: int) -> Tensor:
    """Codes [rows, k]: `n` times the atom that correlates most, then least squares on all that were chosen."""
    codes = targets.new_zeros(len(targets), len(atoms))
    for row, target in enumerate(targets):
        chosen: list[int] = []
        rest = target
        for _ in range(n):
            correlation = (atoms @ rest).abs()
            correlation[chosen] = -1
            chosen.append(int(correlation.argmax()))
            fit = torch.linalg.lstsq(atoms[chosen].T, target[:, None]).solution[:, 0]
            rest = target - fit @ atoms[chosen]
        codes[row, chosen] = fit
    return codes


def ksvd_step(targets: Tensor, atoms: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Every atom and its coefficients once, each by a singular value decomposition of what the others leave."""
    atoms, codes = atoms.clone(), codes.clone()
    for i in range(len(atoms)):
        rows = codes[:, i] != 0
        if rows.any():
            rest = targets[rows] - codes[rows] @ atoms + codes[rows, i : i + 1] * atoms[i]
            left, sizes, right = torch.linalg.svd(rest, full_matrices=False)
            atoms[i], codes[rows, i] = right[0], left[:, 0] * sizes[0]
    return atoms, codes


def orthogonal(targets: Tensor, k: int, s: int, n_rounds: int) -> tuple[Tensor, Tensor]:
    """Atoms [k, d] and codes [rows, k]: largest coefficients and Procrustes in turn, from the first principal directions."""
    atoms = torch.linalg.svd(targets, full_matrices=False)[2][:k]

    def code() -> Tensor:
        values = targets @ atoms.T
        kept = values.abs().topk(s, dim=1).indices
        return torch.zeros_like(values).scatter(1, kept, values.gather(1, kept))

    for _ in range(n_rounds):
        left, _, right = torch.linalg.svd(code().T @ targets, full_matrices=False)
        atoms = left @ right
    return atoms, code()
