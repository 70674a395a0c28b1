"""The contract of methods that tune what is left continuous in a compressed model, from what the whole of it computes.

They stand behind all other steps. When every block is compressed, what can be moved without moving a code (scales, norms) is
handed over with the model's divergence from the original and its gradient. The model is streamed for it, forth and back: one
block is in memory at a time, and of the rest the hidden states between the blocks. Formats and sizes stay what they are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from compress.methods.base import MethodConfig


@dataclass
class Parameter:
    """One tensor that can be tuned: `value`, float32, changed in place; `gradient`, of the same shape; `relative`, whether each
    element is a factor of its own, as scales are. `state`: what an optimizer remembers, empty at first, kept like the value."""

    value: Tensor
    gradient: Tensor
    relative: bool
    state: dict[str, Tensor] = field(default_factory=dict)


Update = Callable[[Mapping[str, Parameter]], None]
"""Moves the parameters of one block, by name, as their gradients say. Called once for each block in every iteration."""


class TuningTask(Protocol):
    """A compressed model, to be tuned.

    Attributes:
        lengths: tokens of each calibration row.
        done: iterations that an interrupted run had finished. The values are those behind them.
        tell: takes a line about the progress.
    """

    lengths: list[int]
    done: int

    def tell(self, detail: str) -> None: ...

    def divergence(self, rows: list[int], start: bool = False) -> float:
        """Mean over the tokens of `rows` of KL(original || compressed), in nats; `start`: of the model before it was tuned."""

    def descend(self, rows: list[int], update: Update) -> float:
        """One iteration: the divergence of `rows`, and its gradients to `update`. Rows must be of one length."""


class TuningMethod(ABC):
    """A method that tunes the result. Subclasses set `name`, `summary` and `Config`; instances are not needed."""

    name: ClassVar[str]
    summary: ClassVar[str]
    Config: ClassVar[type[MethodConfig]]

    @classmethod
    @abstractmethod
    def tune(cls, task: TuningTask, config: Any, generator: torch.Generator) -> dict[str, float]:
        """Figures for the report. `kept` is 1 if the values are to be stored, 0 if the start was better.

        Raises: NumericsError.
        """

    @classmethod
    def iterations(cls, config: Any) -> int:
        """How many iterations it takes."""
        raise NotImplementedError

    @classmethod
    def iteration_rows(cls, config: Any) -> int:
        """How many rows each of them takes."""
        raise NotImplementedError

    @classmethod
    def wanted(cls, config: Any) -> frozenset[str]:
        """Which parameters are tuned: some of "scales" and "norms"."""
        raise NotImplementedError

    @classmethod
    def teacher(cls, config: Any) -> str | None:
        """The model that is the original; None: the one that the recipe compresses."""
        return None

    @classmethod
    def needs_tokens(cls, config: Any) -> bool:
        return True
