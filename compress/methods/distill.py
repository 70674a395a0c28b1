"""Distillation into scales and norms: what is left continuous in a compressed model, tuned on what the whole of it says.

    minimise  E_tokens KL(p_original || p_compressed)   over the scales of the codes and the weights of the norms

Codes and zero points stay, so the result has the same tensors, bytes and format. Methods that look at a layer or at a block
weigh all its outputs alike; here each counts by what it does to the prediction, and every block makes good what the others
lose. Adam moves each parameter by a share of its own size, a step that rises over WARM_UP iterations and falls as a cosine:

    m <- b1 m + (1 - b1) g u,   v <- b2 v + (1 - b2) (g u)^2,   p <- p - lr_t u m' / (sqrt(v') + eps)

with u = |p| for a scale, so that it keeps its sign; for a norm u is the root mean square of its vector. m', v': bias corrected.
The values that a run is made with are those that will be stored: rounded to their dtype, gradients go through the rounding.

Some rows are set aside; what was tuned is kept only if they diverge less than at the start.

Source: Chen et al., 2024, arXiv:2407.11062 (EfficientQAT, its second phase: quantization steps end to end), with the
divergence from the original as loss instead of the next token's likelihood, and with the norms beside the steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field

from compress.errors import NumericsError
from compress.methods.base import MethodConfig
from compress.methods.block_learning import batches
from compress.methods.tuning import Parameter, TuningMethod, TuningTask

BETAS = (0.9, 0.95)
EPSILON = 1e-10
WARM_UP = 5
JUDGED = 16  # one row of so many is set aside


class DistillConfig(MethodConfig):
    """Settings of distill."""

    iterations: int = Field(64, ge=0, description="steps; 0 changes nothing")
    batch_rows: int = Field(8, ge=1, description="calibration rows in each of them")
    lr: float = Field(0.002, gt=0, le=0.1, description="largest step, as a share of the parameter")
    parameters: Literal["scales", "norms", "all"] = Field("all", description="what is tuned")
    teacher: str | None = Field(
        None, description="the original, where the recipe's model is compressed already [default: the recipe's model]"
    )


class Distill(TuningMethod):
    name = "distill"
    summary = "tune scales and norms of the compressed model end to end; behind any step that leaves integer codes"
    Config = DistillConfig

    @classmethod
    def iterations(cls, config: DistillConfig) -> int:
        return config.iterations

    @classmethod
    def iteration_rows(cls, config: DistillConfig) -> int:
        return config.batch_rows

    @classmethod
    def wanted(cls, config: DistillConfig) -> frozenset[str]:
        return frozenset({"scales", "norms"} if config.parameters == "all" else {config.parameters})

    @classmethod
    def teacher(cls, config: DistillConfig) -> str | None:
        return config.teacher

    @classmethod
    def tune(cls, task: TuningTask, config: DistillConfig, generator: torch.Generator) -> dict[str, float]:
        aside, learned = set_aside(len(task.lengths))
        drawn = batches([task.lengths[row] for row in learned], config.batch_rows, generator)
        loss = math.nan
        for iteration in range(config.iterations):
            rows = [learned[place] for place in next(drawn)]
            if iteration < task.done:
                continue
            lr = step_size(iteration, config)

            def update(parameters: Mapping[str, Parameter], iteration: int = iteration, lr: float = lr) -> None:
                for parameter in parameters.values():
                    adam(parameter, iteration, lr)

            loss = task.descend(rows, update)
            if not math.isfinite(loss):
                raise NumericsError(f"distill: the divergence of iteration {iteration} is {loss}; use a smaller lr")
            task.tell(f"iteration {iteration + 1} of {config.iterations}, divergence {loss:.5f}")
        first, last = task.divergence(aside, start=True), task.divergence(aside)
        return {"divergence_start": first, "divergence": min(first, last), "kept": float(last < first)}


def set_aside(n_rows: int) -> tuple[list[int], list[int]]:
    """Rows to judge by and rows to learn from; of a single row, both."""
    aside = list(range(0, n_rows, JUDGED))
    learned = [row for row in range(n_rows) if row % JUDGED]
    return aside, learned or aside


def step_size(iteration: int, config: DistillConfig) -> float:
    rise = min(1.0, (iteration + 1) / WARM_UP)
    return config.lr * rise * 0.5 * (1 + math.cos(math.pi * iteration / max(config.iterations, 1)))


def adam(parameter: Parameter, iteration: int, lr: float) -> None:
    """One step, in place."""
    value, state = parameter.value, parameter.state
    unit: Any = value.abs() if parameter.relative else value.square().mean().sqrt()
    gradient = parameter.gradient * unit
    for key in ("mean", "square"):
        state.setdefault(key, torch.zeros_like(value))
    state["mean"].lerp_(gradient, 1 - BETAS[0])
    state["square"].lerp_(gradient.square(), 1 - BETAS[1])
    mean = state["mean"] / (1 - BETAS[0] ** (iteration + 1))
    square = state["square"] / (1 - BETAS[1] ** (iteration + 1))
    value.sub_(lr * unit * mean / (square.sqrt() + EPSILON))
