"""CUR: some of a weight's own columns and rows, and a small matrix that links them.

    W ~ C U R,   C = W[:, J] [out, r],   R = W[I, :] [r, in],   U [r, r]

`selection` finds I and J. deim and qr look at a matrix M of W's shape (`matrix`), greedy at what is left of the outputs
(compress/linalg/cur.py has the mathematics). deim is the paper's; greedy loses less, on every layer that was measured. With
H = sum_t x_t x_t^T:

    full      M = W S, S S^T = H, for rows    the outputs themselves; columns from W D, since one of W S is of no single input
    scaled    M = W D, D = diag(H)^(1/2)      signed, so that its singular vectors are those of the outputs
    wanda     M = |W| D                       the paper's; another matrix, with other singular vectors
    weight    M = W                           no data

`fit` is the error that U makes least, under H ("full"), its diagonal ("scaled") or none ("weight"). The paper takes the last:
activations then count in the selection alone. a = damping mean(diag H) is added to H, which decides where tokens are few:

    U minimises  tr((W - C U R) (H + a I) (W - C U R)^T)

Healing. The public code trains U towards the original model's outputs. Layer by layer that loss is quadratic in U, so its least
is computed and not trained towards, on all calibration inputs x_t from the compressed layers before and x~_t of the original
model, not on a sample of them (strength `heal`, s below). C and R stay.

    U minimises  sum_t |W (x_t + s (x~_t - x_t)) - C U R x_t|^2 + a |W - C U R|^2

`n_blocks` compresses those blocks only that turn their hidden states least: the mean, over calibration rows, of the angle
between the states of the last token before and behind a block, acos(cos) / pi. Never the first or the last.

Columns and rows are stored times powers of two (U takes them up), so float16 and bfloat16 hold W's own digits, and U is found
knowing that it will be rounded. A layer whose three factors would be no smaller than it is stays dense.

Departures from the public code: DEIM as published, by LU, where theirs subtracts a wrong vector; exact singular vectors; H
uncentred and from the compressed stream; U under H, not under the selection's weights; damping; "weight" signed; the energy
rule keeps a layer dense where it cannot pay; healing as above.

Source: Park and Moon, 2025, arXiv:2501.04211.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compress.calibration.statistics import CrossMoment, Request, SecondMoment, SiteStatistics
from compress.errors import NumericsError, RecipeError
from compress.linalg import cur
from compress.linalg.finite import all_finite
from compress.linalg.low_rank import whitener
from compress.linalg.quadratic import energy, fraction
from compress.linalg.ranks import rounded_rank
from compress.methods.base import Kept, Layer, LayerShape, MethodConfig, Outcome, SiteMethod, SiteTask, View
from compress.methods.rtn import check_weight
from compress.modules.cur import CURLinear
from compress.modules.cur_spec import CURSpec

EIGEN_FLOPS = 20.0  # n^3 of eigenvectors in float64, in operations of a float32 matrix product; measured
NOT_CALIBRATED = (
    "NOT CALIBRATED: no calibration token reached this layer; rows, columns and U were chosen by the weight alone"
)


class CURConfig(MethodConfig):
    keep_ratio: float = Field(0.8, gt=0, lt=1, description="size of the three factors, as a fraction of the layer")
    rank: int | None = Field(None, ge=1, description="the number of rows and columns, in place of keep_ratio")
    energy: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="in place of keep_ratio: the least rank whose singular values of M hold this share of their squares",
    )
    min_rank: int = Field(1, ge=1, description="keep_ratio, energy: no rank is below it")
    max_rank: int | None = Field(None, ge=1, description="keep_ratio, energy: no rank is above it; 256 in the paper")
    rank_multiple: int = Field(
        1, ge=1, description="ranks are rounded to a multiple of it: down, but not to 0; up by energy"
    )
    selection: Literal["greedy", "deim", "qr"] = Field(
        "greedy",
        description="how rows and columns are found: one by one by what they leave of the outputs, by interpolation of "
        "singular vectors (the paper), or as pivots of a QR decomposition",
    )
    matrix: Literal["full", "scaled", "wanda", "weight"] = Field(
        "full",
        description="what they are found in: W times a root of H; W times the size of each input; |W| scaled (the paper); W",
    )
    fit: Literal["full", "scaled", "weight"] = Field(
        "full", description="the error that U makes least: of the outputs, the same were inputs uncorrelated, of W"
    )
    damping: float = Field(0.01, ge=0, lt=1, description="fraction of the mean of diag(H) that is added to diag(H)")
    heal: float = Field(
        0.0,
        ge=0,
        le=1,
        description="strength of fitting U to what the original model computes from its own inputs; 0 off",
    )
    n_blocks: int | None = Field(
        None, ge=1, description="compress only so many blocks, those that turn their hidden states least"
    )

    @model_validator(mode="after")
    def _consistent(self) -> CURConfig:
        if self.rank is not None and self.energy is not None:
            raise ValueError(f"rank={self.rank} and energy={self.energy:g} are two ways to set a rank; give one")
        if self.max_rank is not None and self.min_rank > self.max_rank:
            raise ValueError(f"min_rank={self.min_rank} is above max_rank={self.max_rank}")
        if self.heal and self.fit != "full":
            raise ValueError(f"heal={self.heal:g} needs fit=full, not {self.fit}")
        if self.selection == "greedy" and self.matrix == "wanda":
            raise ValueError("selection=greedy looks at the outputs, not at |W|; use selection=deim for matrix=wanda")
        return self


class CUR(SiteMethod):
    name = "cur"
    summary = "some of the weight's own columns and rows, and a small matrix that links them"
    Config = CURConfig
    on_leaves = False

    @classmethod
    def plan(cls, shape: LayerShape, config: CURConfig) -> CURSpec | Kept:
        """Before `energy` has been settled, the largest rank that it may choose."""
        if shape.kind != "linear":
            raise RecipeError(f"{shape.name}: cur is for linears, not for tables; leave it out of layers")
        out_features, in_features = shape.out_features, shape.in_features
        most = most_rank(shape, config)
        if config.energy is not None:
            rank = limited(most, config)
        elif config.rank is None:
            rank = limited(cur.uniform_rank(out_features, in_features, config.keep_ratio), config)
        else:
            rank = rounded_rank(config.rank, config.rank_multiple)
            if rank > most > 0:
                raise RecipeError(
                    f"{shape.name}: rank={rank} would hold {_share(shape, rank):.2f} times the numbers of the {out_features} x "
                    f"{in_features} weight; use rank={most} or less, or skip the layer"
                )
        if rank > most:
            return Kept(
                f"factors of rank {rank} would hold {_share(shape, rank):.2f} times the numbers of the {out_features} x "
                f"{in_features} weight"
            )
        return CURSpec(in_features, out_features, rank)

    @classmethod
    def fitted(cls, config: CURConfig, multiple: int) -> CURConfig:
        return config.model_copy(update={"rank_multiple": math.lcm(config.rank_multiple, multiple)})

    @classmethod
    def statistics(cls, config: CURConfig) -> tuple[Request, ...]:
        """H also where only the report needs it: errors of the outputs, which compare. Nothing where all is about the weight."""
        if config.matrix == "weight" and config.fit == "weight" and config.n_blocks is None:
            return ()
        return (SecondMoment(), CrossMoment()) if config.heal else (SecondMoment(),)

    @classmethod
    def observes(cls, config: CURConfig) -> bool:
        return config.energy is not None or config.n_blocks is not None

    @classmethod
    def observe(cls, view: View, configs: dict[str, Any]) -> dict[str, Any]:
        from compress.methods.cur_choice import settle

        return settle(view, configs)

    @classmethod
    def observation_flops(cls, shapes: tuple[LayerShape, ...], config: CURConfig) -> float:
        if config.energy is None:
            return 0.0
        return sum(_small(s) ** 3 * EIGEN_FLOPS / 3 + 4.0 * s.out_features * s.in_features * _small(s) for s in shapes)

    @classmethod
    def workspace(cls, shapes: tuple[LayerShape, ...], config: CURConfig) -> int:
        """Float64: W, M, three of their size on the way; H damped, its root or what it is paired with; Gram matrices."""
        m, n = max(s.out_features for s in shapes), max(s.in_features for s in shapes)
        squares = 3 if config.matrix == "full" or config.heal else 2
        small = 3 * min(m, n) ** 2
        if config.selection == "greedy":  # what stands for rows and columns, their basis
            small += max(_small(s) * (s.out_features + s.in_features) for s in shapes)
        return 8 * (5 * max(s.out_features * s.in_features for s in shapes) + squares * n * n + small)

    @classmethod
    def flops(cls, shapes: tuple[LayerShape, ...], config: CURConfig) -> float:
        n = max(s.in_features for s in shapes)
        total = EIGEN_FLOPS * n**3 if config.matrix == "full" and config.selection != "greedy" else 0.0
        for s in shapes:
            spec = cls.plan(s, config)
            rank = spec.rank if isinstance(spec, CURSpec) else 0
            weights = float(s.out_features * s.in_features)
            if config.selection != "qr":
                total += EIGEN_FLOPS * _small(s) ** 3 + 8 * weights * _small(s)
            if config.selection == "greedy":  # matrix times vector, `rank` times: bound by memory, ten times as slow
                total += 20 * _small(s) * (s.out_features + s.in_features) * rank + 2 * weights * n
            elif config.selection == "qr":
                total += 20 * weights * rank
            total += 3 * EIGEN_FLOPS * rank**3 + 16 * weights * rank + 4.0 * n * n * rank
        return total

    @classmethod
    def compress(
        cls, site: SiteTask, statistics: SiteStatistics | None, generator: torch.Generator
    ) -> dict[str, Outcome]:
        known = SiteStatistics.usable(statistics, f"{', '.join(layer.name for layer in site.layers)}: cur")
        roots: list[Tensor] = []  # S, once for the layers of the site
        return {layer.name: _compress_layer(layer, known, roots) for layer in site.layers}


def most_rank(shape: LayerShape, config: CURConfig) -> int:
    """The largest rank that is smaller than the layer and a multiple of what it must be; 0 if none is."""
    found = cur.break_even_rank(shape.out_features, shape.in_features)
    return found // config.rank_multiple * config.rank_multiple


def limited(rank: int, config: CURConfig) -> int:
    """`rank` within min_rank and max_rank, rounded down to a multiple, at least that."""
    if config.max_rank is not None:
        rank = min(rank, config.max_rank)
    return rounded_rank(max(rank, config.min_rank), config.rank_multiple)


def _compress_layer(layer: Layer, known: SiteStatistics | None, roots: list[Tensor]) -> Outcome:
    check_weight(layer)
    config: CURConfig = layer.config
    spec = CUR.plan(layer.shape, config)
    assert isinstance(spec, CURSpec), f"{layer.name}: {spec}"
    hessian = None if known is None else known.values.get(SecondMoment())
    crossed = None if known is None or not config.heal else known[CrossMoment()]
    try:
        moment = damped(hessian, config.fit, config.damping)
        target = None if crossed is None or moment is None else moment + config.heal * crossed.double()
        rows, columns = _selected(layer, hessian, moment, spec.rank, roots)
        found = cur.link(
            layer.weight, rows, columns, moment, crossed=target, rounding=cur.rounding_of(layer.scale_dtype)
        )
    except NumericsError as error:
        raise NumericsError(f"{layer.name}: cur: {error}") from None
    left, middle, right = (factor.to(layer.scale_dtype) for factor in (found.columns, found.link, found.rows))
    if not (all_finite(left) and all_finite(middle) and all_finite(right)):
        raise NumericsError(
            f"{layer.name}: cur: its factors overflow {layer.scale_dtype}; store the result with model.dtype=float32"
        )
    module = CURLinear.from_factors(left, middle, right, layer.bias)
    return Outcome(module, _figures(layer, module, found, known), _notes(layer, spec, found, known))


def _selected(
    layer: Layer, hessian: Tensor | None, fitted: Tensor | None, rank: int, roots: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Rows and columns; `fitted`: H as U will be fitted to, which greedy selection looks at as well if it is the same."""
    config: CURConfig = layer.config
    if config.selection == "greedy":
        same = config.matrix == config.fit
        moment = fitted if same else damped(hessian, config.matrix, config.damping)
        return cur.select_greedily(layer.weight, moment, rank)
    for_columns = selection_matrix(layer.weight, hessian, config.matrix)
    for_rows = for_columns
    if config.matrix == "full" and hessian is not None:
        if not roots:
            roots.append(whitener(hessian))
        for_rows = layer.weight.double() @ roots[0]
    return cur.select(for_rows, for_columns, rank, config.selection)


def selection_matrix(weight: Tensor, hessian: Tensor | None, kind: str) -> Tensor:
    """M [out, in] in which columns are found, float64."""
    weight = weight.double().abs() if kind == "wanda" else weight.double()
    return weight if hessian is None or kind == "weight" else weight * hessian.diagonal().double().sqrt()


def damped(hessian: Tensor | None, kind: str, damping: float) -> Tensor | None:
    """H + a I, its diagonal, or None for the identity: "full", "scaled", "weight"."""
    if hessian is None or kind == "weight":
        return None
    added = damping * float(hessian.diagonal().mean())
    if kind == "scaled":
        return hessian.diagonal().double() + added
    moment = hessian.double().clone()
    moment.diagonal().add_(added)
    return moment


def _figures(layer: Layer, module: CURLinear, found: cur.Link, known: SiteStatistics | None) -> dict[str, float]:
    """What was lost: `relative_error`, of the outputs that the weight as stored gives on the calibration inputs; `loss`, the same
    per token; `weight_error`; and `largest_link`, the largest entry of U."""
    difference = layer.weight - module.dense(torch.float32)
    figures = {
        "rank": float(module.spec.rank),
        "weight_error": fraction(energy(difference, None), energy(layer.weight, None)),
        "largest_link": float(found.link.abs().max()),
    }
    if known is not None and SecondMoment() in known.values:
        hessian = known[SecondMoment()]
        loss = energy(difference, hessian)
        figures["relative_error"] = fraction(loss, energy(layer.weight, hessian))
        figures["loss"] = loss / known.n_tokens
        figures["n_tokens"] = float(known.n_tokens)
    return figures


def _notes(layer: Layer, spec: CURSpec, found: cur.Link, known: SiteStatistics | None) -> list[str]:
    config, n_inputs = layer.config, layer.weight.shape[1]
    notes = []
    if known is None:
        return [NOT_CALIBRATED] if CUR.statistics(config) else []
    if (config.matrix == "full" or config.fit == "full") and known.n_tokens < n_inputs:
        notes.append(f"calibrated on {known.n_tokens} tokens for {n_inputs} inputs: too few to know them all")
    if found.n_reached < spec.rank:
        notes.append(f"U has rank {found.n_reached} of {spec.rank}: the others of its rows or columns depend on these")
    return notes


def _share(shape: LayerShape, rank: int) -> float:
    """Numbers in the factors, as a multiple of the weight's."""
    return cur.size(shape.out_features, shape.in_features, rank) / (shape.out_features * shape.in_features)


def _small(shape: LayerShape) -> int:
    return min(shape.out_features, shape.in_features)
