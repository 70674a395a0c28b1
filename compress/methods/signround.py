"""SignRound: learn which way each weight is rounded, and how wide each group's range is, from what the block makes of it.

    minimise  E |F(x; Q(W; V, c)) - F(x~; W)|^2,   Q = s * clamp(round(W / s + V), ...),   s = s0 * c

F is a decoder block, residual stream included; x~ enters it in the original model, x behind the compressed blocks before it,
so that each block also makes good what those have lost. V and c move by the signs of their gradients
(compress/methods/block_learning.py, compress/linalg/learned_rounding.py). The result is an ordinary integer checkpoint: the
same tensors and bytes as of `rtn` and `gptq`.

Where it starts: `rtn`, the weights themselves; or `gptq`, each column as it was just before GPTQ rounded it, so that V = 0 is
GPTQ's result and what is learned comes on top of it.

Departures from the published code: iterates are judged on one fixed set of rows, the start among them, not on the rows that
they were learned on; V is clamped to [-1/2, 1/2]; a factor per group moves the scale and a zero point stays, where the code
moves both ends of the range.

`parametrization: adaround` learns soft roundings by Adam instead, and makes them hard at the end; it wants thousands of
iterations, and its ranges stay.

Source: Cheng et al., 2023, arXiv:2309.05516; Nagel et al., 2020, arXiv:2004.10568.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from compress.calibration.statistics import Request, SecondMoment
from compress.errors import NumericsError
from compress.linalg.grid import Grid
from compress.linalg.learned_rounding import Start, learned_codes, learned_grid
from compress.methods.base import LayerShape, MethodConfig, Outcome, SiteMethod, shared
from compress.methods.bit_widths import MixedWidths
from compress.methods.block import BlockMethod, Learned, WindowTask
from compress.methods.block_learning import (
    Figures,
    LearnedLinear,
    Schedule,
    SoftLinear,
    learn_signs,
    learn_soft,
    squared_error,
)
from compress.methods.gptq import GPTQ, GPTQConfig
from compress.methods.rtn import RTN, RTNConfig
from compress.modules.quantized import QuantizedModule
from compress.modules.quantized_spec import QuantizedSpec

ADAM_LR = 1e-3  # AdaRound's code
TRAINING_FIELDS = (
    "start", "parametrization", "iterations", "lr", "range_lr", "learn_ranges", "batch_rows", "trim", "inputs", "half",
)  # fmt: skip
NOTHING_BETTER = "learning found nothing better than its start, which was kept"
WHY = "the layers of a block are learned together; give them one value"


class SignRoundConfig(GPTQConfig):
    """Settings of gptq, which it may start from, and of what is learned. Defaults that differ: the best at 2 to 4 bits."""

    clip: Literal["none", "mse"] = Field("mse", description="how the first ranges are found, as in gptq")
    start: Literal["rtn", "gptq"] = Field("gptq", description="what the rounding starts from")
    parametrization: Literal["sign", "adaround"] = Field(
        "sign", description="offsets moved by the signs of their gradients; or soft roundings and Adam"
    )
    iterations: int = Field(200, ge=0, description="steps per block; 0 is the start itself")
    lr: float | None = Field(
        None,
        gt=0,
        le=1,
        description="first step of the offsets, in steps of the grid [default: 1 / iterations; adaround: 0.001]",
    )
    range_lr: float | None = Field(None, ge=0, le=1, description="first step of the range factors [default: lr]")
    learn_ranges: bool = Field(True, description="learn the ranges too")
    batch_rows: int = Field(8, ge=1, description="calibration rows in each iteration")
    trim: float = Field(0.0, ge=0, lt=0.5, description="fraction of the largest errors of a batch that count nothing")
    inputs: Literal["quantized", "original"] = Field(
        "quantized",
        description="what a block is learned on: what the compressed blocks before it give, or the original ones",
    )
    half: bool = Field(False, description="products of the learning in bfloat16: faster where the processor has it")

    @model_validator(mode="after")
    def _one_stream(self) -> SignRoundConfig:
        if self.gptaq:
            raise ValueError("gptaq belongs to gptq alone; drop it: signround itself matches the original's outputs")
        return self

    def schedule(self) -> Schedule:
        lr = self.lr or (ADAM_LR if self.parametrization == "adaround" else 1 / max(self.iterations, 1))
        range_lr = lr if self.range_lr is None else self.range_lr
        original = self.inputs == "original"
        return Schedule(self.iterations, lr, range_lr, self.batch_rows, original, self.half)


class SignRound(MixedWidths, BlockMethod):
    name = "signround"
    summary = "learned rounding and ranges, block by block: integer weights of 2 to 8 bits, better than gptq below 4"
    Config = SignRoundConfig

    @classmethod
    def start(cls, config: SignRoundConfig) -> tuple[type[SiteMethod], MethodConfig]:
        if config.start == "rtn":
            return RTN, RTNConfig(**{name: getattr(config, name) for name in RTNConfig.model_fields})
        return GPTQ, GPTQConfig(**{name: getattr(config, name) for name in GPTQConfig.model_fields})

    @classmethod
    def probe(cls, config: SignRoundConfig) -> tuple[type[SiteMethod], MethodConfig]:
        return GPTQ, GPTQConfig(**{name: getattr(config, name) for name in GPTQConfig.model_fields})

    @classmethod
    def plan(cls, shape: LayerShape, config: SignRoundConfig) -> QuantizedSpec:
        method, first = cls.start(config)
        spec = method.plan(shape, first)
        assert isinstance(spec, QuantizedSpec)
        return spec

    @classmethod
    def in_multiple(cls, config: SignRoundConfig) -> int:
        return max(config.group_size, 1)

    @classmethod
    def statistics(cls, config: SignRoundConfig) -> tuple[Request, ...]:
        if cls.observes(config):
            return (SecondMoment(),)
        method, first = cls.start(config)
        return method.statistics(first)

    @classmethod
    def workspace(cls, shapes: tuple[LayerShape, ...], config: SignRoundConfig) -> int:
        method, first = cls.start(config)
        return method.workspace(shapes, first)

    @classmethod
    def flops(cls, shapes: tuple[LayerShape, ...], config: SignRoundConfig) -> float:
        method, first = cls.start(config)
        return method.flops(shapes, first)

    @classmethod
    def window(cls, configs: Mapping[str, SignRoundConfig]) -> int:
        shared(configs, TRAINING_FIELDS, WHY)
        return 1

    @classmethod
    def original_inputs(cls, configs: Mapping[str, SignRoundConfig]) -> bool:
        return shared(configs, ("inputs",), WHY).inputs == "original"

    @classmethod
    def learning_bytes(cls, shapes: tuple[LayerShape, ...], config: SignRoundConfig, length: int, widest: int) -> int:
        weights = sum(s.out_features * s.in_features for s in shapes)
        # the weight rounded from, V, its gradient, the start's V, two candidates; codes; W' of all layers
        return weights * (4 * 6 + 2 + 4) + 4 * config.batch_rows * length * widest * 2 * len(shapes)

    @classmethod
    def learning_flops(cls, shapes: tuple[LayerShape, ...], config: SignRoundConfig, length: int) -> float:
        weights = sum(s.out_features * s.in_features for s in shapes)
        return config.iterations * weights * (6.0 * config.batch_rows * length + 60)

    @classmethod
    def learn(cls, task: WindowTask, generator: torch.Generator) -> Learned:
        config = shared({name: layer.config for name, layer in task.layers.items()}, TRAINING_FIELDS, WHY)
        loss = partial(squared_error, trim=config.trim)
        left = None
        if config.parametrization == "adaround":
            soft = {name: SoftLinear(start_of(task, name), task.layers[name].bias) for name in task.layers}
            figures, left = learn_soft(task, soft, config.schedule(), loss, generator)
            modules: dict[str, LearnedLinear] = dict(soft)
        else:
            modules = {name: LearnedLinear(start_of(task, name), task.layers[name].bias) for name in task.layers}
            for module in modules.values():
                module.factor.requires_grad_(config.learn_ranges)
            figures = learn_signs(task, modules, config.schedule(), loss, generator)
        return Learned({name: outcome(task, name, modules[name], figures, left) for name in task.finish})


def start_of(task: WindowTask, name: str) -> Start:
    """Where learning starts for a layer that is new in the window."""
    outcome = task.started[name]
    assert outcome.continuous is not None
    return start_on(outcome.module, outcome.continuous.contiguous())


def start_on(module: nn.Module, weight: Tensor) -> Start:
    """The start whose first codes are those of `module`, on its grid; `weight` [out, in]: what they were rounded from."""
    assert isinstance(module, QuantizedModule)
    zero_points = module.zero_points()
    grid = Grid(module.spec.bits, module.weight_scale.detach(), None if zero_points is None else zero_points.int())
    return Start(weight, grid)


def outcome(task: WindowTask, name: str, module: LearnedLinear, figures: Figures, left: float | None = None) -> Outcome:
    """A finished layer. Report: what its start reported, as `start_...`; `block_error`, the block's mean squared error on the
    judged rows, and `block_error_start`, that before learning; `moved`, the fraction of codes that differ from the start's;
    `undecided`, of AdaRound, the fraction of weights that had chosen no neighbour."""
    started = task.started[name]
    first = started.module
    assert isinstance(first, QuantizedModule)
    stored = stored_module(name, first.spec, module, first.bias)
    report = {f"start_{key}": value for key, value in started.report.items()}
    report |= {"block_error_start": figures.start, "block_error": figures.kept}
    report["moved"] = float((first.codes() != stored.codes()).float().mean())
    if left is not None:
        report["undecided"] = left
    notes = list(started.notes)
    if figures.which == "start":
        notes.append(NOTHING_BETTER)
    return Outcome(stored, report, notes)


def stored_module(
    name: str, spec: QuantizedSpec, learned: LearnedLinear, bias: Tensor | None = None
) -> QuantizedModule:
    """What is stored of a layer, or of a part of it, whose rounding was learned.

    Raises: NumericsError naming the layer.
    """
    grid = learned_grid(learned.start, learned.factor.detach())
    if not torch.isfinite(grid.scale).all():
        raise NumericsError(f"{name}: a scale is not finite after learning; lower range_lr")
    codes = learned_codes(learned.start, learned.offset.detach(), learned.factor.detach())
    return QuantizedModule.from_codes(codes, grid.scale, grid.zero_point, spec, bias)
