"""Prune: keep some weights of every linear and set the others to zero; the kept ones and their places are stored.

    pattern n:m    n of every m neighbouring inputs of a row: hardware knows 2:4
    sparsity s     round(s in) of the `in` weights of a row on average, anywhere

`score` says which are kept, those with the most of (compress/linalg/sparsity.py; h_i = mean over tokens of x_i^2):

    magnitude   |W_oi|                              no data
    wanda       |W_oi| sqrt(h_i)                    what a weight does to the outputs, were inputs uncorrelated    Wanda
    nowag       the same, squared, of a weight whose columns and then rows were brought to one norm                NoWag-P
    sparsegpt   w_oi^2 / U[i, i]^2                  what dropping it costs if later columns make good what they can,
                                                    and they do: W changes                                         SparseGPT

sparsegpt goes column by column, H_d^-1 = U^T U as in gptq.py, w being W with the errors of the columns before fed back
(compress/linalg/sparse_feedback.py). With H = I it is magnitude. The groups of a pattern may come in any order: as stored, as
in the paper, or those with the largest inputs first. Which of the two loses less depends on the layer; the loop knows what it
lost, so `order: best` tries both. It can round what it keeps in the same loop (`bits`), so that columns make good for both, on
gptq's grids: the loop runs without rounding first, then with grids fitted to what that leaves, then with grids fitted to W, as
in the public code; what loses less is taken.

Anywhere (`sparsity`), weights are compared within a row (Wanda), within the layer (magnitude, NoWag-P), or within
`block_size` columns (SparseGPT). The number kept is always the same, so that the plan knows the bytes.

An input that was 0 on every calibration token: its weights score 0 and go first. The kept ones among them stay as they are,
but for sparsegpt, which sets them to 0, as gptq does.

Departures from the public code: what storing a value in 16 bits costs is fed back too; of equal scores the first is kept,
where the code for unstructured SparseGPT and magnitude drops all that equal the threshold, one weight too many at least.

Sources: Frantar and Alistarh, 2023, arXiv:2301.00774 (SparseGPT); Sun et al., 2023, arXiv:2306.11695 (Wanda); Liu et al., 2025,
arXiv:2504.14569 (NoWag).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import lcm
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from compress.calibration.statistics import Request, SecondMoment, SiteStatistics, SquareSum
from compress.errors import NumericsError, RecipeError
from compress.linalg.cholesky import InverseFactor, inverse_factor
from compress.linalg.finite import all_finite
from compress.linalg.grid import Grid, GridRule, fit_grid
from compress.linalg.order import group_order
from compress.linalg.quadratic import energy, fraction
from compress.linalg.sparse_feedback import Pattern, Pruned, prune_columns
from compress.linalg.sparsity import highest, highest_of_groups, highest_of_rows, nowag_scores, wanda_scores
from compress.methods.base import Layer, LayerShape, MethodConfig, Outcome, SiteMethod, SiteTask
from compress.methods.rtn import check_weight, divisors
from compress.modules.quantized import QuantizedLinear, QuantizedModule
from compress.modules.sparse import SparseLinear
from compress.modules.sparse_spec import SparseSpec

LEAST_SPARSITY = 1 / 16  # below it a bit per weight for the places is more than is saved, with values of 16 bits
NOT_CALIBRATED = "NOT CALIBRATED: no calibration token reached this layer; it was pruned as by score=magnitude"


class PruneConfig(MethodConfig):
    score: Literal["magnitude", "wanda", "nowag", "sparsegpt"] = Field(
        "sparsegpt", description="what decides which weights are kept; sparsegpt also changes those"
    )
    pattern: str = Field("2:4", description="how many of how many neighbouring inputs of a row are kept")
    sparsity: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="in place of pattern: the fraction of weights that become 0, anywhere in the layer",
    )
    compare: Literal["row", "layer"] | None = Field(
        None,
        description="sparsity: weights are compared within their row or the whole layer; by default as in the paper of the score",
    )
    damping: float = Field(
        0.01, gt=0, lt=1, description="sparsegpt: fraction of the mean of diag(H) that is added to diag(H)"
    )
    order: Literal["none", "act", "best"] = Field(
        "best",
        description="sparsegpt with a pattern: groups as stored; largest inputs first; both, and for each layer what loses less",
    )
    block_size: int = Field(
        128, ge=1, description="sparsegpt: columns that are compared with each other if sparsity is set"
    )
    bits: int | None = Field(
        None, ge=2, le=8, description="sparsegpt: round what is kept to so many bits in the same loop"
    )
    group_size: int = Field(
        128,
        ge=-1,
        description="bits: neighbouring inputs that share a scale; divides in_features; -1: one scale per row",
    )
    clip: Literal["none", "mse"] = Field(
        "none", description="bits: 'mse' searches a narrower range with less rounding error"
    )

    @field_validator("pattern", mode="before")
    @classmethod
    def _written(cls, pattern: Any) -> Any:
        """YAML takes 2:4 without quotes for 2 minutes and 4 seconds: 124."""
        if isinstance(pattern, int) and not isinstance(pattern, bool) and pattern >= 0:
            return f"{pattern // 60}:{pattern % 60}"
        return pattern

    @field_validator("pattern")
    @classmethod
    def _possible(cls, pattern: str) -> str:
        found = re.fullmatch(r"(\d{1,6}):(\d{1,6})", pattern)
        if found is None:
            raise ValueError(f'pattern={pattern!r} is not of the form "2:4": how many are kept, of how many neighbours')
        n, m = int(found[1]), int(found[2])
        if not 0 < n < m:
            raise ValueError(
                f"pattern={pattern!r} prunes nothing or everything; the first number is how many are kept, at least 1 and less "
                f"than the second"
            )
        return f"{n}:{m}"

    @field_validator("group_size")
    @classmethod
    def _not_zero(cls, group_size: int) -> int:
        if group_size == 0:
            raise ValueError("group_size=0 is no group; use -1 for one scale per row")
        return group_size

    @model_validator(mode="after")
    def _together(self) -> PruneConfig:
        if self.bits is not None and self.score != "sparsegpt":
            raise ValueError(
                f"bits={self.bits} needs score=sparsegpt, which rounds as it prunes; after score={self.score} add a step that "
                f"rounds: gptq or rtn"
            )
        if self.compare is not None and (self.sparsity is None or self.score == "sparsegpt"):
            what = "score=sparsegpt compares within block_size columns" if self.sparsity else f"pattern={self.pattern}"
            raise ValueError(f"compare={self.compare} needs sparsity and another score than sparsegpt; here: {what}")
        return self

    @property
    def groups(self) -> tuple[int, int]:
        """n and m of the pattern; 0 and 0 for `sparsity`."""
        if self.sparsity is not None:
            return 0, 0
        n, _, m = self.pattern.partition(":")
        return int(n), int(m)


class Prune(SiteMethod):
    name = "prune"
    summary = (
        "weights become zero, 2:4, n:m or anywhere, by magnitude, Wanda, NoWag-P or SparseGPT; zeros are not stored"
    )
    Config = PruneConfig

    @classmethod
    def plan(cls, shape: LayerShape, config: PruneConfig) -> SparseSpec:
        if shape.kind != "linear":
            raise RecipeError(f"{shape.name}: prune is for linears, not for tables; leave it out of layers")
        n, m = config.groups
        spec = _anywhere(shape, config.sparsity) if config.sparsity is not None else _grouped(shape, n, m)
        if config.bits is None:
            return spec
        if config.group_size != -1 and shape.in_features % config.group_size:
            usable = divisors(shape.in_features, near=config.group_size)
            raise RecipeError(
                f"{shape.name}: group_size={config.group_size} does not divide in_features={shape.in_features}; "
                f"use one of {usable}, or -1 for one group per row"
            )
        return SparseSpec(spec.in_features, spec.out_features, spec.kept, n, m, config.bits, config.group_size)

    @classmethod
    def in_multiple(cls, config: PruneConfig) -> int:
        return lcm(max(config.groups[1], 1), max(config.group_size, 1) if config.bits else 1)

    @classmethod
    def statistics(cls, config: PruneConfig) -> tuple[Request, ...]:
        if config.score == "magnitude":
            return ()
        return (SecondMoment(),) if config.score == "sparsegpt" else (SquareSum(),)

    @classmethod
    def workspace(cls, shapes: tuple[LayerShape, ...], config: PruneConfig) -> int:
        n, size = max(s.in_features for s in shapes), max(s.out_features * s.in_features for s in shapes)
        if config.score == "sparsegpt":
            return 4 * 4 * n * n + 42 * size  # factors of two orders; the loop, twice its outcome, and scores
        return 24 * size  # scores; their order in 64 bits, or the masks of ties

    @classmethod
    def flops(cls, shapes: tuple[LayerShape, ...], config: PruneConfig) -> float:
        n, n_rows = max(s.in_features for s in shapes), sum(s.out_features for s in shapes)
        if config.score == "sparsegpt":
            n_loops = (2 if config.order == "best" and config.groups[1] else 1) + (2 if config.bits else 0)
            return n_loops * (float(n) ** 3 + n_rows * n * (2.0 * n + 600))
        return 500.0 * n_rows * n

    @classmethod
    def compress(
        cls, site: SiteTask, statistics: SiteStatistics | None, generator: torch.Generator
    ) -> dict[str, Outcome]:
        known = SiteStatistics.usable(statistics, f"{', '.join(layer.name for layer in site.layers)}: prune")
        factors: dict[object, _Factor] = {}
        outcomes = {}
        for layer in site.layers:
            check_weight(layer)
            try:
                if known is not None and layer.config.score == "sparsegpt":
                    outcomes[layer.name] = _with_feedback(layer, known, factors)
                else:
                    outcomes[layer.name] = _masked(layer, known)
            except NumericsError as error:
                raise NumericsError(f"{layer.name}: prune: {error}") from None
        return outcomes


def _grouped(shape: LayerShape, n: int, m: int) -> SparseSpec:
    """n of every m. Raises: RecipeError if m does not divide the inputs."""
    width = shape.in_features
    if width % m:
        near = _nearest_pattern(width, n, m)
        instead = "sparsity in place of pattern" if near is None else f'"{near}", or sparsity in place of pattern'
        raise RecipeError(
            f"{shape.name}: pattern={n}:{m} does not divide in_features={width}; use {instead}, or skip it"
        )
    return SparseSpec.of_pattern(width, shape.out_features, n, m)


def _nearest_pattern(width: int, n: int, m: int) -> str | None:
    """The pattern with groups of at most 64 that fits `width` and keeps nearly as much; of equal ones, groups most like m."""
    found = [(k, d) for d in range(2, min(width, 64) + 1) if width % d == 0 for k in range(1, d)]
    if not found:
        return None
    k, d = min(found, key=lambda kd: (abs(kd[0] / kd[1] - n / m), abs(kd[1] - m)))
    return f"{k}:{d}"


def _anywhere(shape: LayerShape, sparsity: float) -> SparseSpec:
    """Any places. Raises: RecipeError for a sparsity that no whole number of weights has, or that saves nothing."""
    width = shape.in_features
    least = int(LEAST_SPARSITY * width) + 1
    if width <= least:
        raise RecipeError(f"{shape.name}: in_features={width} is too few to prune; skip it")
    n_pruned = round(sparsity * width)
    if not least <= n_pruned < width:
        nearest = (least if n_pruned < least else width - 1) / width
        reason = (
            f"saves less than the places of the kept weights take, one bit per weight ({LEAST_SPARSITY:.2%})"
            if n_pruned < least
            else "leaves less than one weight per row"
        )
        raise RecipeError(
            f"{shape.name}: sparsity={sparsity:g} {reason}; the nearest that works with in_features={width} is {nearest:.4g}"
        )
    return SparseSpec(width, shape.out_features, shape.out_features * (width - n_pruned))


def _masked(layer: Layer, known: SiteStatistics | None) -> Outcome:
    """The weights with the highest scores, as they are."""
    config: PruneConfig = layer.config
    spec = Prune.plan(layer.shape, config)
    notes = [] if known is not None or config.score == "magnitude" else [NOT_CALIBRATED]
    squares, score = None, "magnitude"
    if known is not None and config.score != "magnitude":
        squares, score = known[SquareSum()].to(layer.weight.device), config.score
    mask = _mask(_scores(layer.weight, squares, score), spec, config)
    module = _module(layer, layer.weight, mask, spec)
    if config.bits is not None:  # sparsegpt without inputs
        grid = fit_grid(layer.weight * mask, config.group_size, _rule(layer))
        module = _quantized(module, spec, grid.encode(layer.weight * mask), grid, layer.bias)
    report = _weight_error(layer.weight, module)
    if squares is not None and known is not None:
        difference = (layer.weight - module.dense(torch.float32)).square_()
        lost, whole = float((difference @ squares).sum()), float((layer.weight.square() @ squares).sum())
        report |= {"diagonal_error": fraction(lost, whole), "n_tokens": float(known.n_tokens)}
        notes += _dead_note(squares == 0, report)
    return Outcome(module, report, notes)


def _scores(weight: Tensor, squares: Tensor | None, score: str) -> Tensor:
    if squares is None:
        return weight.abs()
    return wanda_scores(weight, squares) if score == "wanda" else nowag_scores(weight, squares)


def _mask(scores: Tensor, spec: SparseSpec, config: PruneConfig) -> Tensor:
    if spec.m:
        return highest_of_groups(scores, spec.n, spec.m)
    within = config.compare or ("row" if config.score == "wanda" else "layer")
    return highest_of_rows(scores, spec.kept // spec.out_features) if within == "row" else highest(scores, spec.kept)


@dataclass(frozen=True)
class _Factor:
    """U of a site in one order of its columns; None is the natural one."""

    inverse: InverseFactor
    order: Tensor | None


def _factor(config: PruneConfig, act: bool, hessian: Tensor, made: dict[object, _Factor]) -> _Factor:
    """One that was `made`, or a new one, which joins them."""
    key = (config.damping, config.groups[1] if act else None)
    if key not in made:
        diagonal = hessian.diagonal().clone()
        dead = diagonal == 0
        if dead.any():
            diagonal[dead] = diagonal[~dead].mean() if not dead.all() else 1.0
        order = group_order(hessian.diagonal(), config.groups[1]) if act else None
        made[key] = _Factor(inverse_factor(hessian, config.damping, order, diagonal), order)
    return made[key]


def _with_feedback(layer: Layer, known: SiteStatistics, factors: dict[object, _Factor]) -> Outcome:
    """SparseGPT. `factors`: of the site's second moment; those missing are added."""
    config: PruneConfig = layer.config
    spec = Prune.plan(layer.shape, config)
    hessian = known[SecondMoment()]
    dead = hessian.diagonal() == 0
    weight = layer.weight.masked_fill(dead, 0.0)
    pattern = Pattern(spec.n, spec.m, spec.kept, config.block_size)

    def lost(found: Pruned, tried: _Factor) -> float:
        damped = (weight - found.weight).square().sum(1).mul_(tried.inverse.added)
        return float((found.loss - damped).double().sum())

    pruned, factor, loss = None, None, float("inf")
    for act in {"none": (False,), "act": (True,), "best": (False, True)}[config.order if spec.m else "none"]:
        tried = _factor(config, act, hessian, factors)
        found = prune_columns(weight, tried.inverse.upper, pattern, layer.scale_dtype, order=tried.order)
        if pruned is None or lost(found, tried) < loss:
            pruned, factor, loss = found, tried, lost(found, tried)
    assert pruned is not None and factor is not None
    module = _module(layer, pruned.weight, pruned.mask, spec)
    if config.bits is not None:  # once more, on grids for what is kept now, and on the paper's
        loss = float("inf")
        for grid in (fit_grid(w, config.group_size, _rule(layer)) for w in (pruned.weight, weight)):
            found = prune_columns(weight, factor.inverse.upper, pattern, layer.scale_dtype, grid, factor.order)
            if lost(found, factor) < loss:
                assert found.codes is not None
                loss, rounded = lost(found, factor), _module(layer, found.weight, found.mask, spec)
                module = _quantized(rounded, spec, found.codes, grid, layer.bias)
    loss = max(loss, 0.0)  # rounding errors may exceed a loss of next to nothing
    report = {
        "loss": loss / known.n_tokens,
        "relative_error": fraction(loss, energy(weight, hessian.float())),
        **_weight_error(layer.weight, module),
        "act_order": float(factor.order is not None),
        "damping": factor.inverse.damping,
        "n_tokens": float(known.n_tokens),
    }
    notes = []
    if factor.inverse.damping > config.damping:
        notes.append(
            f"damping raised from {config.damping:g} to {factor.inverse.damping:.3g} in {factor.inverse.n_attempts} attempts: "
            f"the second moment of the inputs is not positive definite; calibrate on more, and more varied, tokens"
        )
    if known.n_tokens < layer.weight.shape[1]:
        notes.append(
            f"calibrated on {known.n_tokens} tokens for {layer.weight.shape[1]} inputs: too few to know them all"
        )
    return Outcome(module, report, notes + _dead_note(dead, report))


def _rule(layer: Layer) -> GridRule:
    return GridRule(layer.config.bits, clip=layer.config.clip, scale_dtype=layer.scale_dtype)


def _quantized(module: SparseLinear, spec: SparseSpec, codes: Tensor, grid: Grid, bias: Tensor | None) -> SparseLinear:
    """The places of `module`, with codes [out, in] on `grid`."""
    assert spec.quantized is not None
    held = QuantizedModule.from_codes(codes, grid.scale, None, spec.quantized, bias)
    assert isinstance(held, QuantizedLinear)
    return module.quantized(held)


def _module(layer: Layer, weight: Tensor, mask: Tensor, spec: SparseSpec) -> SparseLinear:
    """Raises: NumericsError if a kept weight is too large for the dtype in which it is stored."""
    stored = weight.to(layer.scale_dtype)
    if not all_finite(stored):
        raise NumericsError(
            f"weights overflow {layer.scale_dtype}; store the result with model.dtype=float32 or bfloat16"
        )
    return SparseLinear.from_weight(stored, mask, spec.n, spec.m, layer.bias)


def _weight_error(weight: Tensor, module: SparseLinear) -> dict[str, float]:
    return {"weight_error": fraction(energy(weight - module.dense(torch.float32), None), energy(weight, None))}


def _dead_note(dead: Tensor, report: dict[str, float]) -> list[str]:
    n_dead = int(dead.sum())
    report["n_dead"] = float(n_dead)
    return [f"{n_dead} of {dead.numel()} inputs were 0 on every calibration token"] if n_dead else []
