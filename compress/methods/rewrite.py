"""The contract of methods that rewrite the whole model: its basis, its width, its depth.

A `ModelMethod` answers with a `Rewrite`: the tensors of the result as functions of those of the source, each computed when
it is read, and how the model's structure differs. Nothing is copied in between: the pass over the blocks that follows, in
which other methods compress what there is, reads the rewritten model tensor by tensor.

What depends on activations is found before, in `observe`, which looks at the source through a `ModelView`: small figures
are returned, matrices are kept (`ModelView.keep`) in files. An interrupted run finds both again.

A new one: a file here, its line in `METHODS`, a recipe, a docs page, a test file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from compress.calibration.store import HiddenStates
from compress.methods.base import Extent, MethodConfig
from compress.models.derived import Derived
from compress.models.stream import Stream
from compress.models.structure import Structure


@dataclass(frozen=True)
class Rewrite:
    """The result of a rewrite, as far as it differs from the source.

    Attributes:
        tensors: those that are new or other than in the source, by name.
        removed: names of tensors that the result does not have.
        blocks: numbers of the blocks that stay, in order; None: all. They are numbered anew; `tensors` has the old names.
        untied: the head gets a weight of its own, which `tensors` has.
        structure: how the model's modules differ from what its config.json says.
        mark: what config.json is to remember of the rewrite, for rewrites to come (`ModelShape.marks`).
        note: a line for the plan: what was done.
        warnings: of the plan.
    """

    tensors: Mapping[str, Derived] = field(default_factory=dict)
    removed: frozenset[str] = frozenset()
    blocks: tuple[int, ...] | None = None
    untied: bool = False
    structure: Structure = field(default_factory=Structure)
    mark: tuple[str, ...] = ()
    note: str = ""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelShape:
    """A model as the plan knows it: no weights.

    Attributes:
        title: its family, as people say, and its model_type: for messages.
        shapes: of every tensor by its name on disk.
        n_blocks: how many blocks it has.
        blocks: their prefixes.
        linears: names of all linears of the blocks.
        stream: its residual stream; raises RecipeError, by name and with the reason, if that cannot be rewritten.
        nbytes: of every tensor.
        float_bytes: of a float as the result stores it.
        compressed: names of modules that are compressed already (`ModelMethod.on_compressed`).
        marks: what rewrites before, in whatever run, left to be remembered, by the name of their method.
    """

    title: str
    shapes: Mapping[str, tuple[int, ...]]
    blocks: tuple[str, ...]
    linears: tuple[str, ...]
    hidden_size: int
    stream: Callable[[], Stream]
    nbytes: Mapping[str, int] = field(default_factory=dict)
    float_bytes: int = 2
    compressed: frozenset[str] = frozenset()
    marks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def n_blocks(self) -> int:
        return len(self.blocks)


@dataclass(frozen=True)
class Found:
    """What is known when a rewrite is asked for.

    Attributes:
        values: what `observe` returned; None in the plan of a method that observes, before it has.
        tensor: a tensor that `observe` kept, by name.
        generator: randomness that depends on the seed of the run, the step and a purpose.
    """

    values: Mapping[str, Any] | None
    tensor: Callable[[str], Tensor]
    generator: Callable[[str], torch.Generator]


class LoadedBlock(ABC):
    """One block of the model with its weights in memory, to be run. Hidden states: [rows, length, stream size]."""

    index: int
    module: nn.Module

    @abstractmethod
    def __call__(self, hidden: Tensor) -> Tensor:
        """The block's output. Differentiable where gradients are enabled."""

    @abstractmethod
    def branch(self, kind: str, hidden: Tensor) -> Tensor:
        """What "attention" or "mlp" adds to the stream for hidden states that enter its norm."""


class ModelView(ABC):
    """The model before a rewrite, for `observe`. One block is in memory unless `model` is called.

    Attributes:
        shape: the model.
        batches: the calibration tokens [rows, length].
        device: where blocks run.
    """

    shape: ModelShape
    device: torch.device
    batches: Sequence[Tensor]

    @abstractmethod
    def embedded(self, batches: Sequence[Tensor] | None = None) -> HiddenStates:
        """The hidden states that enter block 0, one tensor per batch (of tokens; by default the calibration's); in memory up
        to a cap, on disk behind it. `close` it."""

    @abstractmethod
    def like(self, hidden: HiddenStates, on_disk: bool = False) -> HiddenStates:
        """An empty store for hidden states of the same shapes; `on_disk`: none of it in memory."""

    @abstractmethod
    def loaded(self, index: int) -> AbstractContextManager[LoadedBlock]:
        """Block `index` with its weights in memory for as long as the context lasts."""

    @abstractmethod
    def losses(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Cross-entropy [rows] of each row's next tokens, mean over its tokens in nats, for hidden states behind the last
        block; 0 for a row of one token. Differentiable in `hidden`. Logits of a few tokens are in memory at a time."""

    @abstractmethod
    def model(self) -> nn.Module:
        """The whole model in float32, which must fit into memory (`observation_bytes` says so in the plan): a causal language
        model of transformers in eval mode, no parameter of which requires a gradient."""

    @abstractmethod
    def module(self, model: nn.Module, name: str) -> nn.Module:
        """The module of `model` that is called `name` on disk."""

    @abstractmethod
    def generator(self, purpose: str) -> torch.Generator:
        """Randomness that depends on the seed of the run, the step and the purpose."""

    @abstractmethod
    def remember(self, key: str, make: Callable[[], Any]) -> Any:
        """`make()`, JSON-like, or what an interrupted run remembered under `key`: what took long is not computed again."""

    @abstractmethod
    def keep(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """`make()`, or what an interrupted run kept under `name`; `Found.tensor(name)` gives it when the model is rewritten."""

    @abstractmethod
    def track(self, phase: str, total: int, unit: str) -> AbstractContextManager[Callable[[str], None]]:
        """Progress of something long: call what it gives after each of `total` units, with a detail to show."""

    @abstractmethod
    def note(self, message: str) -> None:
        """Tell the user."""


class ModelMethod(ABC):
    """A method that rewrites the model. Subclasses set `name`, `summary` and `Config`; instances are not needed.

    Steps with it stand before those that compress layers. `on_compressed`: whether it also works on a model that is
    compressed already: it makes no tensors.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    Config: ClassVar[type[MethodConfig]]
    on_compressed: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def rewrite(cls, model: ModelShape, config: Any, found: Found) -> Rewrite:
        """The result. In the plan no `make` is called, only names and shapes count; if `found.values` is None although the
        method observes, any result of the right sizes will do.

        Raises: RecipeError naming the setting or the family, the reason and a value that works.
        """

    @classmethod
    def observes(cls, config: Any) -> bool:
        """Whether `observe` must look at the model first."""
        return False

    @classmethod
    def needs_tokens(cls, config: Any) -> bool:
        """Whether `observe` needs calibration tokens."""
        return cls.observes(config)

    @classmethod
    def observe(cls, view: ModelView, config: Any) -> dict[str, Any]:
        """JSON-like figures that `rewrite` needs and the report shows, the same for the same seed. Matrices go to
        `view.keep`."""
        raise NotImplementedError

    @classmethod
    def observation_bytes(cls, extent: Extent, config: Any) -> int:
        """Peak bytes of `observe`, beyond one block and the hidden states."""
        return 0

    @classmethod
    def kept_bytes(cls, model: ModelShape, config: Any) -> int:
        """Bytes of the matrices that `observe` keeps, which lie on disk until the run is finished."""
        return 0

    @classmethod
    def observation_flops(cls, extent: Extent, config: Any) -> float:
        """Floating-point operations of `observe`."""
        return 2.0 * extent.n_weights * extent.n_tokens if cls.observes(config) else 0.0

    @classmethod
    def flops(cls, extent: Extent, config: Any) -> float:
        """Floating-point operations of making every tensor once."""
        return 0.0
