"""Integer grids: which values a weight may take, and which of them it takes.

    code = clamp(round(w / scale) + zero_point, 0, 2^bits - 1)
    w'   = (code - zero_point) * scale, rounded to the dtype of `scale`

One scale and zero point per row and group of `group_size` neighbouring columns.

symmetric   The range is [-a, a] with a = max |w|, scale = 2a / (2^bits - 1), zero_point = 2^(bits-1) for all. It is
            2^bits - 1 steps wide, its ends lie half a step outside the codes -2^(b-1) .. 2^(b-1)-1: +a and -a are half
            a step off at worst. The alternative, scale = a / (2^(b-1) - 1), puts a on the grid, but leaves one code of
            2^bits unused and widens every step: by 7 % at 4 bits, 17 % at 3, 50 % at 2. We keep the full range of the
            original GPTQ code. Where a group has no negative weight, that code takes [0, a] for the range but not for
            the zero point, and clips the upper half of the weights away; here the range is [-a, a] always.
signed      Symmetric, and scale = -m / 2^(bits-1), m the weight of the largest magnitude, with its sign: m is on the grid, on
            the side that has one code more, and no step is wasted. Scales may be negative; the bytes are the same.
asymmetric  The range is [min(0, min w), max(0, max w)], scale = range / (2^bits - 1), zero_point = round(-min / scale),
            an integer within 0 .. 2^bits - 1. Zero is on every grid, hence a pruned weight stays exactly zero.

Clip search ("mse"): shrink the range to p = 1, 0.99, ... 0.21 of itself and keep the p with the least sum of
|w' - w|^2.4. The exponent is the original code's: between the square, which gives up the few large weights too easily,
and the maximum. Of signed grids both signs are tried, and p = 1.24 ... 0.30: the side with fewer codes may be the one that
matters, and then the range must widen to reach its end.

The scale is rounded to the dtype it is stored in *before* codes are chosen, and w' is rounded to it because that is what
loaders make of it: errors are measured, and fed back, against the weight that will run. In bfloat16 this second rounding
is up to a quarter of a step at 8 bits (half a step where asymmetric), and nothing to speak of at 4.

Source: Frantar et al., 2022, arXiv:2210.17323, and its code (`quant.py`) for range and search.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from compress.errors import NumericsError

SEARCH_STEPS = 100  # the range shrinks by 1 / SEARCH_STEPS at a time ...
SEARCH_SHRINK = 0.8  # ... until this fraction of it is gone; GPTQ code, `grid` and `maxshrink`
SEARCH_NORM = 2.4  # GPTQ code, `norm`
SIGNED_SHRINKS = tuple(percent / 100 for percent in range(124, 28, -2))
CHUNK = 1 << 16  # elements worked on at a time: a few float32 temporaries of this size stay in a core's L2 cache


@dataclass(frozen=True)
class GridRule:
    """How a grid is fitted. `scale_dtype` is the dtype in which scales are stored. `signed`: of a symmetric grid, whether its
    scale may be negative."""

    bits: int
    symmetric: bool = True
    clip: Literal["none", "mse"] = "none"
    scale_dtype: torch.dtype = torch.float32
    signed: bool = False

    @property
    def max_code(self) -> int:
        return 2**self.bits - 1

    @property
    def middle(self) -> int:
        """The zero point of every symmetric grid."""
        return 2 ** (self.bits - 1)


@dataclass(frozen=True)
class Grid:
    """Grids of a matrix: `scale` [rows, groups] in the stored dtype; `zero_point` [rows, groups] int32, or None where
    all are 2^(bits-1)."""

    bits: int
    scale: Tensor
    zero_point: Tensor | None

    def encode(self, weight: Tensor) -> Tensor:
        """Codes of the nearest grid values: weight [rows, columns] -> uint8 [rows, columns]."""
        groups = self.scale.shape[1]
        codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        for rows in _row_chunks(weight):
            scale = self.scale[rows].float().unsqueeze(-1)  # [chunk, groups, 1]
            steps = weight[rows].float().unflatten(1, (groups, -1)).div(scale).round_()  # [chunk, groups, group_size]
            codes[rows] = steps.add_(self._zero(rows)).clamp_(0, 2**self.bits - 1).flatten(1)
        return codes

    def decode(self, codes: Tensor) -> Tensor:
        """The values of codes [rows, columns], float32 but representable in the dtype of `scale`."""
        values = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
        for rows in _row_chunks(codes):
            steps = codes[rows].float().unflatten(1, (self.scale.shape[1], -1)).sub_(self._zero(rows))
            steps.mul_(self.scale[rows].float().unsqueeze(-1))  # exact: 8 bits by at most 11, or float32
            values[rows] = steps.to(self.scale.dtype).flatten(1)
        return values

    def rows(self, rows: slice) -> Grid:
        """The grids of some rows."""
        return Grid(self.bits, self.scale[rows], None if self.zero_point is None else self.zero_point[rows])

    @staticmethod
    def cat(grids: list[Grid]) -> Grid:
        """Grids of matrices stacked on top of each other."""
        zeros = [grid.zero_point for grid in grids if grid.zero_point is not None]
        return Grid(grids[0].bits, torch.cat([grid.scale for grid in grids]), torch.cat(zeros) if zeros else None)

    def _zero(self, rows: slice) -> Tensor | int:
        return 2 ** (self.bits - 1) if self.zero_point is None else self.zero_point[rows].unsqueeze(-1)


def fit_grid(weight: Tensor, group_size: int, rule: GridRule) -> Grid:
    """Fit one grid per row and group.

    Args:
        weight: [rows, columns], any float dtype.
        group_size: columns that share a grid; divides `columns`. -1: all of them.

    Raises: NumericsError if a scale is not finite in the stored dtype.
    """
    n_groups = 1 if group_size == -1 else weight.shape[1] // group_size
    grids = []
    for rows in _row_chunks(weight):
        groups = weight[rows].float().unflatten(1, (n_groups, -1))  # [chunk, groups, group_size]
        scale, zero = fit_range(groups, rule)
        grids.append(Grid(rule.bits, scale.to(rule.scale_dtype), None if zero is None else zero.int()))
    return Grid.cat(grids)


def fit_range(values: Tensor, rule: GridRule) -> tuple[Tensor, Tensor | None]:
    """Fit one grid to each slice along the last dimension.

    Args:
        values: [..., n], float32.

    Returns: scale [...], float32 but representable in `rule.scale_dtype`; zero point [...], integers in float32,
    or None if symmetric. A slice of zeros gets the range [-1, 1].
    Raises: NumericsError if a scale is not finite in the stored dtype.
    """
    low, high = values.amin(-1).clamp_(max=0), values.amax(-1).clamp_(min=0)  # the range contains 0
    if rule.signed:
        return _fit_signed(values, low, high, rule), None
    if rule.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    empty = (low == 0) & (high == 0)
    low, high = low.masked_fill(empty, -1.0), high.masked_fill(empty, 1.0)
    if rule.clip == "mse":
        return _search_clip(values, low, high, rule)
    return _range_to_grid(low, high, rule)


def stored_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` > 0 rounded to `dtype`, in float32, never 0.

    float16 has few bits left below its smallest normal number 2^-14, which 8-bit scales do reach: those are rounded up,
    so that no weight is clipped, to 2^-24 at least. In other dtypes the smallest normal number is the least.
    """
    if dtype == torch.float16:
        tiny, step = torch.finfo(dtype).tiny, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        scale = torch.where(scale < tiny, (scale / step).ceil().clamp(min=1) * step, scale)
    else:
        scale = scale.clamp(min=torch.finfo(dtype).tiny)
    stored = scale.to(dtype).float()
    if not torch.isfinite(stored).all():
        raise NumericsError(
            f"the scale of a weight group is {float(scale.max()):.3g}, which {dtype} cannot hold: "
            f"the weights hold huge values, infinity or NaN; check the checkpoint, or use a model in bfloat16"
        )
    return stored


def _range_to_grid(low: Tensor, high: Tensor, rule: GridRule) -> tuple[Tensor, Tensor | None]:
    scale = stored_scale((high - low) / rule.max_code, rule.scale_dtype)
    if rule.symmetric:
        return scale, None
    return scale, (-low / scale).round_().clamp_(0, rule.max_code)


def _fit_signed(values: Tensor, low: Tensor, high: Tensor, rule: GridRule) -> Tensor:
    """Signed scales [...] of slices [..., n]; a slice of zeros gets that of the range [-1, 1]."""
    extreme = torch.where(-low > high, low, high)
    extreme = torch.where(extreme == 0, torch.ones_like(extreme), extreme)
    natural = -extreme / rule.middle
    sign = natural.sign()
    if rule.clip == "none":
        return sign * stored_scale(natural.abs(), rule.scale_dtype)
    best_error = torch.full_like(natural, float("inf"))
    best_scale = torch.ones_like(natural)
    error = torch.empty_like(values)
    for shrink in SIGNED_SHRINKS:
        size = stored_scale(natural.abs() * shrink, rule.scale_dtype)
        for scale in (sign * size, -sign * size):
            torch.div(values, scale.unsqueeze(-1), out=error)
            torch.clamp(error.round_(), min=-rule.middle, max=rule.max_code - rule.middle, out=error)
            error.mul_(scale.unsqueeze(-1)).sub_(values).abs_().pow_(SEARCH_NORM)
            total = error.sum(-1)
            better = total < best_error
            best_error = torch.where(better, total, best_error)
            best_scale = torch.where(better, scale, best_scale)
    return best_scale


def _search_clip(values: Tensor, low: Tensor, high: Tensor, rule: GridRule) -> tuple[Tensor, Tensor | None]:
    """The shrunken range with the least sum of |error|^SEARCH_NORM; of equal ones the widest."""
    best_error = torch.full_like(low, float("inf"))
    best_scale, best_zero = torch.ones_like(low), torch.zeros_like(low)
    error = torch.empty_like(values)
    for i in range(int(SEARCH_SHRINK * SEARCH_STEPS)):
        shrink = 1 - i / SEARCH_STEPS
        scale, zero = _range_to_grid(low * shrink, high * shrink, rule)
        zero = torch.full_like(scale, rule.middle) if zero is None else zero
        first, last = -zero.unsqueeze(-1), (rule.max_code - zero).unsqueeze(-1)  # steps from zero to either end
        torch.div(values, scale.unsqueeze(-1), out=error)
        torch.clamp(error.round_(), min=first, max=last, out=error)
        error.mul_(scale.unsqueeze(-1)).sub_(values).abs_().pow_(SEARCH_NORM)
        total = error.sum(-1)
        better = total < best_error
        best_error = torch.where(better, total, best_error)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    return best_scale, None if rule.symmetric else best_zero


def _row_chunks(matrix: Tensor) -> list[slice]:
    """Slices of whole rows of about CHUNK elements: temporaries stay small, whatever the size of an embedding."""
    n_rows, n_columns = matrix.shape
    step = max(1, CHUNK // max(n_columns, 1))
    return [slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step)]
