"""The contract between a method and the pipeline.

A `SiteMethod` turns the linears of one site, and statistics of the input they share, into compressed modules. It knows
tensors, statistics and modules; it never sees a file, a model's name or the command line. In the plan it answers what
each layer will store (`plan`), what it must know about the inputs (`statistics`) and what that costs.

A new method: a file here with its config and equations, one line in `METHODS` (or the entry-point group
`compress.methods` of an outside package), a recipe, a docs page, a test file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from compress.calibration.statistics import Request, SiteStatistics
from compress.errors import RecipeError
from compress.modules.base import CompressedModule
from compress.modules.spec import ModuleSpec


class MethodConfig(BaseModel):
    """Settings of a method, as they stand in the recipe. Frozen; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


Settings = TypeVar("Settings", bound=MethodConfig)


def shared(configs: Mapping[str, Settings], fields: Sequence[str], why: str) -> Settings:
    """The settings of all layers, which must not differ in `fields`.

    Raises: RecipeError where overrides make them differ; `why` says why they must not, and what to do.
    """
    first_name, first = next(iter(configs.items()))
    for name, config in configs.items():
        for each in fields:
            if getattr(config, each) != getattr(first, each):
                raise RecipeError(
                    f"{each} is {getattr(config, each)} for {name} and {getattr(first, each)} for {first_name}, but {why}"
                )
    return first


@dataclass(frozen=True)
class LayerShape:
    """A layer as the plan knows it. `kind` "embedding" is a lookup table [vocabulary, hidden], which has no inputs.

    `role`: what it is to attention (query, key, value, output); None for any other, and for fused ones. Leaves have none.
    `masked`: an earlier step pruned it. `folds`: whatever makes its input takes a scale of it (`Outcome.fold`).
    """

    name: str
    out_features: int
    in_features: int
    kind: Literal["linear", "embedding"] = "linear"
    bias: bool = False
    role: Literal["q", "k", "v", "o"] | None = None
    masked: bool = False
    folds: bool = False


Sizes = Callable[[str, ModuleSpec | None], int]
"""Bytes of a layer in the result if the step stores it as a spec (None: leaves it as it is), later steps applied."""


@dataclass(frozen=True)
class Kept:
    """In place of a spec: the layer stays as it is, and why. The plan and the report say so."""

    reason: str


@dataclass(frozen=True)
class Layer:
    """A layer to compress: its weight in float32 [out_features, in_features] whatever the layout on disk.

    `config` has the overrides for this layer applied. `scale_dtype` is the dtype in which float tensors are stored and
    will be loaded: quantize with values rounded to it. `bias` is stored unchanged unless the method says otherwise. `mask`,
    bool [out_features, in_features], is where an earlier step kept weights; the others are 0 and must come out as 0. `folds`: as
    in `LayerShape`. `lender`: with what the planned module borrows (`CompressedModule.lend`), as it was stored.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    config: Any
    scale_dtype: torch.dtype
    kind: Literal["linear", "embedding"] = "linear"
    mask: Tensor | None = None
    folds: bool = False
    lender: nn.Module | None = None

    @property
    def shape(self) -> LayerShape:
        out_features, in_features = self.weight.shape
        masked = self.mask is not None
        bias = self.bias is not None
        return LayerShape(self.name, out_features, in_features, self.kind, bias, masked=masked, folds=self.folds)


def _silent(detail: str) -> None:
    pass


def nothing_kept(name: str) -> Tensor:
    raise KeyError(name)


@dataclass(frozen=True)
class SiteTask:
    """The layers of one site that a step applies to. They share an input, hence statistics.

    `tell`: takes a line about something long, which may be shown: the iteration that a layer is at, its loss.
    `continuous`: whether `Outcome.continuous` is wanted, by a step that goes on learning from there. `kept`: gives what `observe`
    kept under a name (`View.keep`).
    """

    name: str
    layers: tuple[Layer, ...]
    tell: Callable[[str], None] = _silent
    continuous: bool = False
    kept: Callable[[str], Tensor] = nothing_kept


@dataclass
class Outcome:
    """What became of one layer. `report` holds figures for the report ("loss", "damping", …); `notes` what a user must be
    told (a fallback, more damping than asked).

    `fold`: where the layer `folds`, what its inputs are to be multiplied with, [in_features], powers of two and the same for all
    layers of the site: the pipeline puts it into what makes them. `continuous`: of integer codes, the real-valued weight whose
    nearest values on the module's grid they are, float32 [out_features, in_features], where the task asked for it.
    """

    module: CompressedModule
    report: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    fold: Tensor | None = None
    continuous: Tensor | None = None


@dataclass(frozen=True)
class Extent:
    """How large a whole model is that a method looks at, and what it runs it on. `shapes`: of the layers to be settled;
    `n_rows`: rows that the tokens are in."""

    n_weights: int
    n_blocks: int
    hidden_size: int
    vocab_size: int
    n_tokens: int
    batch_tokens: int
    shapes: tuple[LayerShape, ...]
    n_rows: int = 1


class View(ABC):
    """The model before the run, for a method that decides something for all layers together (`SiteMethod.observe`).

    Attributes:
        shapes: the layers that the step applies to.
        blocks: the block of each of them; None: the head or the token table.
        n_blocks: how many the model has.
        batches: the calibration tokens [rows, length]; rows of a batch are of one length.
        nbytes: what the layers take in the result, for what the method may store them as.
    """

    shapes: Mapping[str, LayerShape]
    blocks: Mapping[str, int | None]
    n_blocks: int
    batches: Sequence[Tensor]
    nbytes: Sizes

    @abstractmethod
    def sites(self) -> Iterator[tuple[SiteTask, SiteStatistics | None]]:
        """Every site with layers of the step, in order, with the statistics that the method asks for. One block is in memory."""

    @abstractmethod
    def weight(self, name: str) -> Tensor:
        """The weight of a layer of the blocks in float32 [out_features, in_features], read anew."""

    @abstractmethod
    def states(self) -> Iterator[Tensor]:
        """Hidden states of the last token of every row, [rows, hidden_size]: those that enter block 0, then those behind each
        block."""

    @abstractmethod
    def model(self) -> nn.Module:
        """The whole model in float32, which must fit into memory (`observation_bytes` says so in the plan): a causal language
        model of transformers in eval mode, no parameter of which requires a gradient."""

    @abstractmethod
    def place(self, model: nn.Module, name: str) -> tuple[nn.Module, str]:
        """The parent of layer `name` in `model`, and the layer's attribute there."""

    @abstractmethod
    def block_modules(self, model: nn.Module) -> list[nn.Module]:
        """The decoder blocks of `model`, in order."""

    @abstractmethod
    def generator(self, purpose: str) -> torch.Generator:
        """Randomness that depends on the seed of the run and the purpose."""

    @abstractmethod
    def remember(self, key: str, make: Callable[[], Any]) -> Any:
        """`make()`, JSON-like, or what an interrupted run remembered under `key`: what took long is not computed again."""

    @abstractmethod
    def keep(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """`make()`, or the matrix that an interrupted run kept under `name`. `SiteTask.kept` gives it to `compress`."""

    @abstractmethod
    def track(self, phase: str, total: int, unit: str) -> AbstractContextManager[Callable[[str], None]]:
        """Progress of something long: call what it gives after each of `total` units, with a detail to show."""

    @abstractmethod
    def note(self, message: str) -> None:
        """Tell the user."""


class StackView(ABC):
    """Finished modules whose levels are to be put in order (`SiteMethod.order`).

    Attributes:
        levels: module -> bytes of each of its levels; the first of each is always loaded.
        figures: module -> what `compress` reported of it.
    """

    levels: Mapping[str, Sequence[int]]
    figures: Mapping[str, Mapping[str, Any]]

    @abstractmethod
    def loss(self, others: int) -> float:
        """The mean loss of the model in which every module has its first `others` levels (all of them, if it has fewer), on as
        many rows as `SiteMethod.order_rows` said. May be infinite or NaN."""

    @abstractmethod
    def losses(self, modules: Sequence[str], level: int, others: int) -> dict[str, float]:
        """For each of `modules`: the same, with this one at its first `level` levels."""

    @abstractmethod
    def note(self, message: str) -> None:
        """Tell the user."""


class SiteMethod(ABC):
    """A method that works site by site. Subclasses set `name`, `summary` and `Config`; instances are not needed.

    `on_leaves`: whether it also works on the leaves of a module that an earlier step made (the factors of a low-rank
    layer), or on whole weights only. `keeps_masks`: whether weights that an earlier step pruned come out as 0; other methods
    are refused for pruned layers. `stacks`: its modules have levels, which are put in `order` once all blocks are done; the
    result is a stack, of which as much is loaded as there is room for. `by_blocks`: it is a `compress.methods.block.BlockMethod`.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    Config: ClassVar[type[MethodConfig]]
    on_leaves: ClassVar[bool] = True
    keeps_masks: ClassVar[bool] = False
    stacks: ClassVar[bool] = False
    by_blocks: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def plan(cls, shape: LayerShape, config: Any) -> ModuleSpec | Kept:
        """What the layer will store, or that it is kept.

        Raises: RecipeError naming the layer, the reason and a value that works.
        """

    @classmethod
    def in_multiple(cls, config: Any) -> int:
        """What `in_features` of a layer must be a multiple of: a group of columns, a tile."""
        return 1

    @classmethod
    def fitted(cls, config: Any, multiple: int) -> Any:
        """`config` for a layer that a later step will compress further, which needs the inputs of each of its leaves to be a
        multiple of `multiple`: ranks are rounded to it."""
        return config

    @classmethod
    def arranged(cls, shapes: Mapping[str, LayerShape], configs: dict[str, Any]) -> dict[str, Any]:
        """`configs` of all layers of the step, with what depends on which other layers there are, by names and shapes: who
        shares something with whom. Called for every plan, after `observe` too.

        Raises: RecipeError with the value that works.
        """
        return configs

    @classmethod
    def observes(cls, config: Any) -> bool:
        """Whether `observe` must settle something first: ranks under a budget, which layers. `plan` then answers with what
        the layer will store on average, so that the total is right."""
        return False

    @classmethod
    def observe(cls, view: View, configs: dict[str, Any]) -> dict[str, Any]:
        """Decide what depends on all layers: layer name -> its config, settled, or `Kept`.

        Called once, before the first block, with the layers whose config `observes`. Only what is returned goes on: small,
        and the same for the same seed.
        """
        raise NotImplementedError

    @classmethod  # noqa: B027  most have nothing to foresee
    def foresee(cls, shapes: Mapping[str, LayerShape], configs: dict[str, Any], nbytes: Sizes) -> None:
        """Refuse in the plan what `observe` would have to refuse: a budget that no choice meets. `configs` as there.

        Raises: RecipeError with the value that works.
        """

    @classmethod
    def observation_flops(cls, shapes: tuple[LayerShape, ...], config: Any) -> float:
        """Floating-point operations of `observe` for one site, beside the forward and the statistics."""
        return cls.flops(shapes, config)

    @classmethod
    def observation_bytes(cls, extent: Extent, config: Any) -> int:
        """Peak bytes of `observe` beyond those of a pass: of the whole model, if it looks at it."""
        return 0

    @classmethod
    def can_fold(cls, config: Any) -> bool:
        """Whether it can use that a layer `folds`; only then is a layer said to."""
        return False

    @classmethod
    def order(cls, view: StackView, configs: Mapping[str, Any]) -> Sequence[tuple[str, int]]:
        """The levels of the modules in the order in which they are worth loading: (module, level), each from 1 on, a module's
        in rising order. Of methods that stack.

        Raises: RecipeError where settings differ between layers that must not.
        """
        raise NotImplementedError

    @classmethod
    def order_rows(cls, configs: Mapping[str, Any]) -> int:
        """Rows of another draw of the calibration data that `order` needs. Raises: as `order`."""
        return 0

    @classmethod
    def order_runs(cls, configs: Mapping[str, Any], n_levels: int) -> float:
        """How often `order` runs the model over these rows, for the plan; `n_levels`: of the module that has most."""
        return 0.0

    @classmethod
    def stack_file_bytes(cls, configs: Mapping[str, Any]) -> int:
        """About how large a file of the stack is. Of methods that stack."""
        raise NotImplementedError

    @classmethod
    def statistics(cls, config: Any) -> tuple[Request, ...]:
        """What `compress` needs to know about a site's input. None by default: the method needs no data."""
        return ()

    @classmethod
    def needs_tokens(cls, config: Any) -> bool:
        """Whether calibration tokens are needed: for statistics, or for what `observe` does with them."""
        return bool(cls.statistics(config))

    @classmethod
    def workspace(cls, shapes: tuple[LayerShape, ...], config: Any) -> int:
        """Peak bytes that `compress` allocates for one site, beyond the weights and the statistics."""
        return 2 * 4 * max(s.out_features * s.in_features for s in shapes)

    @classmethod
    def flops(cls, shapes: tuple[LayerShape, ...], config: Any) -> float:
        """Floating-point operations that `compress` needs for one site, for the plan's estimate of time."""
        return 20.0 * sum(s.out_features * s.in_features for s in shapes)

    @classmethod
    @abstractmethod
    def compress(
        cls, site: SiteTask, statistics: SiteStatistics | None, generator: torch.Generator
    ) -> dict[str, Outcome]:
        """Layer name -> outcome, for every layer of the site. Each module's spec equals what `plan` said.

        `statistics` is None where the layer has no inputs (embeddings) or the method asked for none.
        Raises: NumericsError naming layer and step.
        """
