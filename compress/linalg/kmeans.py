"""Weighted k-means on a line: for each row, the k values that lie closest to its numbers.

    minimise  sum_i h_i min_c (x_i - t_c)^2

On a line clusters are intervals of the sorted numbers, so the best ones follow by dynamic programming, without a start and
without chance: with D_c(i) the least cost of the first i numbers in c clusters,

    D_c(i) = min_j D_{c-1}(j) + cost(j, i),   cost(j, i) = S2 - S1^2 / S0   of numbers j .. i-1, from prefix sums

Exact for rows of up to RUNS numbers. Longer rows are first cut into RUNS runs of neighbours, dense where clusters will be
dense: the best quantizer of a density p has clusters in proportion to p^(1/3) (Panter and Dite, 1951). Its clusters of runs
are then moved by Lloyd's iterations, which never raise the cost, until they stand still or for LLOYD rounds.
"""

from __future__ import annotations

import torch
from torch import Tensor

RUNS = 256
LLOYD = 50  # rounds; SqueezeLLM's number
ENTRIES = 1 << 18  # of costs at a time: they stay in a core's cache


def weighted_kmeans(values: Tensor, weights: Tensor, k: int) -> Tensor:
    """The k centres of each row.

    Args:
        values: [rows, n], finite.
        weights: h [rows, n] or [n], not negative; numbers of weight 0 do not count. A row without any other: all count alike.
        k: centres per row, at least 2.

    Returns: [rows, k], float64, ascending. A row with fewer distinct numbers has some of them more than once.
    """
    chunk = max(1, ENTRIES // min(values.shape[1], RUNS) ** 2)
    parts = []
    for start in range(0, len(values), chunk):
        rows = slice(start, start + chunk)
        own = weights.expand_as(values) if weights.dim() == 1 else weights
        parts.append(_centres(values[rows].double(), own[rows].double(), k))
    return torch.cat(parts)


def nearest(values: Tensor, centres: Tensor) -> Tensor:
    """The index of the centre closest to each number: [rows, n] and ascending [rows, k] -> int64 [rows, n]."""
    middles = (centres[:, 1:] + centres[:, :-1]) / 2
    return torch.searchsorted(middles.contiguous(), values.contiguous())


def cost(values: Tensor, weights: Tensor, centres: Tensor) -> Tensor:
    """What `weighted_kmeans` minimises, of each row."""
    return (weights * (values - centres.gather(1, nearest(values, centres))).square()).sum(1)


def _centres(values: Tensor, weights: Tensor, k: int) -> Tensor:
    values, order = values.sort(dim=1, stable=True)
    weights = weights.gather(1, order)
    total = weights.sum(1, keepdim=True)
    weights = torch.where(total > 0, weights / total.clamp(min=torch.finfo(torch.float64).tiny), 1 / values.shape[1])
    values_in, runs = values, values.shape[1] > RUNS
    sums = torch.stack([weights, weights * values, weights * values.square()])  # [3, rows, n]
    if runs:
        label = _runs(values, weights)
        sums = sums.new_zeros(3, len(values), RUNS).scatter_add_(2, label.expand_as(sums), sums)
    bounds = _best_bounds(sums, k)  # [rows, k - 1], first run of clusters 1 ..
    position = torch.arange(sums.shape[2], device=values.device).expand(len(values), -1).contiguous()
    cluster = torch.searchsorted(bounds, position, right=True)  # [rows, runs]
    if runs:
        cluster = cluster.gather(1, label)
    centres = _means(values_in, weights, cluster, torch.zeros_like(values[:, :k]), k)
    for _ in range(LLOYD if runs else 0):
        moved = _means(values_in, weights, nearest(values_in, centres), centres, k)
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres


def _runs(values: Tensor, weights: Tensor) -> Tensor:
    """Which of RUNS runs each of the sorted numbers is in, by equal steps of the integral of p^(1/3)."""
    gap = torch.nn.functional.pad(values.diff(dim=1), (1, 0))
    share = (weights.pow(1 / 3) * gap.pow(2 / 3)).cumsum(1)  # p = h / gap
    last = share[:, -1:].clamp(min=torch.finfo(torch.float64).tiny)
    return (share / last * RUNS).long().clamp_(max=RUNS - 1)


def _best_bounds(sums: Tensor, k: int) -> Tensor:
    """sums [3, rows, n] of weights, and of numbers and squares times these -> where clusters 1 .. k-1 begin, [rows, k - 1]."""
    s0, s1, s2 = torch.nn.functional.pad(sums.cumsum(2), (1, 0)).unsqueeze(3)  # [rows, n + 1, 1]: of the first i
    weight = (s0 - s0.mT).clamp_(min=torch.finfo(torch.float64).tiny)
    costs = (
        (s2 - s2.mT).sub_((s1 - s1.mT).square_().div_(weight)).clamp_(min=0).float()
    )  # [rows, i, j], of numbers j .. i-1
    n = sums.shape[2]
    costs.masked_fill_(torch.ones(n + 1, n + 1, dtype=torch.bool, device=sums.device).triu(1), torch.inf)
    least = [costs[:, :, 0]]  # [rows, i], for 1, 2, ... clusters
    for _ in range(k - 2):
        least.append((least[-1].unsqueeze(1) + costs).amin(2))
    at = torch.full((len(s0), 1, 1), n, device=sums.device)
    bounds = []
    for before in reversed(least[: k - 1]):
        last = costs.gather(1, at.expand(-1, 1, n + 1)).squeeze(1)  # of the last cluster, by its first number
        at = (before + last).argmin(1)[:, None, None]
        bounds.append(at[:, 0])
    return torch.cat(bounds[::-1], dim=1)


def _means(values: Tensor, weights: Tensor, cluster: Tensor, before: Tensor, k: int) -> Tensor:
    """The weighted mean of each cluster [rows, k], ascending. One of no weight stays where it was, or joins the one below."""
    shape = (len(values), k)
    weight = values.new_zeros(shape).scatter_add_(1, cluster, weights)
    total = values.new_zeros(shape).scatter_add_(1, cluster, weights * values)
    mean = torch.where(weight > 0, total / weight.clamp(min=torch.finfo(torch.float64).tiny), before)
    return mean.sort(dim=1).values
