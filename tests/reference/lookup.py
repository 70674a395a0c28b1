"""Tables, as they are defined: slow and obvious."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor


def best_kmeans_cost(values: Tensor, weights: Tensor, k: int) -> float:
    """The least weighted cost of k clusters of `values` [n], over all ways of cutting the sorted numbers into k intervals."""
    values, order = values.double().sort()
    weights = weights.double()[order]

    def cost(x: Tensor, h: Tensor) -> float:
        total = float(h.sum())
        return float((h * (x - (h * x).sum() / total).square()).sum()) if total else 0.0

    n = len(values)
    cuts = (((0, *inner), (*inner, n)) for inner in combinations(range(1, n), k - 1))
    return min(sum(cost(values[a:b], weights[a:b]) for a, b in zip(first, last, strict=True)) for first, last in cuts)


def descent(weight: Tensor, hessian: Tensor, codes: Tensor, value_of: list[list[Tensor]]) -> Tensor:
    """One sweep of coordinate descent, row by row and column by column: `value_of[row][column]` [2^bits] are its values."""
    codes = codes.clone()
    for row in range(len(weight)):
        values = torch.stack([value_of[row][i][int(code)] for i, code in enumerate(codes[row])])
        for i in range(weight.shape[1]):
            target = values[i] + (hessian[i] @ (weight[row] - values)) / hessian[i, i]
            best = (value_of[row][i] - target).abs().argmin()
            codes[row, i], values[i] = best, value_of[row][i][best]
    return codes
