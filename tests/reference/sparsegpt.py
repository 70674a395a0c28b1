"""SparseGPT row by row and column by column, with inverses of what is left instead of a factor: slow and obvious."""

from __future__ import annotations

import torch
from torch import Tensor


def sparsegpt(weight: Tensor, hessian: Tensor, n: int, m: int) -> Tensor:
    """`weight` [rows, in] with n of every m columns kept, float64. `hessian` [in, in] is damped already.

    Optimal brain surgery in a fixed order: with columns before i settled, P = (H[i:, i:])^-1, setting w_i to q costs
    (w_i - q)^2 / P_00, and moves the others by -(w_i - q) P_0. / P_00.
    """
    work, h = weight.double().clone(), hessian.double()
    n_columns = weight.shape[1]
    cost = torch.stack([torch.linalg.inv(h[i:, i:])[0, 0] for i in range(n_columns)])
    for row in work:
        for i in range(n_columns):
            if i % m == 0:
                scores = [float(row[j] ** 2 / cost[j]) for j in range(i, i + m)]
                dropped = sorted(range(m), key=lambda j: (scores[j], -j))[: m - n]
            if i % m in dropped:
                inverse = torch.linalg.inv(h[i:, i:])
                row[i:] -= row[i].clone() * inverse[0] / inverse[0, 0]
                row[i] = 0.0
    return work
