"""Dobi-SVD: a rank for each layer, learned under a budget of bytes; the best factors of that rank; most of them in 8 bits.

A  A rank k per layer, by gradient. In the original model every layer's outputs Y on a batch of tokens are truncated at a
   real position, smoothly (compress/linalg/svd_gradient.py), and the positions alone are trained:

       minimise  perplexity  subject to  R = R*,      R = sum of bytes(k) / sum of bytes of the layers, R* = keep_ratio

   `methods/dobi_svd_ranks.py`. It needs the whole model in memory, and gradients through it.
B  Factors of that rank:     W' = V_k V_k^T W,      V_k: first k eigenvectors of sum Y^T Y = W H W^T,  H = sum_t x_t x_t^T
   on the outputs that the layer gives behind the layers compressed before it. This is whitened SVD (compress/methods/svd.py),
   and no other V_k loses less of the outputs.
C  Storage (`remap`): 8 bits for as much of each singular vector as both sides have, 16 bits for the rest of the longer
   one (compress/modules/remapped_spec.py). A ratio of bytes is then a ratio of ranks, up to full rank.

Departures from the paper and its code:
- k itself is the parameter, in 1 .. min(out, in). Theirs is a position in units of the rank of one sequence of 2048 tokens,
  times int(min(out, in) / 2048), which is 0 for grouped keys and values. Here a batch of fewer tokens than min(out, in) is
  truncated in proportion. The gate stands at k + 1/2, so that k of them are open and full rank changes nothing.
- The budget is a constraint: the part of the gradient that would change R is taken out before Adam sees it, and each step is
  brought back to R*. The paper adds 200 |R - R*| to the loss (`budget_weight: 200`). That term's gradient is several times
  that of the perplexity and changes its sign from step to step; Adam, which divides by the size of what it saw, then moves the
  ranks apart more slowly.
- The bias is outside of what is truncated, in A as in B.
- Exact decompositions of a whole batch's outputs, in float64, not randomised ones of single sequences.
- The ranks are those of the best pass over the data, its mean loss against its mean positions, not of the step with the
  lowest loss on one sample; and they are only used if they do better than uniform ones at the same bytes.
- B in closed form. The paper's incremental principal components of bases in which every direction counts the same
  (`update: ipca`) are there to compare.
- Evenly spaced codes, and the longer factor fitted to the rounded shorter one (compress/linalg/remap.py).

Source: Dobi-SVD, Wang et al., 2025, arXiv:2502.02723.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.calibration.statistics import Request, Sample, SecondMoment, SiteStatistics
from compress.errors import NumericsError, RecipeError
from compress.linalg.finite import all_finite
from compress.linalg.incremental_pca import output_basis
from compress.linalg.low_rank import decompose, factors
from compress.linalg.quadratic import row_energy
from compress.linalg.ranks import check_budget, rounded_rank
from compress.linalg.remap import remap
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
from compress.methods.svd import EIGEN_FLOPS, SVD
from compress.methods.whole_model import backward_bytes
from compress.modules.low_rank import LowRankLinear
from compress.modules.low_rank_spec import LowRankSpec
from compress.modules.remapped import RemappedLinear
from compress.modules.remapped_spec import RemappedSpec

FLOAT_BYTES = 2  # budgets count floats at 16 bits, whatever the model stores
IPCA_TOKENS = 16384  # inputs kept of each site for update=ipca
NOMINAL_TOKENS = 2048  # of a batch, for the estimate of time
NOT_CALIBRATED = "NOT CALIBRATED: no calibration token reached this layer; it was truncated by its weight alone"


class DobiSVDConfig(MethodConfig):
    keep_ratio: float = Field(
        0.8, gt=0, lt=1, description="bytes of all layers together, as a fraction of what they take in 16 bits"
    )
    remap: bool = Field(True, description="most of the factors in 8 bits, so that the same bytes hold more ranks")
    steps: int = Field(
        320, ge=0, description="updates of the ranks, a batch of calibration rows each; 0: uniform ranks"
    )
    learning_rate: float = Field(0.0025, gt=0, le=1, description="the most a rank moves in a step, of full rank")
    beta: float = Field(10.0, gt=0, description="steepness of the truncation: about 2 / beta directions are half open")
    budget_weight: float | None = Field(
        None,
        gt=0,
        description="the paper's lambda, 200: the budget as a penalty; without it steps stay inside the budget",
    )
    terms: int = Field(10, ge=0, description="K: bounds the gradient across close singular values by K + 1")
    update: Literal["closed_form", "ipca"] = Field(
        "closed_form",
        description="where the factors come from: the best ones, or the paper's incremental PCA, to compare",
    )
    rank: int | None = Field(None, ge=1, description="the rank, in place of learning it")
    rank_multiple: int = Field(1, ge=1, description="ranks are rounded to a multiple of it")


class DobiSVD(SiteMethod):
    name = "dobi_svd"
    summary = "low rank: ranks learned by gradient under a budget, factors mostly in 8 bits"
    Config = DobiSVDConfig
    on_leaves = False

    @classmethod
    def plan(cls, shape: LayerShape, config: DobiSVDConfig) -> RemappedSpec | LowRankSpec | Kept:
        if shape.kind != "linear":
            raise RecipeError(f"{shape.name}: dobi_svd is for linears, not for tables; leave it out of layers")
        full, dense = min(shape.out_features, shape.in_features), dense_bytes(shape)
        per_rank = rank_bytes(shape, config)
        if config.rank is not None:
            rank = rounded_rank(config.rank, config.rank_multiple)
            if rank > full:
                raise RecipeError(f"{shape.name}: rank={rank}, but full rank is {full}; use less, or skip the layer")
        else:
            share = budget_of(shape, config)
            rank = rounded_rank(share // per_rank, config.rank_multiple)
            if config.rank_multiple == 1 and share < per_rank:
                raise RecipeError(
                    f"{shape.name}: keep_ratio={config.keep_ratio:g} is {share:,} bytes, less than rank 1 takes "
                    f"({per_rank:,}); use at least {math.ceil(1e4 * per_rank / dense) / 1e4:g}"
                )
        if rank * per_rank >= dense or rank > full:
            return Kept(f"factors of rank {rank} would take {rank * per_rank / dense:.2f} times its bytes in 16 bits")
        if config.remap:
            return RemappedSpec(shape.in_features, shape.out_features, rank)
        return LowRankSpec(shape.in_features, shape.out_features, rank)

    @classmethod
    def fitted(cls, config: DobiSVDConfig, multiple: int) -> DobiSVDConfig:
        """A remapped layer is compressed further as a whole, so its rank is free."""
        if config.remap:
            return config
        return config.model_copy(update={"rank_multiple": math.lcm(config.rank_multiple, multiple)})

    @classmethod
    def observes(cls, config: DobiSVDConfig) -> bool:
        return config.rank is None

    @classmethod
    def foresee(cls, shapes: Mapping[str, LayerShape], configs: dict[str, Any], nbytes: Sizes) -> None:
        """A layer takes a rank of its multiple at least, or as many bytes as it has."""
        sizes = {name: dense_bytes(shapes[name]) for name in configs}
        least = sum(min(c.rank_multiple * rank_bytes(shapes[n], c), sizes[n]) for n, c in configs.items())
        budget = sum(budget_of(shapes[name], config) for name, config in configs.items())
        check_budget(budget, least, sum(sizes.values()), [config.rank_multiple for config in configs.values()])

    @classmethod
    def observe(cls, view: View, configs: dict[str, Any]) -> dict[str, Any]:
        from compress.methods.dobi_svd_ranks import settle

        return settle(view, configs)

    @classmethod
    def observation_flops(cls, shapes: tuple[LayerShape, ...], config: DobiSVDConfig) -> float:
        """Two forward passes and a backward one per step, decompositions in two of them."""
        if not config.steps:
            return 0.0
        tokens, total = NOMINAL_TOKENS, 0.0
        for s in shapes:
            small = min(s.out_features, s.in_features)
            total += (
                6.0 * tokens * s.out_features * s.in_features + 2 * EIGEN_FLOPS * small**3 + 40.0 * tokens * small**2
            )
        return (config.steps + 2) * total

    @classmethod
    def observation_bytes(cls, extent: Extent, config: DobiSVDConfig) -> int:
        """The model in float32, R of W = Q R beside Q where out > in; a hidden state per block; one block's backward pass."""
        if not config.steps:
            return 0
        weights = extent.n_weights + sum(s.in_features**2 for s in extent.shapes if s.out_features > s.in_features)
        small = [min(s.out_features, s.in_features) for s in extent.shapes]
        held = sum(2 * n * n + extent.batch_tokens * n for n in small) // max(extent.n_blocks, 1)  # vectors are float64
        working = 2 * max(5 * extent.batch_tokens * n + 5 * n * n for n in small)
        return 4 * weights + backward_bytes(extent, held + working)

    @classmethod
    def statistics(cls, config: DobiSVDConfig) -> tuple[Request, ...]:
        return (SecondMoment(), Sample(IPCA_TOKENS)) if config.update == "ipca" else (SecondMoment(),)

    @classmethod
    def workspace(cls, shapes: tuple[LayerShape, ...], config: DobiSVDConfig) -> int:
        return 8 * max(3 * s.out_features * s.in_features + 5 * min(s.out_features, s.in_features) ** 2 for s in shapes)

    @classmethod
    def flops(cls, shapes: tuple[LayerShape, ...], config: DobiSVDConfig) -> float:
        own = SVD.flops(shapes, SVD.Config())
        return own + sum(40.0 * s.out_features * s.in_features * min(s.out_features, s.in_features) for s in shapes)

    @classmethod
    def compress(
        cls, site: SiteTask, statistics: SiteStatistics | None, generator: torch.Generator
    ) -> dict[str, Outcome]:
        if statistics is not None:
            statistics.require_finite(f"{', '.join(layer.name for layer in site.layers)}: dobi_svd")
        return {layer.name: _compress_layer(layer, statistics) for layer in site.layers}


def rank_bytes(shape: LayerShape, config: DobiSVDConfig) -> int:
    """Bytes of one rank, floats at 16 bits."""
    if config.remap:
        return RemappedSpec(shape.in_features, shape.out_features, 1).nbytes("BF16")
    return LowRankSpec(shape.in_features, shape.out_features, 1).nbytes("BF16")


def dense_bytes(shape: LayerShape) -> int:
    return FLOAT_BYTES * shape.out_features * shape.in_features


def budget_of(shape: LayerShape, config: DobiSVDConfig) -> int:
    """The layer's share of the budget in bytes. keep_ratio as written: 0.29 of 100 is 29."""
    return int(Fraction(str(config.keep_ratio)) * dense_bytes(shape))


def _compress_layer(layer: Layer, statistics: SiteStatistics | None) -> Outcome:
    check_weight(layer)
    config: DobiSVDConfig = layer.config
    spec = DobiSVD.plan(layer.shape, config)
    assert isinstance(spec, RemappedSpec | LowRankSpec), f"{layer.name}: {spec}"
    known = statistics if statistics is not None and statistics.n_tokens else None
    moment = None if known is None else known[SecondMoment()]
    try:
        basis, notes = _basis(layer, spec.rank, known)
        left, right = factors(layer.weight, basis)
        stored = remap(left, right, layer.scale_dtype, moment) if config.remap else {}
    except NumericsError as error:
        raise NumericsError(f"{layer.name}: dobi_svd: {error}") from None
    module: RemappedLinear | LowRankLinear
    if isinstance(spec, RemappedSpec):
        module = RemappedLinear(spec, stored if layer.bias is None else {**stored, "bias": layer.bias})
    else:
        module = LowRankLinear.from_factors(left.to(layer.scale_dtype), right.to(layer.scale_dtype), layer.bias)
    if not all(all_finite(t) for t in module.stored().values() if t.is_floating_point()):
        raise NumericsError(
            f"{layer.name}: dobi_svd: its factors overflow {layer.scale_dtype}; store the result with model.dtype=float32"
        )
    return Outcome(module, {"rank": float(spec.rank), **_figures(layer, module, known)}, notes)


def _basis(layer: Layer, rank: int, known: SiteStatistics | None) -> tuple[Tensor, list[str]]:
    """V_k [out, rank], and what to say of it."""
    if known is None:
        return decompose(layer.weight, rank).basis, [NOT_CALIBRATED]
    if layer.config.update == "ipca":
        sample = known[Sample(IPCA_TOKENS)]
        basis = output_basis(layer.weight.to(sample.device), sample, rank)
        if basis is None:
            raise NumericsError(
                f"update=ipca: {len(sample)} tokens are too few for rank {rank}; calibrate on more, or use update=closed_form"
            )
        return basis.to(layer.weight.device), []
    found = decompose(layer.weight, rank, known[SecondMoment()])
    notes, n_inputs = [], layer.weight.shape[1]
    if known.n_tokens < n_inputs:
        notes.append(f"calibrated on {known.n_tokens} tokens for {n_inputs} inputs: too few to know them all")
    if found.n_reached < rank:
        notes.append(
            f"the calibration inputs reach {found.n_reached} directions of the outputs; the other {rank - found.n_reached} of "
            f"rank {rank} were chosen by the weight alone"
        )
    return found.basis, notes


def _figures(layer: Layer, module: RemappedLinear | LowRankLinear, known: SiteStatistics | None) -> dict[str, float]:
    """`relative_error`: of the outputs on the calibration inputs; `loss`: the same per token; `weight_error`."""
    difference = layer.weight.float() - module.dense(torch.float32)
    size = float(layer.weight.double().square().sum())
    figures = {"weight_error": float(difference.double().square().sum()) / size if size else 0.0}
    if known is not None:
        hessian = known[SecondMoment()].float()
        loss, total = (
            max(float(row_energy(m.float(), hessian).double().sum()), 0.0) for m in (difference, layer.weight)
        )
        figures |= {"relative_error": loss / total if total else 0.0, "loss": loss / known.n_tokens}
        figures["n_tokens"] = float(known.n_tokens)
    return figures
