"""RTN, round to nearest: every weight to the nearest value of its group's grid (compress/linalg/grid.py).

    minimises |w' - w| for each weight by itself

It needs no data and takes seconds. It is optimal where no two weights meet in one output, as in an embedding: a lookup
returns one row as it stands, so there is no error of one column that another could make good. In a linear layer GPTQ
does better with the same grid and the same bytes; RTN is its floor, and what it falls back to for a layer without
inputs.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from compress.calibration.statistics import Request, SecondMoment, SiteStatistics
from compress.errors import NumericsError, RecipeError
from compress.linalg.grid import Grid, GridRule, fit_grid
from compress.methods.base import Layer, LayerShape, MethodConfig, Outcome, SiteTask
from compress.methods.bit_widths import TOGETHER_MEANING, WIDTHS_MEANING, MixedWidths
from compress.modules.quantized import QuantizedModule
from compress.modules.quantized_spec import QuantizedSpec


class RTNConfig(MethodConfig):
    bits: int = Field(4, ge=2, le=8, description="bits per weight")
    group_size: int = Field(
        128, ge=-1, description="neighbouring inputs that share a scale; divides in_features; -1: one scale per row"
    )
    symmetric: bool = Field(
        True, description="ranges centred on 0; false adds a zero point per group, and closer ranges for skewed weights"
    )
    clip: Literal["none", "mse"] = Field(
        "none",
        description="'mse' searches a narrower range with less rounding error; 80 times the work of fitting a grid",
    )

    signed_scales: bool = Field(
        False,
        description="symmetric only: scales may be negative, so that the code more that one side has is where the largest "
        "weight is; same bytes, less error at 2 and 3 bits",
    )

    widths: tuple[Annotated[int, Field(ge=2, le=8)], ...] | None = Field(None, min_length=1, description=WIDTHS_MEANING)
    together: bool = Field(True, description=TOGETHER_MEANING)

    @model_validator(mode="after")
    def _signs_only_where_symmetric(self) -> RTNConfig:
        if self.signed_scales and not self.symmetric:
            raise ValueError("signed_scales=true is for symmetric grids; drop it, or use symmetric: true")
        return self

    @field_validator("group_size")
    @classmethod
    def _not_zero(cls, group_size: int) -> int:
        if group_size == 0:
            raise ValueError(
                "group_size=0 is no group; use -1 for one scale per row, or a size that divides in_features"
            )
        return group_size


class RTN(MixedWidths):
    name = "rtn"
    summary = "round to nearest: integer weights of 2 to 8 bits, no data needed"
    Config = RTNConfig
    keeps_masks = True  # zero is on every grid, and adds nothing to a symmetric range or to the error of a clipped one

    @classmethod
    def plan(cls, shape: LayerShape, config: RTNConfig) -> QuantizedSpec:
        return quantized_spec(shape, config)

    @classmethod
    def in_multiple(cls, config: RTNConfig) -> int:
        return max(config.group_size, 1)

    @classmethod
    def statistics(cls, config: RTNConfig) -> tuple[Request, ...]:
        return (SecondMoment(),) if cls.observes(config) else ()

    @classmethod
    def compress(
        cls, site: SiteTask, statistics: SiteStatistics | None, generator: torch.Generator
    ) -> dict[str, Outcome]:
        return {layer.name: round_layer(layer, continuous=site.continuous) for layer in site.layers}


def round_layer(layer: Layer, notes: tuple[str, ...] = (), continuous: bool = False) -> Outcome:
    """Round one layer, whatever method its config belongs to. Report: `weight_error`, ||W' - W||^2 / ||W||^2."""
    config: RTNConfig = layer.config
    check_weight(layer)
    try:
        grid = fit_grid(layer.weight, config.group_size, grid_rule(layer))
    except NumericsError as error:
        raise NumericsError(f"{layer.name}: {error}") from None
    codes = grid.encode(layer.weight)
    squared_error, squared = _squared_error(layer.weight, grid, codes)
    report = {"weight_error": squared_error / squared if squared else 0.0}
    return Outcome(
        quantized_module(layer, codes, grid), report, list(notes), continuous=layer.weight if continuous else None
    )


def grid_rule(layer: Layer) -> GridRule:
    config: RTNConfig = layer.config
    return GridRule(config.bits, config.symmetric, config.clip, layer.scale_dtype, config.signed_scales)


def quantized_spec(shape: LayerShape, config: RTNConfig) -> QuantizedSpec:
    """What a layer of integer codes stores. Raises: RecipeError if groups do not divide its rows, or zeros have no code."""
    if shape.masked and not config.symmetric:
        raise RecipeError(
            f"{shape.name}: is pruned by then, and the values that are left are stored without zero points; use symmetric: true"
        )
    if config.group_size != -1 and shape.in_features % config.group_size:
        usable = divisors(shape.in_features, near=config.group_size)
        raise RecipeError(
            f"{shape.name}: group_size={config.group_size} does not divide in_features={shape.in_features}; "
            f"use one of {usable}, or -1 for one group per row"
        )
    return QuantizedSpec(
        in_features=shape.in_features,
        out_features=shape.out_features,
        bits=config.bits,
        group_size=config.group_size,
        symmetric=config.symmetric,
        kind=shape.kind,
    )


def quantized_module(layer: Layer, codes: Tensor, grid: Grid) -> QuantizedModule:
    """The module that holds codes uint8 [out_features, in_features] on `grid`."""
    spec = quantized_spec(layer.shape, layer.config)
    return QuantizedModule.from_codes(codes, grid.scale, grid.zero_point, spec, layer.bias)


def check_weight(layer: Layer) -> None:
    if not torch.isfinite(layer.weight).all():
        n_bad = int((~torch.isfinite(layer.weight)).sum())
        raise NumericsError(
            f"{layer.name}: {n_bad} of {layer.weight.numel()} weights are NaN or infinite; the checkpoint is damaged: "
            f"download it again, or skip this layer"
        )


def divisors(n: int, near: int) -> list[int]:
    """Up to five divisors of `n` a group size may take (16 or more where there are such), those closest to `near`."""
    found = [d for d in range(1, n + 1) if n % d == 0]
    large = [d for d in found if d >= 16] or found
    return sorted(sorted(large, key=lambda d: max(d, near) / min(d, near))[:5])


def _squared_error(weight: Tensor, grid: Grid, codes: Tensor) -> tuple[float, float]:
    """||W' - W||^2 and ||W||^2, a thousand rows at a time."""
    error = total = 0.0
    for start in range(0, weight.shape[0], 1024):
        rows = slice(start, start + 1024)
        error += float((grid.rows(rows).decode(codes[rows]) - weight[rows]).square().sum())
        total += float(weight[rows].float().square().sum())
    return error, total
