"""The contract of methods that learn the layers of a block together, from what the block makes of its inputs.

    minimise over what the layers may be   E |F(x; W') - F(x; W)|^2,   F one block, or a window of several

The pipeline first rounds the block's layers site by site with another method (`start`), as if that were all; then it hands
over the block, its inputs, and what the original model has at the block's end. A `window` of several blocks is learned
together; the first of them is then finished, and the window moves on. What was learned of the others goes with it
(`Learned.state`), on disk too, where a resumed run finds it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from compress.calibration.statistics import SiteStatistics
from compress.methods.base import Layer, LayerShape, MethodConfig, Outcome, SiteMethod, SiteTask


class Rows(Protocol):
    """The calibration data of a window, row by row."""

    lengths: list[int]
    """Tokens of each row."""

    def inputs(self, rows: list[int], original: bool = False) -> Tensor:
        """What enters the window [rows, length, hidden_size], behind the compressed blocks before it, or in the original model.
        Rows must be of one length."""

    def targets(self, rows: list[int]) -> Tensor:
        """What leaves the window in the original model."""


@dataclass(frozen=True)
class WindowTask:
    """Layers of a window of blocks, to be learned together.

    Attributes:
        name: of the first block.
        layers: of all its blocks that the step applies to, by name.
        started: what `start` made of those that are new in the window, with `Outcome.continuous`.
        states: what `learn` returned for the others when the window stood one block earlier.
        finish: names of the layers of the first block, whose outcomes are wanted.
        rows: the calibration data.
        run: the window's forward, [rows, length, hidden_size] -> the same, differentiable in what `replaced` put in.
        replaced: puts modules in the place of layers, by name, while it lasts.
        final: whether the window stays no longer: its first block is to be finished from `states`, without learning.
        tell: takes a line about the progress.
    """

    name: str
    layers: Mapping[str, Layer]
    started: Mapping[str, Outcome]
    states: Mapping[str, Mapping[str, Tensor]]
    finish: frozenset[str]
    rows: Rows
    run: Callable[[Tensor], Tensor]
    replaced: Callable[[Mapping[str, nn.Module]], AbstractContextManager[None]]
    final: bool
    tell: Callable[[str], None]


@dataclass
class Learned:
    """`outcomes` of the layers to finish; `state` of the others, tensors by layer and name."""

    outcomes: dict[str, Outcome]
    state: dict[str, dict[str, Tensor]] = field(default_factory=dict)


class BlockMethod(SiteMethod):
    """A method that learns a block's layers together. `on_leaves` is False: it works on whole weights."""

    on_leaves = False
    by_blocks = True

    @classmethod
    @abstractmethod
    def start(cls, config: Any) -> tuple[type[SiteMethod], MethodConfig]:
        """What rounds a layer first, and its settings: its `plan` is that of this method."""

    @classmethod
    def prepared(cls, weight: Tensor, config: Any) -> Tensor:
        """What the start rounds, and learning goes on from, in place of a layer's weight [out_features, in_features]; what is to
        be matched stays."""
        return weight

    @classmethod
    @abstractmethod
    def learn(cls, task: WindowTask, generator: torch.Generator) -> Learned:
        """Learn from the start. Raises: NumericsError naming block and step."""

    @classmethod
    def resumed(cls, layer: Layer, state: Mapping[str, Tensor]) -> nn.Module:
        """A layer as learned so far, to run with: of methods that learn over several blocks."""
        raise NotImplementedError

    @classmethod
    def window(cls, configs: Mapping[str, Any]) -> int:
        """How many blocks are learned together. Asked in the plan: RecipeError if settings differ that must not."""
        return 1

    @classmethod
    def stride(cls, configs: Mapping[str, Any]) -> int:
        """By how many blocks the window moves, 1 .. `window`: the blocks that it leaves are finished as they were learned."""
        return 1

    @classmethod
    def original_inputs(cls, configs: Mapping[str, Any]) -> bool:
        """Whether the original model's inputs of a window are wanted beside the compressed one's."""
        return False

    @classmethod
    def needs_tokens(cls, config: Any) -> bool:
        return True

    @classmethod
    def learning_bytes(cls, shapes: tuple[LayerShape, ...], config: Any, length: int, widest: int) -> int:
        """Peak bytes of `learn`, beyond the weights of its blocks. `shapes` are the layers of one block of the window, rows have
        `length` tokens, layers up to `widest` inputs."""
        return 0

    @classmethod
    def learning_flops(cls, shapes: tuple[LayerShape, ...], config: Any, length: int) -> float:
        """Floating-point operations of `learn` for the layers of one block; rows have `length` tokens."""
        return 0.0

    @classmethod
    def compress(
        cls, site: SiteTask, statistics: SiteStatistics | None, generator: torch.Generator
    ) -> dict[str, Outcome]:
        """What has no block around it (the head, the token table) is what it starts with."""
        by_method: dict[type[SiteMethod], list[Layer]] = {}
        for layer in site.layers:
            method, config = cls.start(layer.config)
            by_method.setdefault(method, []).append(
                replace(layer, config=config, weight=cls.prepared(layer.weight, layer.config))
            )
        outcomes: dict[str, Outcome] = {}
        for method, layers in by_method.items():
            part = SiteTask(site.name, tuple(layers), site.tell, site.continuous)
            outcomes |= method.compress(part, statistics, generator)
        return {layer.name: outcomes[layer.name] for layer in site.layers}
