"""Pruning with error feedback: the loop of error_feedback.py, which also chooses what each column keeps.

With U from H_d^-1 = U^T U, for each column i in order:

    q_i = w_i where kept, else 0;   r_i = w_i - q_i;   w_j -= r_i U[i, j] / U[i, i]    for all j > i

w_oi^2 / U[i, i]^2 is what dropping weight oi adds to tr((W - Q) H_d (W - Q)^T), now that the columns before it are settled.
Those with the most of it are kept: n of every m columns when their turn comes; without n and m, so many of all rows of a
block of columns when the block's turn comes.

With grids, q_i is also rounded to them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from compress.linalg.error_feedback import LEAF, Update, cuts, propagate
from compress.linalg.grid import Grid
from compress.linalg.order import inverse_order
from compress.linalg.sparsity import highest, highest_of


@dataclass(frozen=True)
class Pruned:
    """Outcome of the loop.

    Attributes:
        weight: Q [rows, in], float32, each number one that its dtype holds.
        mask: bool [rows, in].
        loss: [rows], their shares of tr((W - Q) H_d (W - Q)^T).
        codes: uint8 [rows, in] on the grids; None without.
    """

    weight: Tensor
    mask: Tensor
    loss: Tensor
    codes: Tensor | None = None


@dataclass(frozen=True)
class Pattern:
    """What is kept: `n` of every `m` columns; or, with m = 0, `kept` weights of the matrix, chosen `block_size` columns at a
    time, from each block its share."""

    n: int
    m: int
    kept: int = 0
    block_size: int = 128

    def blocks(self) -> int:
        """Columns between updates of the whole matrix: groups stay whole."""
        return self.m * max(1, self.block_size // self.m) if self.m else self.block_size

    def leaves(self) -> int:
        """Columns updated one by one: groups stay whole."""
        return self.m * max(1, LEAF // self.m) if self.m else LEAF

    def share(self, start: int, stop: int, n_columns: int) -> int:
        """How many weights columns start .. stop-1 keep; shares add up to `kept`."""
        return self.kept * stop // n_columns - self.kept * start // n_columns


def prune_columns(
    weight: Tensor,
    upper: Tensor,
    pattern: Pattern,
    dtype: torch.dtype,
    grid: Grid | None = None,
    order: Tensor | None = None,
) -> Pruned:
    """Prune `weight` with error feedback.

    Args:
        weight: [rows, in], float32, in natural order.
        upper: U [in, in], for H with rows and columns in `order`.
        dtype: that values are stored in; what rounding to it costs is fed back too.
        grid: what kept values are rounded to, symmetric, in natural order; None: they stay floats.
        order: [in], `order[new] = old`, in which the m columns of a group stand together; None is the natural order.

    Returns: all in natural order.
    """
    n = weight.shape[1]
    columns = torch.arange(n, device=weight.device) if order is None else order
    work = weight.T.index_select(0, columns)  # [in, rows], contiguous
    loop = _Loop(
        pattern,
        Update(upper, -upper.diagonal().unsqueeze(1), work),
        upper.diagonal().square().reciprocal().unsqueeze(1),
        torch.empty_like(work, dtype=torch.bool),
        torch.empty_like(work),
        dtype,
    )
    back = torch.arange(n, device=weight.device) if order is None else inverse_order(order)
    if grid is not None:
        assert grid.zero_point is None
        loop.grid, loop.scale = grid, grid.scale.float().T.contiguous()
        loop.group_of = (columns // (n // grid.scale.shape[1])).tolist()
    for start, stop in cuts(0, n, pattern.blocks()):
        if not pattern.m:
            loop.keep[start:stop] = loop.chosen(start, stop)
        for first, last in cuts(start, stop, pattern.leaves()):
            loop.leaf(first, last)
            propagate([loop.update], first, last, stop)
        propagate([loop.update], start, stop, n)
    loss = work.div_(upper.diagonal().unsqueeze(1)).square_().sum(0)
    mask, result = loop.keep[back].T.contiguous(), loop.result[back].T.contiguous()
    if grid is None:
        return Pruned(result, mask, loss)
    codes = result.add_(2 ** (grid.bits - 1)).to(torch.uint8)
    return Pruned(grid.decode(codes), mask, loss, codes)


@dataclass
class _Loop:
    """State of the loop; matrices are [in, rows], in order. `result` holds values, or codes less the zero point."""

    pattern: Pattern
    update: Update
    cost: Tensor  # 1 / U[i, i]^2 [in, 1]
    keep: Tensor
    result: Tensor
    dtype: torch.dtype
    grid: Grid | None = None
    scale: Tensor | None = None  # [groups, rows]
    group_of: list[int] = field(default_factory=list)

    def chosen(self, start: int, stop: int) -> Tensor:
        """What columns start .. stop-1 would keep as they are now: bool [columns, rows]."""
        pattern = self.pattern
        scores = self.update.source[start:stop].square().mul_(self.cost[start:stop])
        if pattern.m:
            groups = scores.unflatten(0, (-1, pattern.m))  # [groups, m, rows]
            return torch.stack(list(highest_of(groups.unbind(1), pattern.n)), dim=1).flatten(0, 1)
        return highest(scores.T, pattern.share(start, stop, len(self.keep))).T

    def leaf(self, first: int, last: int) -> None:
        """Columns first .. last-1, one after the other; they end as residuals."""
        work, within = self.update.source[first:last], self.update.stripe(first, last, first, last)
        for i, column in enumerate(work.unbind(0)):
            position = first + i
            if self.pattern.m and position % self.pattern.m == 0:
                self.keep[position : position + self.pattern.m] = self.chosen(position, position + self.pattern.m)
            out, keep = self.result[position], self.keep[position]
            if self.grid is None or self.scale is None:
                torch.mul(column.to(self.dtype).to(column.dtype), keep, out=out)
                column.sub_(out)
            else:
                scale, middle = self.scale[self.group_of[position]], 2 ** (self.grid.bits - 1)
                torch.div(column, scale, out=out).round_().clamp_(-middle, middle - 1).mul_(keep)
                column.sub_((out * scale).to(self.grid.scale.dtype))
            if i + 1 < len(work):
                work[i + 1 :].addr_(within[i, i + 1 :], column)
