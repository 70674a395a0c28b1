"""SignRound with a low-rank correction beside the codes: both are learned from what the block makes of its inputs.

    minimise  E |F(x; W') - F(x~; W)|^2,   W' = Q(W0; V, c) + Q(L0; V_L, c_L) Q(R0; V_R, c_R)

F, x and x~ as in `signround`; Q as there (compress/linalg/learned_rounding.py). The start is what `lq_lora` makes of the layer:
its codes with V = 0, c = 1, and its pair in codes of `factor_bits`. Signs of gradients move all of them. The offsets of the
codes stay within half a step, as in SignRound; those of the factors may go anywhere on their grids, so the pair is learned,
not only its rounding. The result has the size and the form of `lq_lora`'s.

With rounds=1 the start is `lqer`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.calibration.statistics import Request
from compress.linalg.learned_rounding import FACTOR_RANGE, Start
from compress.methods.base import Kept, LayerShape, MethodConfig, Outcome, SiteMethod, shared
from compress.methods.bit_widths import MixedWidths
from compress.methods.block import BlockMethod, Learned, WindowTask
from compress.methods.block_learning import Figures, LearnedLinear, Schedule, learn_signs, squared_error
from compress.methods.lq_lora import LQLoRA, LQLoRAConfig
from compress.methods.signround import NOTHING_BETTER, WHY, start_on, stored_module
from compress.modules.corrected import CorrectedLinear
from compress.modules.corrected_spec import FACTORS, CorrectedSpec
from compress.modules.quantized import QuantizedModule

TRAINING_FIELDS = (
    "iterations", "lr", "range_lr", "factor_lr", "learn_ranges", "batch_rows", "trim", "inputs", "half",
)  # fmt: skip


class LQSignRoundConfig(LQLoRAConfig):
    """Settings of lq_lora, which it starts from, and of what is learned."""

    factor_bits: Literal[8, 4] = Field(  # type: ignore[assignment]
        4, description="bits of the correction's factors: integers with a scale per row"
    )
    quantizer: Literal["gptq", "rtn"] = Field(  # type: ignore[assignment]
        "gptq", description="what rounds at the start; settings of gptq alone are of no effect with rtn"
    )
    rounds: int = Field(1, ge=1, description="of the start: roundings at most, as in lq_lora")
    iterations: int = Field(200, ge=0, description="steps per block; 0 is the start itself")
    lr: float | None = Field(
        None, gt=0, le=1, description="first step of the offsets, in steps of the grid [default: 1 / iterations]"
    )
    range_lr: float | None = Field(None, ge=0, le=1, description="first step of the range factors [default: lr]")
    factor_lr: float = Field(
        8.0, ge=0, description="first step of the factors' offsets, as a multiple of lr; 0 leaves the pair as it is"
    )
    learn_ranges: bool = Field(True, description="learn the ranges too")
    batch_rows: int = Field(8, ge=1, description="calibration rows in each iteration")
    trim: float = Field(0.0, ge=0, lt=0.5, description="fraction of the largest errors of a batch that count nothing")
    inputs: Literal["quantized", "original"] = Field(
        "quantized",
        description="what a block is learned on: what the compressed blocks before it give, or the original ones",
    )
    half: bool = Field(False, description="products of the learning in bfloat16: faster where the processor has it")

    def schedule(self) -> Schedule:
        lr = self.lr or 1 / max(self.iterations, 1)
        range_lr = lr if self.range_lr is None else self.range_lr
        return Schedule(self.iterations, lr, range_lr, self.batch_rows, self.inputs == "original", self.half)


class LQSignRound(MixedWidths, BlockMethod):
    name = "lq_signround"
    summary = "integer weights and a low-rank correction, both learned block by block"
    Config = LQSignRoundConfig

    @classmethod
    def start(cls, config: LQSignRoundConfig) -> tuple[type[SiteMethod], MethodConfig]:
        return LQLoRA, LQLoRAConfig(**{name: getattr(config, name) for name in LQLoRAConfig.model_fields})

    @classmethod
    def plan(cls, shape: LayerShape, config: LQSignRoundConfig) -> CorrectedSpec | Kept:
        return LQLoRA.plan(shape, config)

    @classmethod
    def in_multiple(cls, config: LQSignRoundConfig) -> int:
        return LQLoRA.in_multiple(config)

    @classmethod
    def fitted(cls, config: LQSignRoundConfig, multiple: int) -> LQSignRoundConfig:
        fitted = LQLoRA.fitted(config, multiple)
        assert isinstance(fitted, LQSignRoundConfig)
        return fitted

    @classmethod
    def statistics(cls, config: LQSignRoundConfig) -> tuple[Request, ...]:
        return LQLoRA.statistics(config)

    @classmethod
    def workspace(cls, shapes: tuple[LayerShape, ...], config: LQSignRoundConfig) -> int:
        return LQLoRA.workspace(shapes, config)

    @classmethod
    def flops(cls, shapes: tuple[LayerShape, ...], config: LQSignRoundConfig) -> float:
        return LQLoRA.flops(shapes, config)

    @classmethod
    def window(cls, configs: Mapping[str, LQSignRoundConfig]) -> int:
        shared(configs, TRAINING_FIELDS, WHY)
        return 1

    @classmethod
    def original_inputs(cls, configs: Mapping[str, LQSignRoundConfig]) -> bool:
        return shared(configs, ("inputs",), WHY).inputs == "original"

    @classmethod
    def learning_bytes(cls, shapes: tuple[LayerShape, ...], config: LQSignRoundConfig, length: int, widest: int) -> int:
        weights = sum(s.out_features * s.in_features for s in shapes)
        # the weight rounded from, V, its gradient, the start's V, two candidates; steps and clamp; W', L R and their sum
        return weights * (4 * 6 + 2 + 12) + 4 * config.batch_rows * length * widest * 2 * len(shapes)

    @classmethod
    def learning_flops(cls, shapes: tuple[LayerShape, ...], config: LQSignRoundConfig, length: int) -> float:
        rank = config.rank
        weights = sum(s.out_features * s.in_features for s in shapes)
        return config.iterations * weights * (6.0 * config.batch_rows * length + 6.0 * rank + 60)

    @classmethod
    def learn(cls, task: WindowTask, generator: torch.Generator) -> Learned:
        config = shared({name: layer.config for name, layer in task.layers.items()}, TRAINING_FIELDS, WHY)
        modules = {name: learned_linear(task, name) for name in task.layers}
        for module in modules.values():
            for part in (module, *module.pair):
                part.factor.requires_grad_(config.learn_ranges)
        loss = partial(squared_error, trim=config.trim)
        figures = learn_signs(task, modules, config.schedule(), loss, generator)
        return Learned({name: outcome(task, name, modules[name], figures) for name in task.finish})


class LearnedCorrected(LearnedLinear):
    """x @ W'.T + bias, W' the codes and the pair as the present offsets and factors round them."""

    def __init__(self, start: Start, pair: tuple[Start, Start], bias: Tensor | None, factor_lr: float):
        """`pair`: R and L."""
        super().__init__(start, bias)
        right, left = pair
        self.pair: tuple[LearnedLinear, LearnedLinear] = (LearnedLinear(right, None), LearnedLinear(left, None))
        self.factor_lr = factor_lr
        for part in self.pair:
            part.offset.requires_grad_(factor_lr > 0)

    def learned(self) -> Tensor:
        right, left = (part.learned() for part in self.pair)
        return super().learned() + left @ right

    def moves(self, schedule: Schedule) -> list[tuple[Tensor, float, tuple[float, float]]]:
        moves = super().moves(schedule)
        for part in self.pair:
            steps = 2.0**part.start.grid.bits
            moves.append((part.offset, self.factor_lr * schedule.lr, (-steps, steps)))
            moves.append((part.factor, schedule.range_lr, FACTOR_RANGE))
        return moves

    def copy(self) -> tuple[Tensor, ...]:
        return (*super().copy(), *(value for part in self.pair for value in part.copy()))

    def put(self, values: Sequence[Tensor]) -> None:
        super().put(values[:2])
        for part, own in zip(self.pair, (values[2:4], values[4:]), strict=True):
            part.put(own)


def learned_linear(task: WindowTask, name: str) -> LearnedCorrected:
    """A layer with what its start made of it."""
    outcome, layer = task.started[name], task.layers[name]
    module = outcome.module
    assert isinstance(module, CorrectedLinear) and outcome.continuous is not None
    right, left = (start_on(part, part.dense(torch.float32)) for part in (module.right, module.left))  # type: ignore[operator]
    return LearnedCorrected(
        start_on(module.base, outcome.continuous.contiguous()), (right, left), layer.bias, layer.config.factor_lr
    )


def outcome(task: WindowTask, name: str, module: LearnedCorrected, figures: Figures) -> Outcome:
    """A finished layer. Report as of signround: what its start reported, as `start_...`; `block_error`, `block_error_start`;
    `moved`, the fraction of the base's codes that differ from the start's."""
    started = task.started[name]
    first = started.module
    assert isinstance(first, CorrectedLinear) and isinstance(first.base, QuantizedModule)
    parts = {part: getattr(first, part) for part in ("base", *FACTORS)}
    learned = dict(zip(parts, (module, *module.pair), strict=True))
    stored = {part: stored_module(name, parts[part].spec, own) for part, own in learned.items()}
    layer = task.layers[name]
    result = CorrectedLinear(first.spec, stored["base"], stored["right"], stored["left"], bias=layer.bias)
    report = {f"start_{key}": value for key, value in started.report.items()}
    report |= {"block_error_start": figures.start, "block_error": figures.kept}
    report["moved"] = float((first.base.codes() != stored["base"].codes()).float().mean())
    notes = [*started.notes, NOTHING_BETTER] if figures.which == "start" else list(started.notes)
    return Outcome(result, report, notes)
