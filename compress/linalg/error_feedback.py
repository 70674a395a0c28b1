"""Rounding with error feedback: column by column, the columns not yet rounded make good the error of those that are.

With U from H_d^-1 = U^T U, upper triangular (compress/linalg/cholesky.py), for each column i in order:

    q_i = nearest grid value of w_i;   r_i = w_i - q_i
    w_j -= r_i U[i, j] / U[i, i]       for all j > i

and at the end  tr((W - Q) H_d (W - Q)^T) = sum_i |r_i|^2 / U[i, i]^2,  the loss, for nothing.

Fast, in a loop of Python over columns, because W is worked on transposed, so that a column is a contiguous row; because
r_i replaces w_i in place; and because an update stays within LEAF columns first, then within `block_size`, and reaches
the rest of the matrix as one product per block ("lazy batch updates" in the paper). Where an update happens changes
nothing but rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from compress.linalg.grid import Grid, GridRule, fit_grid
from compress.linalg.order import inverse_order

LEAF = 16  # columns updated one by one: 16 columns of 8192 rows in float32 stay in a core's L2 cache
GRID_WINDOW = 128  # columns whose grids are fitted together when grids follow the updates; GPTQ code, its block size


class Decoder(Protocol):
    """Grids or tables of a matrix."""

    def decode(self, codes: Tensor) -> Tensor:
        """The values of codes [rows, in], float32."""


Found = TypeVar("Found", bound=Decoder)


@dataclass(frozen=True)
class Rounded(Generic[Found]):
    """`codes` uint8 [rows, in] on `grid`; `loss` [rows], the rows' share of tr((W - Q) H_d (W - Q)^T).

    `continuous` [rows, in], if asked for: every column as it was just before it was rounded.
    """

    codes: Tensor
    grid: Found
    loss: Tensor
    continuous: Tensor | None = None


def round_columns(
    weight: Tensor,
    upper: Tensor,
    rule: GridRule,
    group_size: int = -1,
    order: Tensor | None = None,
    static_groups: bool = True,
    block_size: int = 128,
    feedback: Tensor | None = None,
    mask: Tensor | None = None,
    continuous: bool = False,
) -> Rounded[Grid]:
    """Round `weight` with error feedback.

    Args:
        weight: [rows, in], float32, in natural order.
        upper: U [in, in], for H with rows and columns in `order`.
        rule: how grids are fitted.
        group_size: columns that share a grid; divides `in`. -1: all.
        order: [in], `order[new] = old`; None is the natural order.
        static_groups: fit all grids on `weight` as given. Else on columns as updated so far, GRID_WINDOW (or one group)
            at a time; this needs groups whole in `order`.
        block_size: columns between updates of the whole matrix.
        feedback: P [in, in] in `order`: each column, before it is rounded, adds w_i P[i, j] to the later ones (GPTAQ).
        mask: bool [rows, in]: `weight` is 0 where it is False, and stays so; needs a symmetric `rule`.
        continuous: also return the columns as they were before they were rounded.

    Returns: codes, grid and loss, in natural order.
    """
    group_size = weight.shape[1] if group_size == -1 else group_size
    assert mask is None or rule.symmetric
    grids = ColumnGrids(weight, group_size, rule)
    return round_onto(grids, weight, upper, group_size, order, static_groups, block_size, feedback, mask, continuous)


Fitted = TypeVar("Fitted", bound=Decoder, covariant=True)


class Levels(Protocol[Fitted]):
    """The values that a column loop may give to columns: one set per row and group, perhaps fitted on the way."""

    def fit(self, groups: list[int] | slice, weight: Tensor) -> None:
        """Fit those of `groups` to their columns [rows, groups * group_size]."""

    def round(self, column: Tensor, group: int, keep: Tensor | None, out: Tensor) -> Tensor:
        """The values nearest to `column` [rows], as they will be loaded, 0 where not `keep`. Their codes, or what `codes` makes
        them of, go to `out`."""

    def codes(self, rounded: Tensor, groups: list[int]) -> Tensor:
        """Codes of columns [columns, rows], each of one of `groups`, from what `round` wrote."""

    def result(self) -> Fitted:
        """What was fitted."""


def round_onto(
    levels: Levels[Found],
    weight: Tensor,
    upper: Tensor,
    group_size: int,
    order: Tensor | None = None,
    static_groups: bool = True,
    block_size: int = 128,
    feedback: Tensor | None = None,
    mask: Tensor | None = None,
    continuous: bool = False,
) -> Rounded[Found]:
    """`round_columns`, to any values. `group_size` is a number of columns."""
    n = weight.shape[1]
    columns = torch.arange(n, device=weight.device) if order is None else order
    group_of = (columns // group_size).tolist()
    work = weight.T.index_select(0, columns)  # [in, rows], contiguous
    updates = [Update(upper, -upper.diagonal().unsqueeze(1), work)]  # - r_i U[i, j] / U[i, i]
    if feedback is not None:
        updates.append(Update(feedback, None, torch.empty_like(work)))  # w_i P[i, j]
    keep = None if mask is None else mask.T.index_select(0, columns)  # [in, rows]
    if static_groups:
        levels.fit(slice(None), weight)
    codes = torch.empty(work.shape, dtype=torch.uint8, device=work.device)

    for left, right in cuts(0, n, n if static_groups else max(GRID_WINDOW // group_size, 1) * group_size):
        if not static_groups:
            window = work[left:right] if keep is None else work[left:right] * keep[left:right]
            levels.fit(group_of[left:right:group_size], window.T)
        for start, stop in cuts(left, right, block_size):
            for first, last in cuts(start, stop, LEAF):
                codes[first:last] = _round_leaf(updates, levels, group_of, keep, first, last)
                propagate(updates, first, last, stop)
            propagate(updates, start, stop, n)

    back = slice(None) if order is None else inverse_order(order)
    natural, grid = codes[back].T.contiguous(), levels.result()
    before = work[back].T + grid.decode(natural) if continuous else None  # `work` holds residuals by now
    loss = work.div_(upper.diagonal().unsqueeze(1)).square_().sum(0)
    return Rounded(natural, grid, loss, before)


@dataclass(frozen=True)
class Update:
    """w_j += source[i] coefficients[i, j] / divisor[i]; divided stripe by stripe, since the matrix may be large."""

    coefficients: Tensor  # [in, in]
    divisor: Tensor | None  # [in, 1]
    source: Tensor  # [in, rows]; of the first update the work itself

    def stripe(self, first: int, last: int, start: int, stop: int) -> Tensor:
        """What columns first .. last-1 do to columns start .. stop-1."""
        piece = self.coefficients[first:last, start:stop]
        return piece if self.divisor is None else piece / self.divisor[first:last]


def _round_leaf(
    updates: list[Update], levels: Levels[Found], group_of: list[int], keep: Tensor | None, first: int, last: int
) -> Tensor:
    """Round columns first .. last-1 one after the other; they end as residuals. Returns their codes [columns, rows]."""
    work = updates[0].source[first:last]
    rounded = torch.empty_like(work)
    within = [(update.stripe(first, last, first, last), update.source[first:last]) for update in updates]
    for i, (column, out) in enumerate(zip(work.unbind(0), rounded.unbind(0), strict=True)):
        for _, source in within[1:]:
            source[i] = column
        kept = None if keep is None else keep[first + i]
        column.sub_(levels.round(column, group_of[first + i], kept, out))
        if first + i + 1 < last:
            for coefficients, source in within:
                work[i + 1 :].addr_(coefficients[i, i + 1 :], source[i])
    return levels.codes(rounded, group_of[first:last])


def propagate(updates: list[Update], first: int, last: int, stop: int) -> None:
    """What columns first .. last-1 do to columns last .. stop-1."""
    if last < stop:
        work = updates[0].source
        for update in updates:
            work[last:stop].addmm_(update.stripe(first, last, last, stop).T, update.source[first:last])


def cuts(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """Cut start .. stop into pieces of `size`, the last one shorter."""
    for left in range(start, stop, size):
        yield left, min(left + size, stop)


class ColumnGrids:
    """The grids of a column loop, transposed like its columns: `scale` and `zero_point` [groups, rows]."""

    def __init__(self, weight: Tensor, group_size: int, rule: GridRule):
        self.rule, self.group_size = rule, group_size
        self.scale = torch.empty(weight.shape[1] // group_size, weight.shape[0], device=weight.device)
        self.zero_point = None if rule.symmetric else torch.empty_like(self.scale)
        self._values = torch.empty(weight.shape[0], dtype=rule.scale_dtype, device=weight.device)

    def fit(self, groups: list[int] | slice, weight: Tensor) -> None:
        """Fit the grids of `groups` to their columns [rows, groups * group_size]."""
        grid = fit_grid(weight, self.group_size, self.rule)
        self.scale[groups] = grid.scale.float().T
        if self.zero_point is not None and grid.zero_point is not None:
            self.zero_point[groups] = grid.zero_point.float().T

    def round(self, column: Tensor, group: int, keep: Tensor | None, out: Tensor) -> Tensor:
        """Steps from zero to the grid values nearest to `column` [rows], to `out`, and these values, until the next call."""
        torch.div(column, self.scale[group], out=out).round_()
        if self.zero_point is None:
            out.clamp_(-self.rule.middle, self.rule.max_code - self.rule.middle)
        else:
            zero = self.zero_point[group]
            torch.clamp(out, min=-zero, max=self.rule.max_code - zero, out=out)
        if keep is not None:
            out.mul_(keep)
        return torch.mul(out, self.scale[group], out=self._values)

    def codes(self, rounded: Tensor, groups: list[int]) -> Tensor:
        return rounded.add_(self.rule.middle if self.zero_point is None else self.zero_point[groups])

    def result(self) -> Grid:
        zero_point = None if self.zero_point is None else self.zero_point.T.contiguous().int()
        return Grid(self.rule.bits, self.scale.T.contiguous().to(self.rule.scale_dtype), zero_point)
