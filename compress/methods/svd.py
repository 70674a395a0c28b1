"""SVD: two thin linears in place of one, W ~ left right, chosen for the inputs that the layer really has.

    minimise  tr((W - W') M (W - W')^T)  over W' of rank k:   W' = U_k U_k^T W,   U_k: first k eigenvectors of W M W^T

`objective` says what M knows of the inputs x (compress/linalg/low_rank.py has the mathematics):

    plain      I                               ||W - W'||_F: no data                               the baseline
    scaled     diag(a^(2 alpha)), a = mean |x| large inputs count more, by a rule of thumb         ASVD
    awsvd      diag(H)                         the outputs' error, were inputs uncorrelated        LoRAP
    whitened   H = sum_t x_t x_t^T             the outputs' error on the calibration tokens        SVD-LLM

No other W' of rank k has less error on the outputs than the last has. Its error is known in advance: the sum of
eigenvalues k+1, ... of W H W^T.

Inputs come from the layers compressed before, so a layer makes good what can be made good for those inputs. `refit` goes
further: it aims at what the original model gives for its own inputs x~. With D = sum_t (x~_t - x_t) x_t^T, it truncates

    W_s = W + refit W D (H + a I)^-1,   a = damping mean(diag H)          in place of W, under H + a I in place of H

The update of SVD-LLM's first version, which fits U anew behind a fixed V, has nothing to find here: U_k^T W is already
the best right factor for U_k, and the left one follows from it, on the inputs that the layer has.

A layer whose factors would be no smaller than it is stays dense.

`allocation` says how ranks are spread. By default every layer has the rank that keep_ratio gives it; all others spend the same
bytes where they do more, which takes a look at the model first (compress/methods/svd_ranks.py).

Departures from the public code: no inverse, no Cholesky factor of H; ranks follow each matrix's own shape (grouped keys
and values); H comes from the compressed stream, in one pass; `left` is U_k, its columns mixed among each other, up to a
power of two, instead of U_k sqrt(Sigma): a later step that rounds `right` then minimises the error of the outputs, and
one that rounds `left` has correlated inputs to feed errors back to (compress/linalg/low_rank.py, `mixing`).

Sources: ASVD, Yuan et al., 2023, arXiv:2312.05821; LoRAP, Li et al., 2024, arXiv:2404.09695; SVD-LLM, Wang et al., 2024,
arXiv:2403.07378.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compress.calibration.statistics import AbsMean, CrossMoment, Request, SecondMoment, SiteStatistics
from compress.errors import NumericsError, RecipeError
from compress.linalg.finite import all_finite
from compress.linalg.low_rank import Decomposition, decompose, factors, shifted
from compress.linalg.quadratic import energy, fraction
from compress.linalg.ranks import break_even_rank, rounded_rank, uniform_rank
from compress.methods.base import (
    Extent,
    Kept,
    Layer,
    LayerShape,
    MethodConfig,
    Outcome,
    SiteMethod,
    SiteTask,
    Sizes,
    View,
)
from compress.methods.rtn import check_weight
from compress.modules.low_rank import LowRankLinear
from compress.modules.low_rank_spec import LowRankSpec

EIGEN_FLOPS = 20.0  # n^3 of eigenvectors in float64, in operations of a float32 matrix product; measured
NOT_CALIBRATED = "NOT CALIBRATED: no calibration token reached this layer; it was truncated as by objective=plain"


class SVDConfig(MethodConfig):
    objective: Literal["plain", "scaled", "awsvd", "whitened"] = Field(
        "whitened",
        description="what is minimised: the weight's error, or the outputs' by ever better knowledge of the inputs",
    )
    keep_ratio: float = Field(0.8, gt=0, lt=1, description="size of the two factors, as a fraction of the layer")
    allocation: Literal["uniform", "loss", "effective_rank", "energy", "heavy_tail", "lorap", "learned"] = Field(
        "uniform",
        description="how ranks are spread: keep_ratio of each layer, or of all layers' bytes together, spent by this rule",
    )
    rank: int | None = Field(None, ge=1, description="the rank, in place of keep_ratio and allocation")
    rank_multiple: int = Field(1, ge=1, description="ranks are rounded down to a multiple of it, but not to 0")
    alpha: float = Field(0.5, ge=0, le=1, description="objective=scaled: power of the mean size of an input")
    refit: float = Field(
        0.0, ge=0, le=1, description="strength of matching what the original model computes from its own inputs; 0 off"
    )
    damping: float = Field(
        0.01, gt=0, lt=1, description="refit: fraction of the mean of diag(H) that is added to diag(H)"
    )

    steps: int = Field(
        320, ge=1, description="allocation=learned: updates of the ranks, a batch of calibration rows each"
    )
    learning_rate: float = Field(
        0.0025, gt=0, le=1, description="allocation=learned: the most a rank moves in a step, of full rank"
    )

    @model_validator(mode="after")
    def _loss_of_outputs(self) -> SVDConfig:
        if self.allocation == "loss" and self.objective == "plain":
            raise ValueError("allocation=loss needs to know the outputs' errors, and objective=plain takes no data")
        return self

    @model_validator(mode="after")
    def _refit_whitened(self) -> SVDConfig:
        if self.refit and self.objective != "whitened":
            raise ValueError(f"refit={self.refit:g} needs objective=whitened, not {self.objective}")
        return self


class SVD(SiteMethod):
    name = "svd"
    summary = "low rank: two thin linears in place of one, truncated where the calibration inputs notice it least"
    Config = SVDConfig
    on_leaves = False

    @classmethod
    def plan(cls, shape: LayerShape, config: SVDConfig) -> LowRankSpec | Kept:
        if shape.kind != "linear":
            raise RecipeError(f"{shape.name}: svd is for linears, not for tables; leave it out of layers")
        out_features, in_features = shape.out_features, shape.in_features
        rank = rank_of(shape, config)
        if rank > break_even_rank(out_features, in_features):
            held = rank * (out_features + in_features) / (out_features * in_features)
            return Kept(
                f"factors of rank {rank} would hold {held:.2f} times the numbers of the {out_features} x {in_features} weight"
            )
        return LowRankSpec(in_features, out_features, rank)

    @classmethod
    def fitted(cls, config: SVDConfig, multiple: int) -> SVDConfig:
        return config.model_copy(update={"rank_multiple": math.lcm(config.rank_multiple, multiple)})

    @classmethod
    def observes(cls, config: SVDConfig) -> bool:
        return config.allocation != "uniform" and config.rank is None

    @classmethod
    def foresee(cls, shapes: Mapping[str, LayerShape], configs: dict[str, Any], nbytes: Sizes) -> None:
        from compress.methods.svd_ranks import check

        check(shapes, configs, nbytes)

    @classmethod
    def observe(cls, view: View, configs: dict[str, Any]) -> dict[str, Any]:
        from compress.methods.svd_ranks import settle

        return settle(view, configs)

    @classmethod
    def observation_bytes(cls, extent: Extent, config: SVDConfig) -> int:
        from compress.methods.svd_ranks import observation_bytes

        return observation_bytes(extent, config)

    @classmethod
    def observation_flops(cls, shapes: tuple[LayerShape, ...], config: SVDConfig) -> float:
        from compress.methods.svd_ranks import observation_flops

        return observation_flops(shapes, config)

    @classmethod
    def needs_tokens(cls, config: SVDConfig) -> bool:
        return bool(cls.statistics(config)) or (cls.observes(config) and config.allocation == "learned")

    @classmethod
    def statistics(cls, config: SVDConfig) -> tuple[Request, ...]:
        """All but `plain` also take H for the report: errors of the outputs, which compare."""
        if config.objective == "plain":
            return ()
        if config.objective == "scaled":
            return AbsMean(), SecondMoment()
        return (SecondMoment(), CrossMoment()) if config.refit else (SecondMoment(),)

    @classmethod
    def workspace(cls, shapes: tuple[LayerShape, ...], config: SVDConfig) -> int:
        n = max(s.in_features for s in shapes)
        one = max(_doubles(s.out_features, s.in_features) for s in shapes)
        return 8 * (one + (3 * n * n if config.refit else 0))

    @classmethod
    def flops(cls, shapes: tuple[LayerShape, ...], config: SVDConfig) -> float:
        n = max(s.in_features for s in shapes)
        total = 4.0 * n**3 if config.refit else 0.0
        for s in shapes:
            small, large = sorted((s.out_features, s.in_features))
            total += EIGEN_FLOPS * small**3 + 8.0 * s.out_features * s.in_features * (s.in_features + small)
            total += 16.0 * large * small**2 if s.out_features > s.in_features else 0.0  # QR
        return total

    @classmethod
    def compress(
        cls, site: SiteTask, statistics: SiteStatistics | None, generator: torch.Generator
    ) -> dict[str, Outcome]:
        if statistics is not None:
            statistics.require_finite(f"{', '.join(layer.name for layer in site.layers)}: svd")
        return {layer.name: _compress_layer(layer, statistics) for layer in site.layers}


def rank_of(shape: LayerShape, config: SVDConfig) -> int:
    """The rank that the settings ask for, whether or not it is worth having."""
    if config.rank is not None:
        return rounded_rank(config.rank, config.rank_multiple)
    return uniform_rank(shape.out_features, shape.in_features, config.keep_ratio, config.rank_multiple)


def moment_of(config: SVDConfig, statistics: SiteStatistics) -> Tensor | None:
    """M of the objective: a matrix, a diagonal, or None for the identity."""
    if config.objective == "scaled":
        return statistics[AbsMean()].double() ** (2 * config.alpha)
    if config.objective == "awsvd":
        return statistics[SecondMoment()].diagonal()
    return statistics[SecondMoment()] if config.objective == "whitened" else None


def _compress_layer(layer: Layer, statistics: SiteStatistics | None) -> Outcome:
    check_weight(layer)
    config: SVDConfig = layer.config
    spec = SVD.plan(layer.shape, config)
    assert isinstance(spec, LowRankSpec), f"{layer.name}: {spec}"
    known = statistics if statistics is not None and statistics.n_tokens else None
    target, moment, report, notes = layer.weight, None, {"rank": float(spec.rank)}, []
    try:
        if known is not None:
            moment = moment_of(config, known)
            if config.refit:
                assert moment is not None
                target, moment, used = shifted(layer.weight, moment, known[CrossMoment()], config.refit, config.damping)
                report["damping"] = used
                if used > config.damping:
                    notes.append(f"damping raised from {config.damping:g} to {used:.3g}: calibrate on more tokens")
        elif config.objective != "plain":
            notes.append(NOT_CALIBRATED)
        found = decompose(target, spec.rank, moment)
    except NumericsError as error:
        raise NumericsError(f"{layer.name}: svd: {error}") from None
    left, right = (factor.to(layer.scale_dtype) for factor in factors(target, found.basis))
    if not (all_finite(left) and all_finite(right)):
        raise NumericsError(
            f"{layer.name}: svd: its factors overflow {layer.scale_dtype}; store the result with model.dtype=float32"
        )
    module = LowRankLinear.from_factors(left, right, layer.bias)
    report |= _figures(layer, module, target, found, known)
    return Outcome(module, report, notes + _notes(layer, found, known))


def _figures(
    layer: Layer, module: LowRankLinear, target: Tensor, found: Decomposition, known: SiteStatistics | None
) -> dict[str, float]:
    """What was lost.

    `predicted_error`: of the objective, from the spectrum, as a fraction of what there was; `relative_error`: measured, of the
    outputs that the weight as stored gives on the calibration inputs; `loss`: the same per token; `weight_error`.
    """
    difference = target.float() - module.dense(torch.float32)
    figures = {
        "predicted_error": fraction(found.loss, found.total),
        "weight_error": fraction(energy(difference, None), energy(layer.weight, None)),
    }
    if known is not None and SecondMoment() in known.values:
        hessian = known[SecondMoment()]
        loss = energy(difference, hessian)
        figures["relative_error"] = fraction(loss, energy(target.float(), hessian))
        figures["loss"] = loss / known.n_tokens
        figures["n_tokens"] = float(known.n_tokens)
    return figures


def _notes(layer: Layer, found: Decomposition, known: SiteStatistics | None) -> list[str]:
    notes = []
    rank, n_inputs = found.basis.shape[1], layer.weight.shape[1]
    if known is not None and layer.config.objective == "whitened" and known.n_tokens < n_inputs:
        notes.append(f"calibrated on {known.n_tokens} tokens for {n_inputs} inputs: too few to know them all")
    if known is not None and found.n_reached < rank:
        notes.append(
            f"the calibration inputs reach {found.n_reached} directions of the outputs; the other {rank - found.n_reached} of "
            f"rank {rank} were chosen by the weight alone"
        )
    return notes


def _doubles(out_features: int, in_features: int) -> int:
    """Numbers in float64 that one decomposition holds at its peak: W, W H or Q, and G with its eigenvectors and workspace."""
    small = min(out_features, in_features)
    return 3 * out_features * in_features + 5 * small * small
