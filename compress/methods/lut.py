"""Look-up tables: every weight becomes one of 4, 8 or 16 values that need not lie at equal distances.

    w' = T[q] * s        one table, a scale per row and group: NormalFloat, or k-means of the layer's weights over their scales
    w' = T_o[q]          a table per output row: weighted k-means of the row

    minimise  tr((W - Q) H (W - Q)^T),   H = sum_t x_t x_t^T

in steps, of which each may be left out:

    match    The inputs x come from compressed layers; x~ are the original model's. W x comes closest to W x~ with
             W + W D H_d^-1 in place of W, D = sum_t (x~_t - x_t) x_t^T: the least-squares solution, to which H_d holds it back.
             With `match` that far towards it, this is what the steps below take for W. GPTAQ has the same aim, and changes
             columns in its loop (compress/methods/gptq.py).
    tables   Scales and k-means minimise sum_i h_i (w_i - w'_i)^2 with h the diagonal of H, the mean square of each input
             (compress/linalg/lookup.py, kmeans.py). SqueezeLLM takes the diagonal of the Fisher information, the mean of
             (dLoss/dw)^2, which needs a backward pass through the model for every calibration row; our statistics are of
             inputs only.
    codes    GPTQ's column loop with the nearest value of the table in place of the nearest integer
             (compress/linalg/error_feedback.py).
    refit    Alternate: values (of tables per row) or scales by least squares on all of H, at most 16 unknowns or one per group
             for each row; then one sweep of coordinate descent over the codes (compress/linalg/lookup_refit.py). The loss
             never rises.

Sources: Dettmers et al., 2023, arXiv:2305.14314 (NormalFloat); Kim et al., 2023, arXiv:2306.07629 (SqueezeLLM); Frantar et
al., 2022, arXiv:2210.17323 (GPTQ); Behdin et al., 2023, arXiv:2309.01885 (coordinate descent).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from compress.calibration.statistics import CrossMoment, Request, SecondMoment, SiteStatistics
from compress.errors import NumericsError, RecipeError
from compress.linalg.cholesky import InverseFactor, inverse_factor
from compress.linalg.error_feedback import cuts, round_onto
from compress.linalg.lookup import Lookup, LookupColumns, ScaleRule, fit_scales, fit_table, fit_tables, normal_float
from compress.linalg.lookup_refit import refit
from compress.linalg.order import act_order, group_aware_order, inverse_order
from compress.linalg.quadratic import row_energy
from compress.methods.base import Kept, Layer, LayerShape, MethodConfig, Outcome, SiteMethod, SiteTask
from compress.methods.bit_widths import TOGETHER_MEANING, WIDTHS_MEANING, MixedWidths
from compress.methods.gptq import rows_per_loop
from compress.methods.rtn import check_weight, divisors
from compress.modules.lut import LUTLinear
from compress.modules.lut_spec import MAX_BITS, MIN_BITS, LUTSpec

GROUP_SIZE = 64  # where none is given and there are scales
NO_TOKENS = (
    "NOT CALIBRATED: no calibration token reached this layer; every weight took the nearest value, all inputs alike"
)


class LUTConfig(MethodConfig):
    bits: int = Field(4, ge=MIN_BITS, le=MAX_BITS, description="bits per weight; a table has 2^bits values")
    table: Literal["normal_float", "kmeans"] = Field(
        "kmeans", description="NormalFloat's quantiles of a normal distribution; or k-means of the weights themselves"
    )
    group_size: int | None = Field(
        None,
        ge=-1,
        description="neighbouring inputs that share a scale; divides in_features; -1: one scale per row. Left out: 64 for "
        "normal_float; for kmeans a table per row, and no scales",
    )
    scales: Literal["fitted", "absmax"] = Field(
        "fitted",
        description="least squares in turn with the codes; or the largest weight of the group on an end of the table",
    )
    sensitivity: Literal["activations", "none"] = Field(
        "activations",
        description="what errors are weighed with while tables and scales are fitted: mean squares of the inputs",
    )
    error_feedback: bool = Field(True, description="GPTQ's column loop; false: every weight takes the nearest value")
    refit: int = Field(
        3, ge=0, description="rounds of tables or scales by least squares on the second moment, and codes anew; 0: none"
    )
    order: Literal["none", "act", "gar"] = Field(
        "act",
        description="of the columns in the loop: as stored; largest inputs first; the same, but keeping groups whole",
    )
    static_groups: bool = Field(
        True,
        description="fit scales on the original weights; false: on the weights as updated so far, as in GPTQ's paper",
    )
    match: float = Field(
        0.0,
        ge=0,
        le=1,
        description="strength of matching what the original model's inputs would give; 0: the layer as it is",
    )
    damping: float = Field(0.01, gt=0, lt=1, description="fraction of the mean of diag(H) that is added to diag(H)")
    block_size: int = Field(128, ge=1, description="columns between updates of the whole matrix; changes speed only")
    widths: tuple[Annotated[int, Field(ge=MIN_BITS, le=MAX_BITS)], ...] | None = Field(
        None, min_length=1, description=WIDTHS_MEANING
    )
    together: bool = Field(True, description=TOGETHER_MEANING)

    @field_validator("group_size")
    @classmethod
    def _not_zero(cls, group_size: int | None) -> int | None:
        if group_size == 0:
            raise ValueError(
                "group_size=0 is no group; use -1 for one scale per row, or a size that divides in_features"
            )
        return group_size

    @model_validator(mode="after")
    def _together(self) -> LUTConfig:
        if not self.groups and (self.scales == "absmax" or not self.static_groups):
            what = "scales: absmax" if self.scales == "absmax" else "static_groups: false"
            raise ValueError(f"table=kmeans without group_size has no scales for {what}; give a group_size, or drop it")
        if self.order == "act" and not self.static_groups and self.groups != -1:
            raise ValueError(
                "order=act with static_groups=false would need an index per column at inference; use order=gar, or "
                "static_groups=true"
            )
        return self

    @property
    def groups(self) -> int:
        """`group_size` as in the spec: 0 for tables per row."""
        if self.group_size is not None:
            return self.group_size
        return 0 if self.table == "kmeans" else GROUP_SIZE

    @property
    def calibrated(self) -> bool:
        """Whether it looks at inputs."""
        weighed = self.sensitivity != "none" and (self.table == "kmeans" or self.scales == "fitted")
        return weighed or self.curved

    @property
    def curved(self) -> bool:
        """Whether it needs the second moment as a whole."""
        return self.error_feedback or self.refit > 0 or self.match > 0


class LUT(MixedWidths):
    name = "lut"
    summary = "look-up tables: 4, 8 or 16 values at any distances, by NormalFloat or k-means, with error feedback"
    Config = LUTConfig

    @classmethod
    def plan(cls, shape: LayerShape, config: LUTConfig) -> LUTSpec | Kept:
        if shape.kind != "linear":
            raise RecipeError(f"{shape.name}: lut is for linears, not for tables; leave it out of layers")
        size = config.groups
        if size > 0 and shape.in_features % size:
            usable = divisors(shape.in_features, near=size)
            raise RecipeError(
                f"{shape.name}: group_size={size} does not divide in_features={shape.in_features}; use one of {usable}, or -1 "
                f"for one scale per row"
            )
        spec = LUTSpec(shape.in_features, shape.out_features, config.bits, size)
        taken = spec.nbytes("BF16") * 8 / (shape.in_features * shape.out_features)
        if taken >= 16:
            return Kept(f"codes and tables would take {taken:.1f} of 16 bits per weight")
        return spec

    @classmethod
    def in_multiple(cls, config: LUTConfig) -> int:
        return max(config.groups, 1)

    @classmethod
    def statistics(cls, config: LUTConfig) -> tuple[Request, ...]:
        if config.match and not cls.observes(config):
            return (SecondMoment(), CrossMoment())
        return (SecondMoment(),) if config.calibrated or cls.observes(config) else ()

    @classmethod
    def probe(cls, config: LUTConfig) -> tuple[type[SiteMethod], LUTConfig]:
        return cls, config.model_copy(update={"match": 0.0})  # inputs are the original's there

    @classmethod
    def workspace(cls, shapes: tuple[LayerShape, ...], config: LUTConfig) -> int:
        n, n_rows = max(s.in_features for s in shapes), max(s.out_features for s in shapes)
        squares = 3 * config.error_feedback + (config.refit > 0)
        values = 2 ** max(config.widths or (config.bits,))
        systems = n_rows * max(n // max(config.groups, 1) if config.groups > 0 else 1, values) ** 2
        per_entry = 64 if config.refit else 26
        return 4 * squares * n * n + min(n_rows, rows_per_loop(n)) * n * per_entry + 16 * systems * (config.refit > 0)

    @classmethod
    def flops(cls, shapes: tuple[LayerShape, ...], config: LUTConfig) -> float:
        n, n_rows = max(s.in_features for s in shapes), sum(s.out_features for s in shapes)
        values = 2**config.bits
        fits = 600.0 * values if config.groups == 0 else 1000.0
        sweep = 2.0 * n + 200
        rounds = config.refit * (3 * sweep + 2.0 * n * (values if config.groups == 0 else 1))
        return float(n) ** 3 * config.error_feedback + n_rows * n * (fits + sweep * config.error_feedback + rounds)

    @classmethod
    def compress(
        cls, site: SiteTask, statistics: SiteStatistics | None, generator: torch.Generator
    ) -> dict[str, Outcome]:
        known = SiteStatistics.usable(statistics, f"{', '.join(layer.name for layer in site.layers)}: lut")
        curvatures: dict[object, _Curvature | NumericsError] = {}
        outcomes = {}
        for layer in site.layers:
            check_weight(layer)
            try:
                if known is None:
                    outcomes[layer.name] = _without_inputs(layer)
                else:
                    outcomes[layer.name] = _calibrated(layer, known, curvatures, site)
            except NumericsError as error:
                raise NumericsError(f"{layer.name}: lut: {error}") from None
        return outcomes


@dataclass(frozen=True)
class _Curvature:
    """What one damping and one order make of a site's statistics. `hessian`: H_d in natural order."""

    factor: InverseFactor
    order: Tensor | None
    hessian: Tensor


def _without_inputs(layer: Layer) -> Outcome:
    """Report: `weight_error`, ||W' - W||^2 / ||W||^2."""
    weight, config = layer.weight, layer.config
    lookup = _fitted(layer, weight, torch.ones_like(weight[0]))
    codes = lookup.encode(weight)
    squared = float(weight.square().sum())
    error = float((lookup.decode(codes) - weight).square().sum())
    report = {"weight_error": error / squared if squared else 0.0}
    return Outcome(_module(layer, lookup, codes), report, [NO_TOKENS] if config.calibrated else [])


def _calibrated(
    layer: Layer, statistics: SiteStatistics, curvatures: dict[object, _Curvature | NumericsError], site: SiteTask
) -> Outcome:
    """Report: `loss`, the mean over tokens of |W x - Q x|^2, and `loss_start`, before the refit; `relative_error`, the loss over
    the mean of |W x|^2."""
    config: LUTConfig = layer.config
    hessian = statistics[SecondMoment()].float()
    dead = hessian.diagonal() == 0
    weight = layer.weight.clone()
    weight[:, dead] = 0
    notes, curvature = [], None
    if config.curved:
        key = (config.damping, config.order, config.groups if config.order == "gar" else None)
        if key not in curvatures:
            curvatures[key] = _curvature(config, hessian, dead)
        found = curvatures[key]
        if isinstance(found, NumericsError):
            notes.append(f"NOT CALIBRATED: {found}; every weight took the nearest value")
        else:
            curvature = found
    if curvature is not None and config.match:
        weight += config.match * _missing(weight, statistics[CrossMoment()].float(), curvature, dead)
    unweighted = config.sensitivity == "none"
    sensitivity = torch.ones_like(weight[0]) if unweighted else hessian.diagonal() / statistics.n_tokens
    lookup = _fitted(layer, weight, sensitivity)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    pieces, start = [], 0.0
    for first, last in cuts(0, len(weight), rows_per_loop(weight.shape[1])):
        piece = lookup.rows(slice(first, last))
        piece, codes[first:last] = _coded(weight[first:last], piece, config, curvature, sensitivity)
        start += _loss(weight[first:last], piece, codes[first:last], hessian)
        if curvature is not None and config.refit:
            site.tell(f"{layer.name}: refit of rows {first} to {last - 1}")
            piece, codes[first:last], _ = refit(
                weight[first:last], curvature.hessian, piece, codes[first:last], config.refit
            )
        pieces.append(piece)
    lookup = Lookup.cat(pieces)
    loss, energy = _loss(weight, lookup, codes, hessian), float(row_energy(weight, hessian).double().sum())
    n_tokens, n_dead = statistics.n_tokens, int(dead.sum())
    report = {
        "loss": loss / n_tokens,
        "loss_start": start / n_tokens,
        "relative_error": loss / energy if energy > 0 else 0.0,
        "n_tokens": float(n_tokens),
        "n_dead": float(n_dead),
    }
    if curvature is not None:
        report["damping"] = curvature.factor.damping
        if curvature.factor.damping > config.damping:
            notes.append(
                f"damping raised from {config.damping:g} to {curvature.factor.damping:.3g}: the second moment of the inputs is "
                f"not positive definite; calibrate on more, and more varied, tokens"
            )
    if n_tokens < weight.shape[1]:
        notes.append(f"calibrated on {n_tokens} tokens for {weight.shape[1]} inputs: too few to know them all")
    if n_dead:
        notes.append(f"{n_dead} of {dead.numel()} inputs were 0 on every calibration token: their weights count as 0")
    return Outcome(_module(layer, lookup, codes), report, notes)


def _curvature(config: LUTConfig, hessian: Tensor, dead: Tensor) -> _Curvature | NumericsError:
    diagonal = hessian.diagonal()
    order = None
    if config.order != "none":
        order = (
            act_order(diagonal)
            if config.order == "act"
            else group_aware_order(diagonal, config.groups or len(diagonal))
        )
    if dead.any():
        diagonal = diagonal.clone()
        diagonal[dead] = diagonal[~dead].mean() if not dead.all() else 1.0
    try:
        factor = inverse_factor(hessian, config.damping, order, diagonal)
    except NumericsError as error:
        return error
    damped = hessian.clone()
    damped.diagonal().copy_(diagonal + factor.added)
    return _Curvature(factor, order, damped)


def _missing(weight: Tensor, cross: Tensor, curvature: _Curvature, dead: Tensor) -> Tensor:
    """W D H_d^-1, D = sum_t (x~_t - x_t) x_t^T: what would have to be added to W for W x to come closest to W x~."""
    upper, order = curvature.factor.upper, curvature.order
    found = weight @ cross
    found[:, dead] = 0
    if order is None:
        return found @ upper.T @ upper
    return (found[:, order] @ upper.T @ upper)[:, inverse_order(order)]


def _fitted(layer: Layer, weight: Tensor, sensitivity: Tensor) -> Lookup:
    """Tables, and scales where there are groups, for `weight` in place of the layer's."""
    config, dtype = layer.config, layer.scale_dtype
    size = weight.shape[1] if config.groups == -1 else config.groups
    if not size:
        return Lookup(fit_tables(weight, config.bits, sensitivity, dtype))
    if config.table == "normal_float":
        table = normal_float(config.bits).to(weight.device, dtype)
    else:
        table = fit_table(weight, config.bits, size, sensitivity, dtype)
    return Lookup(table, fit_scales(weight, size, ScaleRule(table, config.scales), sensitivity))


def _coded(
    weight: Tensor, lookup: Lookup, config: LUTConfig, curvature: _Curvature | None, sensitivity: Tensor
) -> tuple[Lookup, Tensor]:
    """Codes of some rows, and what they are on: other scales, if these follow the loop."""
    if curvature is None or not config.error_feedback:
        return lookup, lookup.encode(weight)
    n, order = weight.shape[1], curvature.order
    size = config.groups if config.groups > 0 else n
    levels = LookupColumns(lookup)
    if not config.static_groups:
        columns = torch.arange(n, device=weight.device) if order is None else order
        by_group = torch.empty(n // size, size, device=weight.device)
        by_group[columns[::size] // size] = sensitivity[columns].view(-1, size)
        levels = LookupColumns(lookup, ScaleRule(lookup.table, config.scales), by_group)
    rounded = round_onto(levels, weight, curvature.factor.upper, size, order, config.static_groups, config.block_size)
    return rounded.grid, rounded.codes


def _loss(weight: Tensor, lookup: Lookup, codes: Tensor, hessian: Tensor) -> float:
    """tr((W - Q) H (W - Q)^T)."""
    return max(float(row_energy(weight - lookup.decode(codes), hessian).double().sum()), 0.0)


def _module(layer: Layer, lookup: Lookup, codes: Tensor) -> LUTLinear:
    spec = LUT.plan(layer.shape, layer.config)
    assert isinstance(spec, LUTSpec)
    return LUTLinear.from_codes(codes, lookup.table, lookup.scale, spec, layer.bias)
