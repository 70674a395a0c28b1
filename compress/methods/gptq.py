"""GPTQ: round column by column, and let the columns not yet rounded make good the error of those that are.

    minimise  tr((W - Q) H (W - Q)^T),   H = sum_t x_t x_t^T,   Q on an integer grid

H is damped, H_d = H + damping * mean(diag H) * I, and factored once per site, H_d^-1 = U^T U (compress/linalg/cholesky.py).
Then for each column i, in order:

    q_i = nearest grid value of w_i;   r_i = w_i - q_i
    w_j -= r_i U[i, j] / U[i, i]       for all j > i

and at the end  tr((W - Q) H_d (W - Q)^T) = sum_i |r_i|^2 / U[i, i]^2,  the loss, for nothing.

Rows are independent, so all layers of a site with equal settings run through one loop. What makes it fast: W is worked on
transposed, a column is then a contiguous row; r_i replaces w_i in place; an update stays within LEAF columns, then within
`block_size`, and reaches the rest of the matrix as one product per block ("lazy batch updates").

Order of the columns (compress/linalg/order.py): "none", "act" (largest inputs first; grids fitted on the original weights,
so that columns keep their groups and inference needs no index), "gar" (the same within and among groups; grids fitted, as
for "none", on the columns as updated when their group begins).

Departures from the original code: a group's grid is always fitted on current columns (the original's are stale for groups
narrower than its block); dead inputs get the mean of the diagonal, not 1, so that the scale of H changes nothing; scales
are rounded to their stored dtype first.

GPTAQ ("asymmetric calibration", experimental): the inputs x come from compressed layers; x~ are the original model's. To
match W x~ rather than W x, each column, not yet rounded, also adds to the later ones

    w_j += w_i P[i, j],   P = alpha * triu(D U^T, 1) U,   D = sum_t (x~_t - x_t) x_t^T

Sources: Frantar et al., 2022, arXiv:2210.17323; Gafni et al., 2025, arXiv:2505.14638 (gar); Li et al., 2025,
arXiv:2504.02692 (GPTAQ).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.calibration.statistics import CrossMoment, Request, SecondMoment, SiteStatistics
from compress.errors import NumericsError
from compress.linalg.cholesky import InverseFactor, inverse_factor
from compress.linalg.grid import Grid, GridRule, fit_grid, fit_range
from compress.linalg.order import act_order, group_aware_order, inverse_order
from compress.linalg.quadratic import row_energy
from compress.methods.base import Layer, LayerShape, Outcome, SiteMethod, SiteTask
from compress.methods.rtn import RTNConfig, check_weight, grid_rule, quantized_module, quantized_spec, round_layer
from compress.modules.quantized_spec import QuantizedSpec

LEAF = 16  # columns updated one by one: 16 x MAX_ROWS float32 stay in a core's L2 cache
MAX_ROWS = 8192  # rows per loop: enough to hide Python's cost per column, few enough to bound memory


class GPTQConfig(RTNConfig):
    damping: float = Field(0.01, gt=0, lt=1, description="fraction of the mean of diag(H) that is added to it")
    order: Literal["none", "act", "gar"] = Field(
        "gar",
        description="order of the columns: as they are, largest inputs first, or the latter with groups kept whole",
    )
    block_size: int = Field(128, ge=1, description="columns between updates of the whole matrix; changes speed only")
    gptaq: float = Field(
        0.0,
        ge=0,
        le=1,
        description="experimental: strength of matching the original model's outputs; 0 off, 0.25 usual",
    )


class GPTQ(SiteMethod):
    name = "gptq"
    summary = "second-order rounding with error feedback: integer weights of 2 to 8 bits"
    Config = GPTQConfig

    @classmethod
    def plan(cls, shape: LayerShape, config: GPTQConfig) -> QuantizedSpec:
        return quantized_spec(shape, config)

    @classmethod
    def statistics(cls, config: GPTQConfig) -> tuple[Request, ...]:
        return (SecondMoment(), CrossMoment()) if config.gptaq else (SecondMoment(),)

    @classmethod
    def workspace(cls, shapes: tuple[LayerShape, ...], config: GPTQConfig) -> int:
        n = max(s.in_features for s in shapes)
        n_rows = sum(s.out_features for s in shapes)
        squares = 8 if config.gptaq else 5  # copies of H, of its factor and of its rows over the diagonal
        return 4 * squares * n * n + min(n_rows, MAX_ROWS) * n * 18 + n_rows * n

    @classmethod
    def flops(cls, shapes: tuple[LayerShape, ...], config: GPTQConfig) -> float:
        n = max(s.in_features for s in shapes)
        n_rows = sum(s.out_features for s in shapes)
        return n**3 * (4.0 if config.gptaq else 1.0) + n_rows * n * (2.0 * n + 200)

    @classmethod
    def compress(
        cls, site: SiteTask, statistics: SiteStatistics | None, generator: torch.Generator
    ) -> dict[str, Outcome]:
        outcomes = {}
        with_inputs = []
        for layer in site.layers:
            if layer.kind == "embedding":  # a lookup has no inputs to weigh: rounding is optimal (see rtn.py)
                outcomes[layer.name] = round_layer(layer)
            elif statistics is None or statistics.n_tokens == 0:
                outcomes[layer.name] = round_layer(layer, (NO_TOKENS,))
            else:
                check_weight(layer)
                with_inputs.append(layer)
        if with_inputs:
            assert statistics is not None
            outcomes |= _compress_site(site.name, with_inputs, statistics)
        return {layer.name: outcomes[layer.name] for layer in site.layers}


NO_TOKENS = "NOT CALIBRATED: no calibration token reached this layer; it was rounded to nearest"


@dataclass(frozen=True)
class Curvature:
    """What one damping and one order make of a site's statistics.

    `upper` and `feedback` (P of GPTAQ, or None) have rows and columns in `order`; `order` is None for the natural one.
    """

    factor: InverseFactor
    order: Tensor | None
    feedback: Tensor | None


@dataclass(frozen=True)
class Rounded:
    """`codes` uint8 [rows, in] on `grid`; `loss` [rows], tr((W - Q) H_d (W - Q)^T) by row."""

    codes: Tensor
    grid: Grid
    loss: Tensor


def gptq(
    weight: Tensor,
    upper: Tensor,
    rule: GridRule,
    group_size: int = -1,
    order: Tensor | None = None,
    static_grid: bool = False,
    block_size: int = 128,
    feedback: Tensor | None = None,
) -> Rounded:
    """Round `weight`, column by column.

    Args:
        weight: [rows, in], float32, in natural order.
        upper: U [in, in] of `inverse_factor`, for H with rows and columns in `order`.
        rule: how grids are fitted.
        group_size: columns that share a grid; divides `in`. -1: all.
        order: [in], `order[new] = old`; None is the natural order.
        static_grid: fit all grids on `weight` as given; else when their group begins, which needs groups whole in `order`.
        block_size: columns between updates of the whole matrix.
        feedback: P [in, in] of GPTAQ in `order`.

    Returns: codes, grid and loss, in natural order.
    """
    n_rows, n = weight.shape
    group_size = n if group_size == -1 else group_size
    columns = torch.arange(n, device=weight.device) if order is None else order
    group_of = (columns // group_size).tolist()
    work = weight.T.index_select(0, columns)  # [in, rows], contiguous
    updates = [(upper / -upper.diagonal().unsqueeze(1), work)]  # -U[i, j] / U[i, i], r_i
    if feedback is not None:
        updates.append((feedback, torch.empty_like(work)))  # P[i, j], w_i
    grids = _Grids.fitted(weight, group_size, rule) if static_grid else _Grids.empty(weight, group_size, rule)
    codes = torch.empty(n, n_rows, dtype=torch.uint8, device=weight.device)

    unit = (
        1 if static_grid else group_size
    )  # a group must be current when its grid is fitted: blocks do not straddle it
    block_size = max(block_size // unit * unit, min(block_size, unit))
    for start, stop in _cuts(0, n, block_size, max(block_size, unit)):
        for first, last in _cuts(start, stop, LEAF, n if static_grid else group_size):
            if not static_grid and first % group_size == 0:
                grids.fit(group_of[first], work[first : first + group_size].T)
            codes[first:last] = _round_leaf(work, updates, grids, group_of, first, last)
            _propagate(work, updates, first, last, stop)
        _propagate(work, updates, start, stop, n)

    loss = work.div_(upper.diagonal().unsqueeze(1)).square_().sum(0)
    natural = codes.T if order is None else codes[inverse_order(order)].T
    return Rounded(natural.contiguous(), grids.result(), loss)


def _round_leaf(
    work: Tensor, updates: list[tuple[Tensor, Tensor]], grids: _Grids, group_of: list[int], first: int, last: int
) -> Tensor:
    """Round columns first .. last-1 one after the other; they end as residuals. Returns their codes [columns, rows]."""
    steps = torch.empty_like(work[first:last])  # code - zero_point
    for i, step in zip(range(first, last), steps.unbind(0), strict=True):
        column = work[i]
        for _, source in updates[1:]:
            source[i] = column
        grids.round(column, group_of[i], out=step)
        column.addcmul_(step, grids.scale[group_of[i]], value=-1)
        for coefficient, source in updates:
            work[i + 1 : last].addr_(coefficient[i, i + 1 : last], source[i])
    return steps.add_(grids.zeros(group_of[first:last]))


def _propagate(work: Tensor, updates: list[tuple[Tensor, Tensor]], first: int, last: int, stop: int) -> None:
    """What columns first .. last-1 do to columns last .. stop-1."""
    if last < stop:
        for coefficient, source in updates:
            work[last:stop].addmm_(coefficient[first:last, last:stop].T, source[first:last])


def _cuts(start: int, stop: int, size: int, period: int) -> Iterator[tuple[int, int]]:
    """Cut start .. stop into pieces of at most `size` that end wherever a multiple of `period` is reached."""
    while start < stop:
        end = min(start + size, (start // period + 1) * period, stop)
        yield start, end
        start = end


class _Grids:
    """The grids of a column loop: `scale` and `zero_point` [groups, rows], so that a column meets contiguous rows."""

    def __init__(self, rule: GridRule, scale: Tensor, zero_point: Tensor | None):
        self.rule, self.scale, self.zero_point = rule, scale, zero_point

    @classmethod
    def empty(cls, weight: Tensor, group_size: int, rule: GridRule) -> _Grids:
        scale = torch.empty(weight.shape[1] // group_size, weight.shape[0], device=weight.device)
        return cls(rule, scale, None if rule.symmetric else torch.empty_like(scale))

    @classmethod
    def fitted(cls, weight: Tensor, group_size: int, rule: GridRule) -> _Grids:
        grid = fit_grid(weight, group_size, rule)
        zero_point = None if grid.zero_point is None else grid.zero_point.float().T.contiguous()
        return cls(rule, grid.scale.float().T.contiguous(), zero_point)

    def fit(self, group: int, columns: Tensor) -> None:
        """Fit the grid of `group` to its columns [rows, group_size]."""
        scale, zero_point = fit_range(columns, self.rule)
        self.scale[group] = scale
        if self.zero_point is not None and zero_point is not None:
            self.zero_point[group] = zero_point

    def round(self, column: Tensor, group: int, out: Tensor) -> None:
        """Steps from zero to the grid value nearest to each entry of `column` [rows]."""
        torch.div(column, self.scale[group], out=out).round_()
        if self.zero_point is None:
            out.clamp_(-self.rule.middle, self.rule.max_code - self.rule.middle)
        else:
            zero = self.zero_point[group]
            torch.clamp(out, min=-zero, max=self.rule.max_code - zero, out=out)

    def zeros(self, groups: list[int]) -> Tensor | int:
        return self.rule.middle if self.zero_point is None else self.zero_point[groups]

    def result(self) -> Grid:
        zero_point = None if self.zero_point is None else self.zero_point.T.contiguous().int()
        return Grid(self.rule.bits, self.scale.T.contiguous().to(self.rule.scale_dtype), zero_point)


def _compress_site(site: str, layers: list[Layer], statistics: SiteStatistics) -> dict[str, Outcome]:
    """Layers with calibrated inputs. Those with equal settings share a loop, those with equal damping and order a factor."""
    hessian = statistics[SecondMoment()]
    dead = hessian.diagonal() == 0
    curvatures: dict[object, Curvature | NumericsError] = {}
    outcomes: dict[str, Outcome] = {}
    for config, alike in _alike(layers):
        key = (config.damping, config.order, config.gptaq, config.group_size if config.order == "gar" else None)
        if key not in curvatures:
            try:
                curvatures[key] = _curvature(config, statistics, dead)
            except NumericsError as error:
                curvatures[key] = error
        curvature = curvatures[key]
        if isinstance(curvature, NumericsError):
            note = f"NOT CALIBRATED: {curvature}; it was rounded to nearest"
            outcomes |= {layer.name: round_layer(layer, (note,)) for layer in alike}
        else:
            outcomes |= _compress_alike(alike, config, curvature, statistics, dead)
    return outcomes


def _curvature(config: GPTQConfig, statistics: SiteStatistics, dead: Tensor) -> Curvature:
    """Raises: NumericsError if the whole ladder fails."""
    hessian = statistics[SecondMoment()]
    diagonal = hessian.diagonal()
    order = None
    if config.order != "none":
        order = act_order(diagonal) if config.order == "act" else group_aware_order(diagonal, config.group_size)
    if dead.any():
        hessian = hessian.clone()
        hessian.diagonal()[dead] = diagonal[~dead].mean() if not dead.all() else 1.0
    if order is not None:
        hessian = hessian[order][:, order]
    factor = inverse_factor(hessian, config.damping)
    if not config.gptaq:
        return Curvature(factor, order, None)
    cross = statistics[CrossMoment()].to(factor.upper.dtype, copy=True)
    cross[:, dead] = 0
    if order is not None:
        cross = cross[order][:, order]
    return Curvature(factor, order, config.gptaq * (cross @ factor.upper.T).triu_(1) @ factor.upper)


def _compress_alike(
    layers: list[Layer], config: GPTQConfig, curvature: Curvature, statistics: SiteStatistics, dead: Tensor
) -> dict[str, Outcome]:
    hessian = statistics[SecondMoment()].float()
    pieces: dict[str, list[_Piece]] = {layer.name: [] for layer in layers}
    for batch in _batches(layers):
        weight = torch.cat([layer.weight[rows] for layer, rows in batch])
        weight[:, dead] = 0
        try:
            rounded = gptq(
                weight,
                curvature.factor.upper,
                grid_rule(layers[0]),
                config.group_size,
                curvature.order,
                static_grid=config.order == "act",
                block_size=config.block_size,
                feedback=curvature.feedback,
            )
        except NumericsError as error:
            raise NumericsError(f"{', '.join(layer.name for layer, _ in batch)}: {error}") from None
        difference = weight - rounded.grid.decode(rounded.codes)
        if curvature.feedback is None:  # the loop's own loss, less what damping adds to it
            loss = rounded.loss - curvature.factor.added * difference.square().sum(1)
        else:
            loss = row_energy(difference, hessian)
        energy = row_energy(weight, hessian)
        start = 0
        for layer, rows in batch:
            mine = slice(start, start + rows.stop - rows.start)
            start = mine.stop
            figures = (float(loss[mine].double().sum()), float(energy[mine].double().sum()))
            pieces[layer.name].append(_Piece(rounded.codes[mine], rounded.grid.rows(mine), *figures))
    return {layer.name: _outcome(layer, pieces[layer.name], curvature, statistics, dead) for layer in layers}


@dataclass(frozen=True)
class _Piece:
    """Some rows of a layer, rounded; tr((W - Q) H (W - Q)^T) and tr(W H W^T) of those rows."""

    codes: Tensor
    grid: Grid
    loss: float
    energy: float


def _outcome(
    layer: Layer, pieces: list[_Piece], curvature: Curvature, statistics: SiteStatistics, dead: Tensor
) -> Outcome:
    """Report: `loss`, mean over the calibration tokens of |W x - Q x|^2; `relative_error`, that over the mean of |W x|^2."""
    n_tokens, n_dead = statistics.n_tokens, int(dead.sum())
    loss = max(sum(piece.loss for piece in pieces), 0.0)  # rounding errors may exceed a loss of next to nothing
    energy = sum(piece.energy for piece in pieces)
    report = {
        "loss": loss / n_tokens,
        "relative_error": loss / energy if energy > 0 else 0.0,
        "damping": curvature.factor.damping,
        "n_tokens": float(n_tokens),
        "n_dead": float(n_dead),
    }
    notes = []
    asked, used = layer.config.damping, curvature.factor.damping
    if used > asked:
        notes.append(
            f"damping raised from {asked:g} to {used:.3g} of the mean diagonal in {curvature.factor.n_attempts} attempts: "
            f"the second moment of the inputs is not positive definite; calibrate on more, and more varied, tokens"
        )
    if n_tokens < layer.weight.shape[1]:
        notes.append(f"calibrated on {n_tokens} tokens for {layer.weight.shape[1]} inputs: too few to know them all")
    if n_dead:
        notes.append(f"{n_dead} of {dead.numel()} inputs were 0 on every calibration token: their weights are now 0")
    codes = torch.cat([piece.codes for piece in pieces])
    return Outcome(quantized_module(layer, codes, Grid.cat([piece.grid for piece in pieces])), report, notes)


def _alike(layers: list[Layer]) -> list[tuple[GPTQConfig, list[Layer]]]:
    """Layers by equal settings, in the order in which these first occur."""
    found: dict[object, list[Layer]] = {}
    for layer in layers:
        found.setdefault((layer.config, layer.scale_dtype), []).append(layer)
    return [(alike[0].config, alike) for alike in found.values()]


def _batches(layers: list[Layer]) -> Iterator[list[tuple[Layer, slice]]]:
    """Rows of `layers`, end to end, MAX_ROWS at a time."""
    batch: list[tuple[Layer, slice]] = []
    room = MAX_ROWS
    for layer in layers:
        start, n_rows = 0, layer.weight.shape[0]
        while start < n_rows:
            stop = min(start + room, n_rows)
            batch.append((layer, slice(start, stop)))
            room -= stop - start
            start = stop
            if room == 0:
                yield batch
                batch, room = [], MAX_ROWS
    if batch:
        yield batch
