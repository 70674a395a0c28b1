"""Which weights to keep: scores of weights, and the masks that the highest ones give.

With h_i = mean over tokens of x_i^2, the diagonal of the second moment:

    magnitude  |W_oi|
    Wanda      |W_oi| sqrt(h_i)
    NoWag      Wn_oi^2 h_i,   Wn_oi = W_oi / (c_i r_o),   c_i = |W_.i| + EPSILON,   r_o = |(W / c)_o.| + EPSILON

Sources: Wanda, Sun et al., 2023, arXiv:2306.11695; NoWag, Liu et al., 2025, arXiv:2504.14569.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

EPSILON = 1e-5  # added to norms; NoWag's code
COMPARED = 8  # up to so many are compared with each other; above they are sorted


def wanda_scores(weight: Tensor, squares: Tensor) -> Tensor:
    """|W| sqrt(h) [rows, in]. `squares` [in]: h, or any multiple of it."""
    return weight.abs() * squares.to(weight).sqrt()


def nowag_scores(weight: Tensor, squares: Tensor) -> Tensor:
    """Wn^2 h [rows, in]. `squares` [in]: h, or any multiple of it."""
    normalised, _, _ = nowag_normalised(weight)
    return normalised.square_().mul_(squares.to(weight))


def nowag_normalised(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Wn [rows, in], r [rows], c [in] with W = diag(r) Wn diag(c): columns first, then rows."""
    columns = weight.norm(dim=0) + EPSILON
    normalised = weight / columns
    rows = normalised.norm(dim=1) + EPSILON
    return normalised.div_(rows.unsqueeze(1)), rows, columns


def highest_of_groups(scores: Tensor, n: int, m: int) -> Tensor:
    """The `n` highest of every `m` neighbours: bool [rows, in]; of equal ones the first. `m` divides `in`."""
    groups = scores.unflatten(1, (-1, m))  # [rows, groups, m]
    return torch.stack(list(highest_of(groups.unbind(-1), n)), dim=-1).flatten(1)


def highest_of(scores: Sequence[Tensor], n: int) -> Sequence[Tensor]:
    """For each entry, whether it is among the `n` highest of its namesakes in `scores`: bool, shapes alike."""
    if len(scores) > COMPARED:
        stacked = torch.stack(list(scores))
        order = stacked.argsort(dim=0, descending=True, stable=True)
        return torch.zeros_like(stacked, dtype=torch.bool).scatter_(0, order[:n], True).unbind(0)
    kept = []
    for i, score in enumerate(scores):  # how many are ahead of it: a fraction of the time of sorting
        ahead = torch.zeros(score.shape, dtype=torch.int8, device=score.device)
        for j, other in enumerate(scores):
            if j != i:
                ahead += other >= score if j < i else other > score
        kept.append(ahead < n)
    return kept


def highest_of_rows(scores: Tensor, n: int) -> Tensor:
    """The `n` highest of every row: bool [rows, in]; of equal ones the first."""
    if n == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    least = scores.kthvalue(scores.shape[1] - n + 1, dim=1, keepdim=True).values  # the n-th highest
    above, equal = scores > least, scores == least
    missing = n - above.sum(1, keepdim=True)
    return above.logical_or_(equal.logical_and_(equal.cumsum(1) <= missing))


def highest(scores: Tensor, n: int) -> Tensor:
    """The `n` highest of all: bool [rows, in]; of equal ones the first."""
    return highest_of_rows(scores.reshape(1, -1), n).view(scores.shape)
