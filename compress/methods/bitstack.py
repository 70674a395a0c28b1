"""BitStack: each weight as a stack of one-bit blocks, so that one checkpoint loads at any size.

    W s ~ sum_b S_b * (U_b V_b^T)      S_b signs [out, in], U_b [out, rank], V_b [in, rank], s >= 0 the scale of the inputs

Each block takes what those before it left (compress/linalg/absolute_value.py), so any first blocks are a model: about 1 bit
per weight and block. s_j is the norm of input channel j over the calibration tokens, so that what inputs make loud is fitted
best; it is brought to a geometric mean of 1 and kept above FLOOR of its median, or channels that were silent in the
calibration would be lost. 1/s goes into whatever makes the input, a norm or the rows of a linear, where the model has such a
thing (`Layer.folds`); s is then rounded to powers of two, which leaves the model before the decomposition the same bit for
bit. Where nothing takes it (o under grouped-query attention), it is stored, in float16.

Behind the pass, blocks are put in the order in which they are worth loading: compress/methods/bitstack_order.py.

Departures from the public code: rounded factors are subtracted; signs follow the magnitude's own; s is the root of the sum over
all tokens, not the mean of the roots of each sequence; inputs are those behind the layers compressed before, which at all
blocks are next to the original's.

Source: BitStack, Wang et al., 2024, arXiv:2410.23918.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.calibration.statistics import Request, SiteStatistics, SquareSum
from compress.errors import NumericsError, RecipeError
from compress.linalg.absolute_value import decompose
from compress.linalg.quadratic import fraction
from compress.methods.base import (
    Kept,
    Layer,
    LayerShape,
    MethodConfig,
    Outcome,
    SiteMethod,
    SiteTask,
    StackView,
    shared,
)
from compress.methods.rtn import check_weight
from compress.modules.bitstack import BitStackLinear
from compress.modules.bitstack_spec import MAX_BLOCKS, BitStackSpec

USUAL_BLOCKS = 16  # of the paper
DENSE_BITS = 16  # more than these nobody loads
FLOOR = 0.01  # of the median scale; the public code adds 0.001 to norms of any size
SMALLEST = 2.0**-14  # of 1/s: the smallest number that float16 holds in full
NOT_CALIBRATED = "NOT CALIBRATED: no calibration token reached this layer; all its inputs counted alike"
MIB = 2**20


class BitStackConfig(MethodConfig):
    rank: int = Field(
        16, ge=1, description="of the magnitudes of a block: 16 rank (in + out) bits beside one per weight"
    )
    blocks: int | None = Field(
        None,
        ge=1,
        le=MAX_BLOCKS,
        description="residual blocks of each layer; by default 16, or as many as take less than the weight in 16 bits",
    )
    scaling: bool = Field(True, description="weigh inputs by their size on the calibration data; false: without data")
    order: Literal["proxy", "levels"] = Field(
        "proxy",
        description="of the stack: proxy: by one loss for each layer, and by what its blocks leave (without scaling, by that "
        "alone); levels: the paper's search, a perplexity for each layer and level",
    )
    rows: int = Field(32, ge=1, description="rows of another draw of the calibration data, that the order is found on")
    exact: bool = Field(False, description="full singular value decompositions, slower, in place of subspace iteration")
    file_mib: float = Field(
        128, gt=0, le=4096, description="MiB of a file of the stack, 64 to 256 where it is to travel"
    )


class BitStack(SiteMethod):
    name = "bitstack"
    summary = "stacks of one-bit residual blocks: one checkpoint, any size"
    Config = BitStackConfig
    on_leaves = False
    stacks = True

    @classmethod
    def plan(cls, shape: LayerShape, config: BitStackConfig) -> BitStackSpec | Kept:
        if shape.kind != "linear":
            raise RecipeError(f"{shape.name}: bitstack is for linears, not for tables; leave it out of layers")
        largest = min(shape.in_features, shape.out_features)
        if config.rank > largest:
            raise RecipeError(
                f"{shape.name}: rank={config.rank} is more than a matrix of {shape.out_features} x {shape.in_features} has; use "
                f"at most {largest}"
            )
        scaled = config.scaling and not shape.folds
        one = BitStackSpec(shape.in_features, shape.out_features, config.rank, 1, scaled)
        fitting = (
            shape.in_features * shape.out_features * DENSE_BITS // 8 - (one.nbytes("F16") - one.block_bytes)
        ) // (one.block_bytes)
        if config.blocks is not None:
            return one.first(config.blocks)
        if fitting < 1:
            return Kept(
                f"one block of rank {config.rank} takes more than the weight in {DENSE_BITS} bits; use a smaller rank"
            )
        return one.first(min(fitting, USUAL_BLOCKS))

    @classmethod
    def can_fold(cls, config: BitStackConfig) -> bool:
        return config.scaling

    @classmethod
    def statistics(cls, config: BitStackConfig) -> tuple[Request, ...]:
        return (SquareSum(),) if config.scaling else ()

    @classmethod
    def needs_tokens(cls, config: BitStackConfig) -> bool:
        return config.scaling or config.order == "levels"

    @classmethod
    def workspace(cls, shapes: tuple[LayerShape, ...], config: BitStackConfig) -> int:
        return 4 * 5 * max(s.out_features * s.in_features for s in shapes)

    @classmethod
    def flops(cls, shapes: tuple[LayerShape, ...], config: BitStackConfig) -> float:
        directions = 37 * 2 * (config.rank + 16) if not config.exact else 60 * min(s.in_features for s in shapes)
        n_blocks = config.blocks or USUAL_BLOCKS
        return float(n_blocks * (directions + 40)) * sum(s.out_features * s.in_features for s in shapes)

    @classmethod
    def compress(
        cls, site: SiteTask, statistics: SiteStatistics | None, generator: torch.Generator
    ) -> dict[str, Outcome]:
        known = SiteStatistics.usable(statistics, f"{', '.join(layer.name for layer in site.layers)}: bitstack")
        return {layer.name: _compress_layer(layer, known, generator) for layer in site.layers}

    @classmethod
    def order(cls, view: StackView, configs: Mapping[str, BitStackConfig]) -> Sequence[tuple[str, int]]:
        from compress.methods.bitstack_order import by_levels, by_proxy

        config = _shared(configs)
        return by_levels(view) if config.order == "levels" else by_proxy(view, config.scaling)

    @classmethod
    def order_rows(cls, configs: Mapping[str, BitStackConfig]) -> int:
        config = _shared(configs)
        return config.rows if BitStack.needs_tokens(config) else 0

    @classmethod
    def order_runs(cls, configs: Mapping[str, BitStackConfig], n_levels: int) -> float:
        if not cls.order_rows(configs):
            return 0.0
        passes = n_levels - 1 if _shared(configs).order == "levels" else 1
        return passes * (1 + len(configs) / 2) + 1  # on average, half of the blocks lie behind the one that changes

    @classmethod
    def stack_file_bytes(cls, configs: Mapping[str, BitStackConfig]) -> int:
        return int(_shared(configs).file_mib * MIB)


def _shared(configs: Mapping[str, BitStackConfig]) -> BitStackConfig:
    return shared(
        configs,
        ("order", "rows", "file_mib", "scaling"),
        "one stack holds the blocks of all; set it for all of them alike",
    )


def input_scale(squares: Tensor) -> Tensor:
    """s [in], positive, of geometric mean 1, for sums of squares of the inputs; one of all zeros is all ones."""
    norms = squares.double().sqrt()
    if not bool((norms > 0).any()):
        return torch.ones_like(norms).float()
    positive = norms[norms > 0]
    scale = norms.clamp(min=FLOOR * float(positive.median()))
    return (scale / scale.log().mean().exp()).clamp(max=1 / SMALLEST).float()


def power_of_two(scale: Tensor) -> Tensor:
    """The nearest power of two, by ratio."""
    return torch.exp2(scale.double().log2().round()).float()


def _compress_layer(layer: Layer, known: SiteStatistics | None, generator: torch.Generator) -> Outcome:
    check_weight(layer)
    config: BitStackConfig = layer.config
    spec = BitStack.plan(layer.shape, config)
    assert isinstance(spec, BitStackSpec), f"{layer.name}: {spec}"
    notes = []
    scale = torch.ones(spec.in_features, device=layer.weight.device)
    if config.scaling and known is None:
        notes.append(NOT_CALIBRATED)
    elif config.scaling:
        assert known is not None
        scale = input_scale(known[SquareSum()]).to(layer.weight.device)
    inverse = None
    if layer.folds:
        scale = power_of_two(scale)
    elif config.scaling:
        inverse = (1 / scale).half()  # what is stored; the weight is scaled by what that undoes
        scale = 1 / inverse.float()
    scaled = layer.weight * scale
    try:
        blocks = list(decompose(scaled, spec.rank, spec.blocks, exact=config.exact, generator=generator))
    except NumericsError as error:
        raise NumericsError(f"{layer.name}: bitstack: {error}") from None
    module = BitStackLinear(
        spec, [(b.signs, b.left, b.right) for b in blocks], inverse, layer.bias, dtype=layer.scale_dtype
    )
    energy = float(scaled.double().square().sum())
    report = {f"residual_{number}": fraction(b.energy, energy) for number, b in enumerate(blocks, start=1)}
    difference = (layer.weight * (scale if layer.folds else 1) - module.dense(torch.float32)).square_()
    weight = layer.weight * (scale if layer.folds else 1)
    report["weight_error"] = fraction(float(difference.double().sum()), float(weight.double().square().sum()))
    if known is not None:
        report["n_tokens"] = float(known.n_tokens)
    return Outcome(module, report, notes, fold=1 / scale if layer.folds else None)
