"""CUR as it is written down: slow, and obviously that. What compress/linalg/cur.py is held to."""

from __future__ import annotations

import torch
from torch import Tensor


def deim(vectors: Tensor) -> list[int]:
    """Sorensen and Embree, algorithm 1: where is the next vector worst interpolated by the ones before?"""
    picks = [int(vectors[:, 0].abs().argmax())]
    for j in range(1, vectors.shape[1]):
        before = vectors[:, :j]
        c = torch.linalg.solve(before[picks], vectors[picks, j])
        residual = vectors[:, j] - before @ c
        residual[picks] = 0  # exactly, where rounding leaves a trace
        picks.append(int(residual.abs().argmax()))
    return picks


def pivoted_qr(matrix: Tensor, rank: int) -> list[int]:
    """Gram-Schmidt; the next column is the longest of what is left."""
    left = matrix.clone()
    picks: list[int] = []
    for _ in range(rank):
        lengths = left.norm(dim=0)
        lengths[picks] = -1
        picks.append(int(lengths.argmax()))
        q = left[:, picks[-1]] / left[:, picks[-1]].norm()
        left -= torch.outer(q, q @ left)
    return picks


def greedy(candidates: Tensor, target: Tensor, rank: int) -> list[int]:
    """Try every column of `candidates` [m, n] and take the one whose span with those taken holds most of `target` [m, k]."""
    picks: list[int] = []
    for _ in range(rank):
        held = []
        for j in range(candidates.shape[1]):
            basis = torch.linalg.qr(candidates[:, [*picks, j]]).Q
            held.append(-1.0 if j in picks else float((basis.T @ target).square().sum()))
        picks.append(max(range(len(held)), key=held.__getitem__))
    return picks


def link(weight: Tensor, rows: Tensor, columns: Tensor, root: Tensor) -> Tensor:
    """U = C^+ (W S) (R S)^+."""
    left, right = weight[:, columns], weight[rows]
    return torch.linalg.pinv(left) @ (weight @ root) @ torch.linalg.pinv(right @ root)


def loss(weight: Tensor, columns: Tensor, link: Tensor, rows: Tensor, root: Tensor) -> float:
    """|(W - C U R) S|_F^2."""
    return float(((weight - columns @ link @ rows) @ root).square().sum())
