"""Pruning with error feedback: the loop of error_feedback.py, which also chooses what each column keeps.

With U from H_d^-1 = U^T U, for each column i in order:

    q_i = w_i where kept, else 0;   r_i = w_i - q_i;   w_j -= r_i U[i, j] / U[i, i]    for all j > i

w_oi^2 / U[i, i]^2 is what dropping weight oi adds to tr((W - Q) H_d (W - Q)^T), now that the columns before it are settled.
Those with the most of it are kept: n of every m columns when their turn comes; without n and m, so many of all rows of a
block of columns when the block's turn comes.

With a grid, q_i is also rounded to it. Grids are fitted, GRID_WINDOW columns at a time, to what would be kept of the columns
as updated so far.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm

import torch
from torch import Tensor

from compress.linalg.error_feedback import GRID_WINDOW, LEAF, ColumnGrids, Update, cuts, propagate
from compress.linalg.grid import Grid, GridRule
from compress.linalg.sparsity import highest, highest_of_groups


@dataclass(frozen=True)
class Pruned:
    """Outcome of the loop.

    Attributes:
        weight: Q [rows, in], float32, each number one that its dtype holds.
        mask: bool [rows, in].
        loss: [rows], their shares of tr((W - Q) H_d (W - Q)^T).
        codes: uint8 [rows, in] on `grid`; both None without a grid.
    """

    weight: Tensor
    mask: Tensor
    loss: Tensor
    codes: Tensor | None = None
    grid: Grid | None = None


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
    rule: GridRule | None = None,
    group_size: int = -1,
) -> Pruned:
    """Prune `weight` with error feedback.

    Args:
        weight: [rows, in], float32.
        upper: U [in, in].
        dtype: that values are stored in; what rounding to it costs is fed back too.
        rule: how grids are fitted, which is symmetric; None: values stay floats.
        group_size: columns that share a grid; divides `in`. -1: all.
    """
    n = weight.shape[1]
    work = weight.T.contiguous()  # [in, rows]
    loop = _Loop(
        pattern,
        [Update(upper, -upper.diagonal().unsqueeze(1), work)],
        upper.diagonal().square().reciprocal().unsqueeze(1),
        torch.empty_like(work, dtype=torch.bool),
        torch.empty_like(work),
        dtype,
    )
    window = n
    if rule is not None:
        assert rule.symmetric
        size = n if group_size == -1 else group_size
        loop.grids, loop.group_size = ColumnGrids(weight, size, rule), size
        window = n if group_size == -1 else max(GRID_WINDOW // size, 1) * size
        if pattern.m:  # windows hold whole groups of either kind
            window = min(lcm(window, pattern.m), n)
    for left, right in cuts(0, n, window):
        if loop.grids is not None:
            loop.fit(left, right)
        for start, stop in cuts(left, right, pattern.blocks()):
            if not pattern.m:
                loop.choose(start, stop)
            for first, last in cuts(start, stop, pattern.leaves()):
                loop.leaf(first, last)
                propagate(loop.updates, first, last, stop)
            propagate(loop.updates, start, stop, n)
    loss = work.div_(upper.diagonal().unsqueeze(1)).square_().sum(0)
    mask = loop.keep.T.contiguous()
    if loop.grids is None:
        return Pruned(loop.result.T.contiguous(), mask, loss)
    grid = loop.grids.result()
    codes = loop.result.T.contiguous().add_(loop.grids.rule.middle).to(torch.uint8)
    return Pruned(grid.decode(codes), mask, loss, codes, grid)


@dataclass
class _Loop:
    """State of the loop; matrices are [in, rows]. `result` holds values, or codes less the zero point."""

    pattern: Pattern
    updates: list[Update]
    weights: Tensor  # 1 / U[i, i]^2 [in, 1]
    keep: Tensor
    result: Tensor
    dtype: torch.dtype
    grids: ColumnGrids | None = None
    group_size: int = 0

    def scores(self, start: int, stop: int) -> Tensor:
        return self.updates[0].source[start:stop].square().mul_(self.weights[start:stop])

    def chosen(self, start: int, stop: int) -> Tensor:
        """What columns start .. stop-1 would keep as they are now: bool [columns, rows]."""
        pattern, scores = self.pattern, self.scores(start, stop)
        if pattern.m:
            return highest_of_groups(scores.T, pattern.n, pattern.m).T
        return highest(scores.T, pattern.share(start, stop, len(self.keep))).T

    def choose(self, start: int, stop: int) -> None:
        self.keep[start:stop] = self.chosen(start, stop)

    def fit(self, left: int, right: int) -> None:
        assert self.grids is not None
        groups = list(range(left // self.group_size, right // self.group_size))
        kept = self.updates[0].source[left:right] * self.chosen(left, right)
        self.grids.fit(groups, kept.T)

    def leaf(self, first: int, last: int) -> None:
        """Columns first .. last-1, one after the other; they end as residuals."""
        update = self.updates[0]
        work, within, m = update.source[first:last], update.stripe(first, last, first, last), self.pattern.m
        for i, column in enumerate(work.unbind(0)):
            position = first + i
            if m and position % m == 0:
                self.choose(position, position + m)
            out, keep = self.result[position], self.keep[position]
            if self.grids is None:
                torch.mul(column.to(self.dtype).to(column.dtype), keep, out=out)
                column.sub_(out)
            else:
                group = position // self.group_size
                self.grids.round(column, group, out=out)
                out.mul_(keep)
                column.sub_((out * self.grids.scale[group]).to(self.grids.rule.scale_dtype))
            if i + 1 < len(work):
                work[i + 1 :].addr_(within[i, i + 1 :], column)
