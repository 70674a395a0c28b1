"""Sizes of lqer and its kin: what a layer will store, the rank that a size leaves room for, what finding the pair costs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.errors import RecipeError
from compress.linalg import krylov
from compress.linalg.ranks import rounded_rank
from compress.methods.base import Kept, LayerShape
from compress.methods.svd import SVD, SVDConfig
from compress.modules.corrected_spec import CorrectedSpec
from compress.modules.quantized_spec import QuantizedSpec
from compress.modules.spec import ModuleSpec

if TYPE_CHECKING:
    from compress.methods.lqer import LQERConfig

DOUBLE_FLOPS = 2.0  # what an operation in float64 takes, of one in float32
DENSE_BITS = 16  # of a float: sizes are reckoned in models of 16 bits


def bits_of(spec: CorrectedSpec) -> float:
    """Bits per weight, floats of 16 bits."""
    return 8 * spec.nbytes("BF16") / (spec.out_features * spec.in_features)


def base_spec(shape: LayerShape, config: LQERConfig) -> ModuleSpec | Kept:
    """What the quantizer stores. Raises: RecipeError where it refuses the layer."""
    method, rounding = config.rounding()
    return method.plan(shape, rounding)


def corrected_spec(shape: LayerShape, config: LQERConfig, base: ModuleSpec, rank: int) -> CorrectedSpec:
    """With a correction of `rank`, its factors as the settings say."""
    n, m = shape.in_features, shape.out_features
    right = left = None
    if config.factor_bits < DENSE_BITS:
        right, left = QuantizedSpec(n, rank, config.factor_bits, -1), QuantizedSpec(rank, m, config.factor_bits, -1)
    return CorrectedSpec(n, m, rank, base, right, left)


def rank_of(shape: LayerShape, config: LQERConfig, base: ModuleSpec) -> int:
    """Raises: RecipeError where none is possible, with what would make one."""
    most, multiple = min(shape.out_features, shape.in_features), config.rank_multiple
    if multiple > most:
        raise RecipeError(
            f"{shape.name}: ranks must be multiples of {multiple}, and a {shape.out_features} x {shape.in_features} layer has "
            f"none above {most}; use a smaller rank_multiple (or group_size in the step behind), or skip the layer"
        )
    if config.bits_per_weight is None:
        return rounded_rank(min(config.rank, most), multiple)
    least = bits_of(corrected_spec(shape, config, base, multiple))
    if least > config.bits_per_weight:
        raise RecipeError(
            f"{shape.name}: bits_per_weight={config.bits_per_weight:g} leaves no room for a correction: codes, scales and rank "
            f"{multiple} take {least:.3f}; use at least that, fewer bits or larger groups"
        )
    low, high = 1, most // multiple  # of multiples: the first fits
    while low < high:
        middle = (low + high + 1) // 2
        fits = bits_of(corrected_spec(shape, config, base, middle * multiple)) <= config.bits_per_weight
        low, high = (middle, high) if fits else (low, middle - 1)
    return low * multiple


def pair_flops(shape: LayerShape, config: LQERConfig) -> float:
    """Of one pair, in operations of a float32 matrix product."""
    out_features, in_features, base = shape.out_features, shape.in_features, base_spec(shape, config)
    assert not isinstance(base, Kept), f"{shape.name}: {base}"
    rank = rank_of(shape, config, base)
    if krylov.narrow(out_features, in_features, rank):
        return DOUBLE_FLOPS * krylov.flops(out_features, in_features, rank)
    return SVD.flops((shape,), SVDConfig())
