"""Tables: which values a weight may take where they need not lie at equal distances.

    code = the nearest of T[0] <= T[1] <= ... to w / scale;   w' = T[code] * scale, rounded to the stored dtype

Either one table for the whole matrix and a scale per row and group of columns, or a table per row and no scales.

NormalFloat puts as many weights of a normal distribution on each value: quantiles at evenly spaced probabilities, from
1 - OFFSET to 1/2 and from 1/2 to OFFSET, divided by the largest. 0 and both ends are in it; of 2^bits values one more is
positive than negative, so that, as with `signed` integer grids (compress/linalg/grid.py), a scale may be negative to have
it where it is of use.

Scales: "absmax" puts the largest weight of a group on an end of the table. "fitted" minimises sum_j h_j (w_j - w'_j)^2 over
the codes and the scale, in turn, ROUNDS times: the nearest codes for a scale, and for codes the scale  <w, T>_h / <T, T>_h. It
starts where the codes for STARTS times the largest weight, of both signs, allow the least error.

Sources: Dettmers et al., 2023, arXiv:2305.14314 (NormalFloat); Guo et al., 2024, arXiv:2407.10960 (scales that are fitted).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from compress.errors import NumericsError
from compress.linalg.grid import stored_scale
from compress.linalg.kmeans import weighted_kmeans

OFFSET = 1 - (1 / 32 + 1 / 30) / 2  # probability of the largest value, for every number of bits; bitsandbytes
STARTS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)  # of the scale that puts the largest weight on an end
ROUNDS = 8
TURNS = 5  # of a table and the scales that go with it
POOL = 1 << 17  # weights from which a table for all is made, at most
CHUNK = 1 << 18  # elements worked on at a time


def normal_float(bits: int) -> Tensor:
    """The values of NormalFloat with `bits` bits, [2^bits], float64, ascending, largest 1."""
    half = 2 ** (bits - 1)
    negative = torch.special.ndtri(torch.linspace(1 - OFFSET, 0.5, half, dtype=torch.float64))
    positive = torch.special.ndtri(torch.linspace(0.5, OFFSET, half + 1, dtype=torch.float64))[1:]
    table = torch.cat([negative, positive]) / positive[-1]
    table[half - 1] = 0.0
    return table


@dataclass(frozen=True)
class Lookup:
    """Tables of a matrix, in the stored dtype: `table` [2^bits] ascending and `scale` [rows, groups]; or `table` [rows, 2^bits]
    ascending, and no `scale`."""

    table: Tensor
    scale: Tensor | None = None

    def encode(self, weight: Tensor) -> Tensor:
        """Codes of the nearest values: weight [rows, columns] -> uint8 [rows, columns]."""
        codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        for rows in row_chunks(weight):
            codes[rows] = _codes(weight[rows].float(), self.rows(rows))
        return codes

    def decode(self, codes: Tensor) -> Tensor:
        """The values of codes [rows, columns], float32 but representable in the dtype of `table`."""
        values = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
        for rows in row_chunks(codes):
            values[rows] = looked_up(codes[rows], *self.rows(rows).parts())
        return values

    def parts(self) -> tuple[Tensor, Tensor | None]:
        return self.table, self.scale

    def rows(self, rows: slice | Tensor) -> Lookup:
        """That of some rows."""
        if self.scale is None:
            return Lookup(self.table[rows])
        return Lookup(self.table, self.scale[rows])

    def with_rows(self, rows: Tensor, other: Lookup) -> Lookup:
        """`other` in the rows where `rows`, bool [rows], is True."""
        if self.scale is None or other.scale is None:
            return Lookup(torch.where(rows.unsqueeze(1), other.table, self.table))
        return Lookup(self.table, torch.where(rows.unsqueeze(1), other.scale, self.scale))

    @staticmethod
    def cat(lookups: list[Lookup]) -> Lookup:
        """Those of matrices stacked on top of each other."""
        scales = [lookup.scale for lookup in lookups if lookup.scale is not None]
        if scales:
            return Lookup(lookups[0].table, torch.cat(scales))
        return Lookup(torch.cat([lookup.table for lookup in lookups]))


def looked_up(codes: Tensor, table: Tensor, scale: Tensor | None) -> Tensor:
    """Codes [rows, columns] -> values in the dtype of `table`."""
    index = codes.long()
    if scale is None:
        return table.gather(1, index)
    return (table[index].unflatten(1, (scale.shape[1], -1)) * scale.unsqueeze(-1)).flatten(1)


def _codes(weight: Tensor, lookup: Lookup) -> Tensor:
    table = lookup.table.float()
    middles = (table[..., 1:] + table[..., :-1]) / 2
    if lookup.scale is None:
        return torch.searchsorted(middles, weight.contiguous())
    scale = lookup.scale.float().unsqueeze(-1)
    return torch.bucketize((weight.unflatten(1, (scale.shape[1], -1)) / scale).flatten(1), middles)


@dataclass(frozen=True)
class ScaleRule:
    """How scales of one table are fitted. `table` in the dtype in which it, and they, are stored."""

    table: Tensor
    fit: Literal["absmax", "fitted"] = "fitted"


def fit_scales(
    weight: Tensor, group_size: int, rule: ScaleRule, sensitivity: Tensor, near: Tensor | None = None
) -> Tensor:
    """A scale per row and group.

    Args:
        weight: [rows, columns], float32.
        group_size: columns that share a scale; divides `columns`.
        sensitivity: h [columns], not negative.
        near: [rows, groups] to start from, not 0.

    Returns: [rows, groups] in the stored dtype, never 0; 1 for a group of zeros.
    Raises: NumericsError if one is not finite in that dtype.
    """
    h = _of_groups(sensitivity, group_size)
    parts = []
    for rows in row_chunks(weight):
        groups = weight[rows].unflatten(1, (-1, group_size))  # [chunk, groups, group_size]
        parts.append(_fit(groups, h, rule, None if near is None else near[rows]))
    return torch.cat(parts).to(rule.table.dtype)


def _of_groups(sensitivity: Tensor, group_size: int) -> Tensor:
    """h [groups, group_size]; where a group has none, all its columns count alike."""
    h = sensitivity.view(-1, group_size)
    return torch.where(h.sum(1, keepdim=True) > 0, h, torch.ones_like(h))


def _fit(groups: Tensor, h: Tensor, rule: ScaleRule, near: Tensor | None) -> Tensor:
    table, dtype = rule.table.float(), rule.table.dtype
    largest = groups.abs().amax(-1)
    largest = torch.where(largest > 0, largest, torch.ones_like(largest))
    if rule.fit == "absmax":
        return rounded_scale(largest, dtype).float()
    middles, groups = (table[1:] + table[:-1]) / 2, groups.contiguous()

    def coded(scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Nearest values, their product with the weights, and their square."""
        values = table[torch.bucketize(groups / scale.unsqueeze(-1), middles)]
        weighted = values * h
        return values, (weighted * groups).sum(-1), (weighted * values).sum(-1)

    best_gain, best = torch.full_like(largest, -torch.inf), largest if near is None else near.float()
    for start in (sign * p for p in STARTS for sign in (1, -1) if near is None):
        scale = largest * start
        _, product, square = coded(scale)
        gain = torch.where(square > 0, product.square() / square, 0.0)  # of the best scale for these codes
        best = torch.where(gain > best_gain, scale, best)
        best_gain = torch.maximum(gain, best_gain)
    scale, best_error = rounded_scale(best, dtype).float(), torch.full_like(largest, torch.inf)
    for _ in range(ROUNDS):
        values, product, square = coded(scale)
        error = ((groups - values * scale.unsqueeze(-1)).square_() * h).sum(-1)
        better = error < best_error
        if not better.any():
            break
        best_error, best = torch.where(better, error, best_error), torch.where(better, scale, best)
        scale = rounded_scale(torch.where((square > 0) & (product != 0), product / square, scale), dtype).float()
    return best


def rounded_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` in `dtype`, sign and all, never 0. Raises: NumericsError if one is not finite in it."""
    scale = scale.float()
    return (torch.where(scale < 0, -1.0, 1.0) * stored_scale(scale.abs(), dtype)).to(dtype)


def fit_tables(weight: Tensor, bits: int, sensitivity: Tensor, dtype: torch.dtype) -> Tensor:
    """Tables per row by weighted k-means: weight [rows, columns], sensitivity [columns] -> [rows, 2^bits] in `dtype`.

    Raises: NumericsError if a value is not finite in `dtype`.
    """
    return stored_table(weighted_kmeans(weight, sensitivity, 2**bits), dtype)


def fit_table(weight: Tensor, bits: int, group_size: int, sensitivity: Tensor, dtype: torch.dtype) -> Tensor:
    """One table for a matrix whose groups have scales: scales fitted to the table, and k-means of all w / scale with weights
    h scale^2, TURNS times, from NormalFloat's.

    Returns: [2^bits] in `dtype`, ascending, the largest size 1.
    """
    step = -(-weight.numel() // POOL)  # rows between those that are looked at
    sample = weight[::step]
    h = _of_groups(sensitivity, group_size)
    table, scale = normal_float(bits).to(weight.device, dtype), None
    for _ in range(TURNS):
        scale = fit_scales(sample, group_size, ScaleRule(table), sensitivity, scale)
        each = scale.float().unsqueeze(-1)  # [rows, groups, 1]
        pooled = sample.unflatten(1, (-1, group_size)) / each
        found = weighted_kmeans(pooled.reshape(1, -1), (each.square() * h).reshape(1, -1), 2**bits)[0]
        largest = found.abs().max()
        if largest == 0:
            break
        table = (found / largest).to(dtype)
    return table


def stored_table(table: Tensor, dtype: torch.dtype) -> Tensor:
    """Raises: NumericsError if a value is not finite in `dtype`."""
    stored = table.to(dtype)
    if not torch.isfinite(stored).all():
        raise NumericsError(
            f"a value of a table is {float(table.abs().max()):.3g}, which {dtype} cannot hold: the weights hold huge values, "
            f"infinity or NaN; check the checkpoint, or use a model in bfloat16"
        )
    return stored


class LookupColumns:
    """Tables as a column loop takes them (compress/linalg/error_feedback.py), transposed like its columns."""

    def __init__(self, lookup: Lookup, rule: ScaleRule | None = None, sensitivity: Tensor | None = None):
        """`rule`, `sensitivity` [groups, group_size], columns as they come in the loop: to fit scales anew; without, none are."""
        table = lookup.table.float()
        self.dtype, self.rule, self.sensitivity = lookup.table.dtype, rule, sensitivity
        self.table = table if lookup.scale is not None else table.T.contiguous()  # [2^bits] or [2^bits, rows]
        self.middles = (self.table[1:] + self.table[:-1]) / 2
        self.scale = None if lookup.scale is None else lookup.scale.float().T.contiguous()  # [groups, rows]

    def fit(self, groups: list[int] | slice, weight: Tensor) -> None:
        """Fit the scales of `groups` to their columns [rows, groups * group_size]."""
        if self.rule is not None and self.sensitivity is not None and self.scale is not None:
            h = self.sensitivity[groups]
            self.scale[groups] = fit_scales(weight, h.shape[1], self.rule, h.flatten()).float().T

    def round(self, column: Tensor, group: int, keep: Tensor | None, out: Tensor) -> Tensor:
        """Codes of the values nearest to `column` [rows], to `out`. Returns the values, as they will be loaded."""
        assert keep is None
        if self.scale is None:
            code = (column > self.middles).sum(0)
            out.copy_(code)
            return self.table.gather(0, code.unsqueeze(0)).squeeze(0)
        scale = self.scale[group]
        code = torch.bucketize(column / scale, self.middles)
        out.copy_(code)
        return (self.table[code] * scale).to(self.dtype)

    def codes(self, rounded: Tensor, groups: list[int]) -> Tensor:
        """What `round` left, as codes."""
        return rounded

    def result(self) -> Lookup:
        if self.scale is None:
            return Lookup(self.table.T.contiguous().to(self.dtype))
        return Lookup(self.table.to(self.dtype), self.scale.T.contiguous().to(self.dtype))


def row_chunks(matrix: Tensor) -> Iterator[slice]:
    """Slices of whole rows of about CHUNK elements."""
    step = max(1, CHUNK // max(matrix.shape[1], 1))
    for start in range(0, len(matrix), step):
        yield slice(start, min(start + step, len(matrix)))
