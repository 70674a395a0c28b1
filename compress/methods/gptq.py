"""GPTQ: round column by column, and let the columns not yet rounded make good the error of those that are.

    minimise  tr((W - Q) H (W - Q)^T),   H = sum_t x_t x_t^T,   Q on an integer grid

H is damped, H_d = H + damping * mean(diag H) * I, and factored once per site, H_d^-1 = U^T U, U upper triangular
(compress/linalg/cholesky.py). Then for each column i, in order (compress/linalg/error_feedback.py):

    q_i = nearest grid value of w_i;   r_i = w_i - q_i;   w_j -= r_i U[i, j] / U[i, i]  for all j > i

Rows are independent: all layers of a site with equal settings run through one loop, 8192 rows at a time.

Order of the columns (compress/linalg/order.py): "act", largest inputs first, gives 6 to 19 % less loss than "none" on a
trained model; "gar", the same within groups and among groups, about half of that gain. None of them needs an index at
inference, since grids are fitted on the original weights and a column keeps its group (`static_groups`). The paper fits
a group's grid when its turn comes, on columns that have taken up the errors of those before: possible with "none" and
"gar", a draw at 4 bits and worse at 3 and 2, where those errors widen the range. Figures: scripts/bench_faithful.py.

Departures from the original code: dead inputs get the mean of the diagonal, not 1, so that the scale of H changes
nothing; they are dropped before grids are fitted; scales are rounded to their stored dtype first; static grids and
act-order are the default.

A weight that an earlier step pruned stays 0: q_i = 0 there, and what the columns before fed back to it is fed on with its
own error. `prune` followed by this is not SparseGPT, which prunes and rounds in one loop (compress/methods/prune.py).

GPTAQ ("asymmetric calibration", experimental): the inputs x come from compressed layers; x~ are the original model's.
To match W x~ rather than W x, each column, before it is rounded, also adds to the later ones

    w_j += w_i P[i, j],   P = alpha * triu(D U^T, 1) U,   D = sum_t (x~_t - x_t) x_t^T

Sources: Frantar et al., 2022, arXiv:2210.17323; Gafni et al., 2025, arXiv:2505.14638 (gar); Li et al., 2025,
arXiv:2504.02692 (GPTAQ).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compress.calibration.statistics import CrossMoment, Request, SecondMoment, SiteStatistics
from compress.errors import NumericsError
from compress.linalg.cholesky import InverseFactor, inverse_factor
from compress.linalg.error_feedback import round_columns
from compress.linalg.grid import Grid
from compress.linalg.order import act_order, group_aware_order
from compress.linalg.quadratic import row_energy
from compress.methods.base import Layer, LayerShape, Outcome, SiteTask
from compress.methods.bit_widths import MixedWidths
from compress.methods.rtn import RTNConfig, check_weight, grid_rule, quantized_module, quantized_spec, round_layer
from compress.modules.quantized_spec import QuantizedSpec

MAX_ROWS = 8192  # rows per loop: enough to hide Python's cost per column, few enough to stay near the caches
MAX_ENTRIES = 2**27  # of W per loop: bounds the memory where inputs are many
NO_TOKENS = "NOT CALIBRATED: no calibration token reached this layer; it was rounded to nearest"


class GPTQConfig(RTNConfig):
    damping: float = Field(0.01, gt=0, lt=1, description="fraction of the mean of diag(H) that is added to diag(H)")
    order: Literal["none", "act", "gar"] = Field(
        "act", description="order of the columns: as stored; largest inputs first; the same, but keeping groups whole"
    )
    static_groups: bool = Field(
        True, description="fit grids on the original weights; false: on the weights as updated so far, as in the paper"
    )
    block_size: int = Field(128, ge=1, description="columns between updates of the whole matrix; changes speed only")
    gptaq: float = Field(
        0.0,
        ge=0,
        le=1,
        description="experimental: strength of matching the original model's outputs; 0 off, 0.25 usual",
    )

    @model_validator(mode="after")
    def _groups_whole(self) -> GPTQConfig:
        if self.order == "act" and not self.static_groups and self.group_size != -1:
            raise ValueError(
                "order=act with static_groups=false would need an index per column at inference; "
                "use order=gar, or static_groups=true"
            )
        return self


class GPTQ(MixedWidths):
    name = "gptq"
    summary = "second-order rounding with error feedback: integer weights of 2 to 8 bits"
    Config = GPTQConfig
    keeps_masks = True

    @classmethod
    def plan(cls, shape: LayerShape, config: GPTQConfig) -> QuantizedSpec:
        return quantized_spec(shape, config)

    @classmethod
    def in_multiple(cls, config: GPTQConfig) -> int:
        return max(config.group_size, 1)

    @classmethod
    def statistics(cls, config: GPTQConfig) -> tuple[Request, ...]:
        return (SecondMoment(), CrossMoment()) if config.gptaq else (SecondMoment(),)

    @classmethod
    def workspace(cls, shapes: tuple[LayerShape, ...], config: GPTQConfig) -> int:
        n = max(s.in_features for s in shapes)
        n_rows = sum(s.out_features for s in shapes)
        squares = 7 if config.gptaq else 3  # of the size of H: its factor, and the one it is made from
        return 4 * squares * n * n + min(n_rows, rows_per_loop(n)) * n * 18 + n_rows * n

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
                outcomes[layer.name] = round_layer(layer, (NO_TOKENS,), site.continuous)
            else:
                check_weight(layer)
                with_inputs.append(layer)
        if with_inputs:
            assert statistics is not None
            outcomes |= _compress_site(with_inputs, statistics, site.continuous)
        return {layer.name: outcomes[layer.name] for layer in site.layers}


@dataclass(frozen=True)
class Curvature:
    """What one damping and one order make of a site's statistics.

    `upper` and `feedback` (P of GPTAQ, or None) have rows and columns in `order`; `order` is None for the natural one.
    """

    factor: InverseFactor
    order: Tensor | None
    feedback: Tensor | None


def _compress_site(layers: list[Layer], statistics: SiteStatistics, continuous: bool) -> dict[str, Outcome]:
    """Layers with calibrated inputs: equal settings share a loop, equal damping and order a factor."""
    statistics.require_finite(f"{', '.join(layer.name for layer in layers)}: gptq")
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
            outcomes |= {layer.name: round_layer(layer, (note,), continuous) for layer in alike}
        else:
            outcomes |= _compress_alike(alike, config, curvature, statistics, dead, continuous)
    return outcomes


def _curvature(config: GPTQConfig, statistics: SiteStatistics, dead: Tensor) -> Curvature:
    """Raises: NumericsError if the whole ladder fails."""
    hessian = statistics[SecondMoment()]
    diagonal = hessian.diagonal()
    order = None
    if config.order != "none":
        order = act_order(diagonal) if config.order == "act" else group_aware_order(diagonal, config.group_size)
    if dead.any():
        diagonal = diagonal.clone()
        diagonal[dead] = diagonal[~dead].mean() if not dead.all() else 1.0
    factor = inverse_factor(hessian, config.damping, order, diagonal)
    if not config.gptaq:
        return Curvature(factor, order, None)
    cross = statistics[CrossMoment()].to(factor.upper.dtype, copy=True)
    cross[:, dead] = 0
    if order is not None:
        cross = cross[order][:, order]
    return Curvature(factor, order, config.gptaq * asymmetric_feedback(cross, factor.upper))


def asymmetric_feedback(cross: Tensor, upper: Tensor) -> Tensor:
    """P of GPTAQ at alpha = 1: P[i, i+1:] is what columns i+1 .. do best in place of w_i (x~_i - x_i).

    Args:
        cross: D [in, in], sum_t (x~_t - x_t) x_t^T.
        upper: U [in, in]; both in the same order.
    """
    return (cross @ upper.T).triu_(1) @ upper


def _compress_alike(
    layers: list[Layer],
    config: GPTQConfig,
    curvature: Curvature,
    statistics: SiteStatistics,
    dead: Tensor,
    continuous: bool,
) -> dict[str, Outcome]:
    hessian = statistics[SecondMoment()].float()
    pieces: dict[str, list[_Piece]] = {layer.name: [] for layer in layers}
    for batch in _batches(layers):
        weight = torch.cat([layer.weight[rows] for layer, rows in batch])
        weight[:, dead] = 0
        mask = _mask(batch)
        try:
            rounded = round_columns(
                weight,
                curvature.factor.upper,
                grid_rule(layers[0]),
                config.group_size,
                curvature.order,
                static_groups=config.static_groups,
                block_size=config.block_size,
                feedback=curvature.feedback,
                mask=mask,
                continuous=continuous,
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
            before = None if rounded.continuous is None else rounded.continuous[mine]
            pieces[layer.name].append(_Piece(rounded.codes[mine], rounded.grid.rows(mine), *figures, before))
    return {layer.name: _outcome(layer, pieces[layer.name], curvature, statistics, dead) for layer in layers}


def _mask(batch: list[tuple[Layer, slice]]) -> Tensor | None:
    """Where the rows may differ from 0: [rows, in]; None: everywhere."""
    if all(layer.mask is None for layer, _ in batch):
        return None
    rows = [
        torch.ones_like(layer.weight[rows], dtype=torch.bool) if layer.mask is None else layer.mask[rows]
        for layer, rows in batch
    ]
    return torch.cat(rows)


@dataclass(frozen=True)
class _Piece:
    """Some rows of a layer, rounded; tr((W - Q) H (W - Q)^T) and tr(W H W^T) of those rows."""

    codes: Tensor
    grid: Grid
    loss: float
    energy: float
    continuous: Tensor | None


def _outcome(
    layer: Layer, pieces: list[_Piece], curvature: Curvature, statistics: SiteStatistics, dead: Tensor
) -> Outcome:
    """Report: `loss`, the mean over tokens of |W x - Q x|^2; `relative_error`, that over the mean of |W x|^2."""
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
            f"damping raised from {asked:g} to {used:.3g} in {curvature.factor.n_attempts} attempts: the second moment "
            f"of the inputs is not positive definite; calibrate on more, and more varied, tokens"
        )
    if n_tokens < layer.weight.shape[1]:
        notes.append(f"calibrated on {n_tokens} tokens for {layer.weight.shape[1]} inputs: too few to know them all")
    if n_dead:
        notes.append(f"{n_dead} of {dead.numel()} inputs were 0 on every calibration token: their weights are now 0")
    codes = torch.cat([piece.codes for piece in pieces])
    before = [piece.continuous for piece in pieces if piece.continuous is not None]
    module = quantized_module(layer, codes, Grid.cat([piece.grid for piece in pieces]))
    return Outcome(module, report, notes, continuous=torch.cat(before) if before else None)


def _alike(layers: list[Layer]) -> list[tuple[GPTQConfig, list[Layer]]]:
    """Layers by equal settings, in the order in which these first occur."""
    found: dict[object, list[Layer]] = {}
    for layer in layers:
        found.setdefault((layer.config, layer.scale_dtype), []).append(layer)
    return [(alike[0].config, alike) for alike in found.values()]


def rows_per_loop(in_features: int) -> int:
    """How many rows one column loop takes."""
    return max(1, min(MAX_ROWS, MAX_ENTRIES // in_features))


def _batches(layers: list[Layer]) -> Iterator[list[tuple[Layer, slice]]]:
    """Rows of `layers`, end to end, `rows_per_loop` at a time."""
    batch: list[tuple[Layer, slice]] = []
    full = rows_per_loop(layers[0].weight.shape[1])
    room = full
    for layer in layers:
        start, n_rows = 0, layer.weight.shape[0]
        while start < n_rows:
            stop = min(start + room, n_rows)
            batch.append((layer, slice(start, stop)))
            room -= stop - start
            start = stop
            if room == 0:
                yield batch
                batch, room = [], full
    if batch:
        yield batch
