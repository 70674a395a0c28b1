"""CBQ: learned rounding over windows of blocks that overlap, so that a block is also rounded for what comes behind it.

    minimise over blocks i .. i+K-1 together   E(T(W', x), T(W, x~)) + E(T(W', x), T(W, x))

T is the window; x enters it behind the compressed blocks before it, x~ in the original model. The first term makes good what
was lost before, the second, with the same input on both sides, shows the window's own error alone ("homologous"; optional).

    E(a, b) = mean |a - b|^2 + divergence * KL(softmax(b) || softmax(a)),   softmax over the features

Then the window moves on by K - overlap blocks. A block is finished when the window leaves it; one that stays goes on from where
it was. K = 1 is `signround`. What is learned there is learned here, in the same ways, and in a third one:

    low_rank:  W' = s clamp(floor(W / s) + h(V0 + A B)),  A [out, r], B [r, in]     fewer variables; Adam; hard at the end

V0 is where each weight stands between its neighbours: A B = 0 is the weight itself. Nothing of A and B is stored.

The paper has no public code; the two terms' weights, the direction of the divergence and A B on top of V0 are choices of ours.
`truncate` cuts outliers of the weights first, as there (compress/linalg/outliers.py); activations, which nothing rounds, keep
theirs.

Source: Ding et al., 2023, arXiv:2312.07950.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from compress.linalg.grid import Grid
from compress.linalg.learned_rounding import Start, learned_codes
from compress.linalg.outliers import truncated
from compress.methods.base import Layer, LayerShape, Outcome, shared
from compress.methods.block import Learned, WindowTask
from compress.methods.block_learning import LearnedLinear, Schedule, SoftLinear, learn_signs, learn_soft, squared_error
from compress.methods.rtn import quantized_spec
from compress.methods.signround import (
    ADAM_LR,
    NOTHING_BETTER,
    TRAINING_FIELDS,
    WHY,
    SignRound,
    SignRoundConfig,
    start_of,
    stored_module,
)

FIELDS = (*TRAINING_FIELDS, "window", "overlap", "homologous", "divergence", "rank")


class CBQConfig(SignRoundConfig):
    """Settings of signround, of the windows, and of what is matched."""

    parametrization: Literal["sign", "adaround", "low_rank"] = Field(  # type: ignore[assignment]
        "sign",
        description="what is learned: offsets by signs; soft roundings by Adam; the same as a product of rank `rank`",
    )
    truncate: bool = Field(
        False, description="cut each layer's outliers to the largest other weight before anything is rounded"
    )
    rank: int = Field(5, ge=1, description="of low_rank's product")
    window: int = Field(2, ge=1, description="blocks learned together")
    overlap: int = Field(1, ge=0, description="blocks that a window shares with the next")
    homologous: bool = Field(True, description="match what the original weights make of the same inputs, too")
    divergence: float = Field(
        0.0, ge=0, description="weight of KL between the softmax of the outputs beside their squared difference"
    )

    @model_validator(mode="after")
    def _windows_move(self) -> CBQConfig:
        if self.overlap >= self.window:
            raise ValueError(
                f"overlap={self.overlap} must be less than window={self.window}; use {self.window - 1} or less"
            )
        return self

    def schedule(self) -> Schedule:
        base = super().schedule()
        if self.parametrization != "sign" and self.lr is None:
            base = replace(base, lr=ADAM_LR)
        return replace(base, homologous=self.homologous)


class CBQ(SignRound):
    name = "cbq"
    summary = "learned rounding over overlapping windows of blocks: integer weights of 2 to 8 bits"
    Config = CBQConfig

    @classmethod
    def window(cls, configs: Mapping[str, CBQConfig]) -> int:  # type: ignore[override]
        return shared(configs, FIELDS, WHY).window

    @classmethod
    def prepared(cls, weight: Tensor, config: CBQConfig) -> Tensor:
        return truncated(weight) if config.truncate else weight

    @classmethod
    def stride(cls, configs: Mapping[str, CBQConfig]) -> int:
        config = shared(configs, FIELDS, WHY)
        return config.window - config.overlap

    @classmethod
    def learning_bytes(cls, shapes: tuple[LayerShape, ...], config: SignRoundConfig, length: int, widest: int) -> int:
        return config.window * super().learning_bytes(shapes, config, length, widest)  # type: ignore[attr-defined]

    @classmethod
    def learning_flops(cls, shapes: tuple[LayerShape, ...], config: SignRoundConfig, length: int) -> float:
        assert isinstance(config, CBQConfig)
        visits = config.window / (config.window - config.overlap)
        return visits * super().learning_flops(shapes, config, length) * (4 / 3 if config.homologous else 1)

    @classmethod
    def learn(cls, task: WindowTask, generator: torch.Generator) -> Learned:
        config = shared({name: layer.config for name, layer in task.layers.items()}, FIELDS, WHY)
        modules = {name: _module(task, name, config, generator) for name in task.layers}
        figures, left = None, None
        if not task.final:

            def loss(output: Tensor, target: Tensor) -> Tensor:
                return window_error(output, target, config.trim, config.divergence)

            if config.parametrization == "sign":
                for module in modules.values():
                    module.factor.requires_grad_(config.learn_ranges)
                figures = learn_signs(task, modules, config.schedule(), loss, generator)
            else:
                soft = {name: module for name, module in modules.items() if isinstance(module, SoftLinear)}
                figures, left = learn_soft(task, soft, config.schedule(), loss, generator)
        outcomes, state = {}, {}
        for name, module in modules.items():
            kept = _state(task, name, module)
            if figures is not None:
                kept |= {"error_start": torch.tensor(figures.start), "error": torch.tensor(figures.kept)}
                kept["was_start"] = torch.tensor(figures.which == "start")
                if left is not None:
                    kept["undecided"] = torch.tensor(left)
            if name in task.finish:
                outcomes[name] = _finished(task, name, module, kept)
            else:
                state[name] = kept
        return Learned(outcomes, state)

    @classmethod
    def resumed(cls, layer: Layer, state: Mapping[str, Tensor]) -> nn.Module:
        module = _from_state(layer, state)
        if isinstance(module, SoftLinear):
            module.harden()
        return module


def window_error(output: Tensor, target: Tensor, trim: float, divergence: float) -> Tensor:
    """E(output, target), both [rows, length, hidden_size]; the largest `trim` of the squared differences count nothing."""
    error = squared_error(output, target, trim)
    if divergence == 0:
        return error
    own, wanted = output.float().log_softmax(-1), target.float().log_softmax(-1)
    return error + divergence * (wanted.exp() * (wanted - own)).sum(-1).mean()


def _module(task: WindowTask, name: str, config: CBQConfig, generator: torch.Generator) -> LearnedLinear:
    layer = task.layers[name]
    if name in task.states:
        return _from_state(layer, task.states[name])
    start = start_of(task, name)
    if config.parametrization == "sign":
        return LearnedLinear(start, layer.bias)
    rank = config.rank if config.parametrization == "low_rank" else 0
    return SoftLinear(start, layer.bias, rank, generator)


def _state(task: WindowTask, name: str, module: LearnedLinear) -> dict[str, Tensor]:
    """What is needed to go on with a layer, and to finish it."""
    state = {"weight": module.start.weight, "scale": module.start.grid.scale}
    if module.start.grid.zero_point is not None:
        state["zero_point"] = module.start.grid.zero_point
    if isinstance(module, SoftLinear):
        state |= {f"part{i}": part.detach() for i, part in enumerate(module.parts)}
    else:
        state |= {"offset": module.offset.detach(), "factor": module.factor.detach()}
    if name in task.states:
        known = task.states[name]
        state |= {key: known[key] for key in known if key not in state}
    else:
        state |= {f"start_{key}": torch.tensor(value) for key, value in task.started[name].report.items()}
        state["notes"] = torch.tensor(list(json.dumps(task.started[name].notes).encode()), dtype=torch.uint8)
        state["codes"] = learned_codes(module.start, None, torch.ones_like(module.factor))
    return state


def _from_state(layer: Layer, state: Mapping[str, Tensor]) -> LearnedLinear:
    config: CBQConfig = layer.config
    start = Start(state["weight"], Grid(config.bits, state["scale"], state.get("zero_point")))
    if config.parametrization == "sign":
        module = LearnedLinear(start, layer.bias)
        module.put((state["offset"], state["factor"]))
        return module
    soft = SoftLinear(start, layer.bias, config.rank if config.parametrization == "low_rank" else 0)
    soft.parts = tuple(state[f"part{i}"].clone().requires_grad_() for i in range(len(soft.parts)))
    return soft


def _finished(task: WindowTask, name: str, module: LearnedLinear, state: Mapping[str, Tensor]) -> Outcome:
    """Report: as of signround; the errors are those of the last window that the layer was learned in."""
    if isinstance(module, SoftLinear):
        module.harden()
    layer = task.layers[name]
    stored = stored_module(name, quantized_spec(layer.shape, layer.config), module, layer.bias)
    report = {key: float(value) for key, value in state.items() if key.startswith("start_")}
    report |= {"block_error_start": float(state["error_start"]), "block_error": float(state["error"])}
    report["moved"] = float((state["codes"] != stored.codes()).float().mean())
    if "undecided" in state:
        report["undecided"] = float(state["undecided"])
    notes = json.loads(bytes(state["notes"].tolist()))
    if state["was_start"]:
        notes.append(NOTHING_BETTER)
    return Outcome(stored, report, notes)
