"""The new choice of one group of ARMOR, pair by pair, by least squares."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor


def best_group(
    target: Tensor, squares: Tensor, a: Tensor, core: Tensor, b: Tensor, row: int, first: int
) -> tuple[Tensor, float]:
    """The core with the best values in columns first .. first+3 of `row`, two of them 0, and the loss that it gives.

    Args:
        target: W [out, in]; squares: h [in]; a [out, out] and b [in, in], dense; core: S [out, in].
    """
    found: tuple[Tensor, float] | None = None
    for pair in combinations(range(first, first + 4), 2):
        tried = core.clone()
        tried[row, first : first + 4] = 0
        left = ((target - a @ tried @ b) * squares.sqrt()).flatten()
        columns = torch.stack([(torch.outer(a[:, row], b[column]) * squares.sqrt()).flatten() for column in pair], 1)
        tried[row, list(pair)] = torch.linalg.lstsq(columns, left[:, None]).solution[:, 0]
        lost = float(((target - a @ tried @ b).square() * squares).sum())
        if found is None or lost < found[1]:
            found = tried, lost
    assert found is not None
    return found
