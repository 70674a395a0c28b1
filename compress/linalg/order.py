"""The order in which GPTQ visits columns. Early columns are rounded as they are, later ones take up the error of all
before them, so the columns with the largest inputs should come early.

    act-order    all columns by diag(H), largest first ("desc_act")
    group-aware  columns by diag(H) within their group, then groups by their largest diag(H). Groups stay whole, so that
                 grids can also be fitted on the columns as updated so far

An order is a permutation `order[new] = old` [n], int64. Ties keep their order.
Source: act-order, the GPTQ code; group-aware, arXiv:2505.14638.
"""

from __future__ import annotations

import torch
from torch import Tensor


def act_order(diagonal: Tensor) -> Tensor:
    """Columns by `diagonal` [n] of the second moment, largest first."""
    return diagonal.argsort(descending=True, stable=True)


def group_aware_order(diagonal: Tensor, group_size: int) -> Tensor:
    """Groups by the largest entry of `diagonal` [n] within them, columns likewise within their group.

    Columns past the last full group stay in place. -1: one group, which is act-order.
    """
    if group_size == -1:
        return act_order(diagonal)
    n = diagonal.shape[0]
    n_full = n // group_size * group_size
    groups = diagonal[:n_full].unflatten(0, (-1, group_size))  # [groups, group_size]
    inside = groups.argsort(dim=1, descending=True, stable=True)
    first = torch.arange(0, n_full, group_size, device=diagonal.device)
    columns = inside + first.unsqueeze(1)  # [groups, group_size], old index
    group_order = groups.amax(1).argsort(descending=True, stable=True)
    tail = torch.arange(n_full, n, device=diagonal.device)
    return torch.cat([columns[group_order].flatten(), tail])


def group_order(diagonal: Tensor, group_size: int) -> Tensor:
    """Groups by the sum of `diagonal` [n] within them, largest first; columns of a group as they are. It divides n."""
    groups = diagonal.unflatten(0, (-1, group_size)).sum(1).argsort(descending=True, stable=True)
    return (groups.unsqueeze(1) * group_size + torch.arange(group_size, device=diagonal.device)).flatten()


def inverse_order(order: Tensor) -> Tensor:
    """The permutation that undoes `order`: inverse[order[i]] = i."""
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0], device=order.device)
    return inverse
