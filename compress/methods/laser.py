"""LASER: fewer singular values in a few chosen matrices, to make a model better rather than smaller.

    W_k = the best matrix of rank k = floor(rho min(m, n)) for ||W - W_k||_F     (plain truncation, no statistics)

Late in a model, the small singular values of some matrices hurt more than they help. Which, and how many of them, is found
by trying: the loss of the calibration rows (mean negative log-likelihood per token) with one matrix reduced at a time.

    search: single   every matrix of the step at every rate in `rates`; the best one is reduced, if it lowers the loss
    search: greedy   from the last block to the first, each matrix at falling rates for as long as the loss falls; what
                     was found stays in place for what follows
    rate             no search: every matrix of the step at this rate

Only blocks from the reduced one on are run again. The whole model is in memory while it is searched; that is planned for.

`output: dense` stores the reduced matrices as ordinary weights of the same size, in a checkpoint that any tool loads.
`output: factored` stores them as two thin linears, where that is smaller; a matrix whose factors would be larger is not
tried.

Departure from the published script: its greedy search goes on while a reduction is better than the worst so far; here,
while it is better than the best.

Source: Sharma, Ash, Misra, 2023, arXiv:2312.13558.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional

from compress.calibration.statistics import SiteStatistics
from compress.errors import NumericsError, RecipeError
from compress.linalg.low_rank import decompose, factors
from compress.linalg.ranks import break_even_rank, rounded_rank
from compress.methods.base import Extent, Kept, Layer, LayerShape, MethodConfig, Outcome, SiteMethod, SiteTask, View
from compress.methods.rtn import check_weight
from compress.modules.base import CompressedModule
from compress.modules.dense import DenseLinear
from compress.modules.dense_spec import DenseSpec
from compress.modules.low_rank import LowRankLinear
from compress.modules.low_rank_spec import LowRankSpec
from compress.modules.spec import ModuleSpec

PUBLISHED_RATES = (0.9, 0.75, 0.6, 0.5, 0.4, 0.25, 0.1, 0.075, 0.05, 0.025, 0.02, 0.015, 0.01, 0.005, 0.0025)
SVD_FLOPS = 40.0  # n^3 of a float64 decomposition, in operations of a float32 product


class LASERConfig(MethodConfig):
    search: Literal["single", "greedy"] = Field("single", description="how matrices and rates are tried")
    rates: tuple[float, ...] = Field(PUBLISHED_RATES, description="fractions of the full rank to try")
    rate: float | None = Field(None, gt=0, le=1, description="no search: every layer of the step at this rate")
    rows: int = Field(32, ge=1, description="calibration rows on which the search measures the loss")
    output: Literal["dense", "factored"] = Field("dense", description="ordinary weights, or two factors where smaller")
    rank_multiple: int = Field(
        1, ge=1, description="factored: ranks are rounded down to a multiple of it, but not to 0"
    )

    @field_validator("rates")
    @classmethod
    def _rates_in_range(cls, rates: tuple[float, ...]) -> tuple[float, ...]:
        wrong = [rate for rate in rates if not 0 < rate <= 1]
        if wrong or not rates:
            raise ValueError(f"rates must be above 0 and at most 1, found {wrong[0] if wrong else 'none'}")
        return tuple(sorted(set(rates), reverse=True))


class LASER(SiteMethod):
    name = "laser"
    summary = "low rank in a few matrices, found by trying, to lower the loss; the size stays unless factored"
    Config = LASERConfig
    on_leaves = False

    @classmethod
    def plan(cls, shape: LayerShape, config: LASERConfig) -> ModuleSpec | Kept:
        if shape.kind != "linear":
            raise RecipeError(f"{shape.name}: laser is for linears, not for tables; leave it out of layers")
        if config.output == "dense" or config.rate is None:
            return DenseSpec(shape.in_features, shape.out_features)
        rank = rank_of(shape, config, config.rate)
        if not _smaller(shape, rank):
            return Kept(f"factors of rank {rank} would outweigh a {shape.out_features} x {shape.in_features} weight")
        return LowRankSpec(shape.in_features, shape.out_features, rank)

    @classmethod
    def fitted(cls, config: LASERConfig, multiple: int) -> LASERConfig:
        return config.model_copy(update={"rank_multiple": max(config.rank_multiple, multiple)})

    @classmethod
    def observes(cls, config: LASERConfig) -> bool:
        return config.rate is None

    @classmethod
    def needs_tokens(cls, config: LASERConfig) -> bool:
        return config.rate is None

    @classmethod
    def observe(cls, view: View, configs: dict[str, LASERConfig]) -> dict[str, LASERConfig | Kept]:
        search = _Search(view, configs)
        found = search.greedy() if _common(configs, "search") == "greedy" else search.single()
        return {
            name: config.model_copy(update={"rate": found[name]})
            if name in found
            else Kept("no rate that was tried lowers the loss of the calibration rows further")
            for name, config in configs.items()
        }

    @classmethod
    def observation_bytes(cls, extent: Extent, config: LASERConfig) -> int:
        largest = max((shape.out_features * shape.in_features for shape in extent.shapes), default=0)
        logits = 3 * extent.batch_tokens * extent.vocab_size
        return (
            4 * (extent.n_weights + logits + config.rows * extent.batch_tokens * extent.hidden_size) + 8 * 6 * largest
        )

    @classmethod
    def flops(cls, shapes: tuple[LayerShape, ...], config: LASERConfig) -> float:
        return sum(
            SVD_FLOPS * min(s.out_features, s.in_features) ** 2 * max(s.out_features, s.in_features) for s in shapes
        )

    @classmethod
    def compress(
        cls, site: SiteTask, statistics: SiteStatistics | None, generator: torch.Generator
    ) -> dict[str, Outcome]:
        return {layer.name: _compress_layer(layer) for layer in site.layers}


def rank_of(shape: LayerShape, config: LASERConfig, rate: float) -> int:
    """The rank of a rate: at least 1."""
    rank = max(1, int(rate * min(shape.out_features, shape.in_features)))
    return rounded_rank(rank, config.rank_multiple) if config.output == "factored" else rank


def _smaller(shape: LayerShape, rank: int) -> bool:
    return rank <= break_even_rank(shape.out_features, shape.in_features)


def _compress_layer(layer: Layer) -> Outcome:
    check_weight(layer)
    config: LASERConfig = layer.config
    assert config.rate is not None, layer.name
    rank = rank_of(layer.shape, config, config.rate)
    try:
        left, right = factors(layer.weight, decompose(layer.weight, rank).basis)
    except NumericsError as error:
        raise NumericsError(f"{layer.name}: laser: {error}") from None
    module: CompressedModule
    if config.output == "factored":
        module = LowRankLinear.from_factors(left.to(layer.scale_dtype), right.to(layer.scale_dtype), layer.bias)
    else:
        module = DenseLinear((left @ right).to(layer.scale_dtype), layer.bias)
    difference = (layer.weight - module.dense(torch.float32)).double().square().sum()
    total = float(layer.weight.double().square().sum())
    return Outcome(module, {"rank": float(rank), "weight_error": float(difference) / total if total else 0.0})


def _common(configs: dict[str, LASERConfig], field: str) -> Any:
    """The value of a setting of the search, which is one for the step. Raises: RecipeError if layers differ in it."""
    values = {getattr(config, field) for config in configs.values()}
    if len(values) > 1:
        raise RecipeError(
            f"laser: {field} differs between layers, but it is one search; set it for the step as a whole"
        )
    return values.pop()


class _Search:
    """The model in memory, and what is tried on it."""

    def __init__(self, view: View, configs: dict[str, LASERConfig]):
        self.view, self.configs = view, configs
        outside = [name for name in configs if view.blocks[name] is None]
        if outside:
            raise RecipeError(f"laser: {outside[0]} lies outside the blocks; leave it out of layers")
        self.model = view.model()
        self.loss = _SuffixLoss(self.model, view.block_modules(self.model), _rows(view, _common(configs, "rows")))
        self.original = view.remember("loss", lambda: self.loss.from_block(0, self.loss.inputs(0)))

    def single(self) -> dict[str, float]:
        """The one reduction that lowers the loss most: layer name -> rate."""
        best = self.original
        chosen: dict[str, float] = {}
        with self.view.track("search", len(self.configs), "matrix") as advance:
            for block in sorted({self._block(name) for name in self.configs}):
                inputs: list[Tensor] = []
                for name in self._names(block):
                    inputs = inputs or self.loss.inputs(block)
                    for rate, loss in self._losses(name, inputs, ""):
                        if loss < best:
                            best, chosen = loss, {name: rate}
                    advance(f"{name}: loss {best:.4f}, from {self.original:.4f}")
        self._tell(best, chosen)
        return chosen

    def greedy(self) -> dict[str, float]:
        """Reductions from the last block to the first, each for as long as the loss falls: layer name -> rate."""
        best = self.original
        chosen: dict[str, float] = {}
        with self.view.track("search", len(self.configs), "matrix") as advance:
            for block in sorted({self._block(name) for name in self.configs}, reverse=True):
                inputs = self.loss.inputs(block)
                for name in self._names(block):
                    so_far = "+".join(f"{other}@{rate:g}" for other, rate in chosen.items())
                    for rate, loss in self._losses(name, inputs, so_far):
                        if loss >= best:
                            break
                        best, chosen[name] = loss, rate
                    if name in chosen:
                        self._weight(name).copy_(self._reduced(name)(chosen[name]))
                    advance(f"{name}: loss {best:.4f}, from {self.original:.4f}")
        self._tell(best, chosen)
        return chosen

    def _losses(self, name: str, inputs: Sequence[Tensor], so_far: str) -> Iterator[tuple[float, float]]:
        """(rate, loss with only this matrix changed), at falling rates."""
        weight = self._weight(name)
        before = weight.clone()
        reduced: Callable[[float], Tensor] | None = None
        for rate in self._rates(name):

            def measure(rate: float = rate) -> float:
                nonlocal reduced
                reduced = reduced or self._reduced(name)
                weight.copy_(reduced(rate))
                try:
                    return self.loss.from_block(self._block(name), inputs)
                finally:
                    weight.copy_(before)

            yield rate, self.view.remember(f"{so_far}>{name}@{rate:g}", measure)

    def _reduced(self, name: str) -> Callable[[float], Tensor]:
        """rate -> the matrix at that rate, in the layout in which the layer has it."""
        weight, shape, config = self._weight(name), self.view.shapes[name], self.configs[name]
        try:
            left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
        except torch.linalg.LinAlgError as error:
            raise NumericsError(f"{name}: laser: no singular value decomposition was found ({error})") from None

        def reduced(rate: float) -> Tensor:
            rank = rank_of(shape, config, rate)
            return ((left[:, :rank] * values[:rank]) @ right[:rank]).to(weight.dtype)

        return reduced

    def _rates(self, name: str) -> list[float]:
        """The rates worth trying: each rank once, and only those whose factors are smaller, if factors are stored."""
        shape, config = self.view.shapes[name], self.configs[name]
        by_rank = {rank_of(shape, config, rate): rate for rate in config.rates}
        return [rate for rank, rate in by_rank.items() if config.output == "dense" or _smaller(shape, rank)]

    def _weight(self, name: str) -> Tensor:
        parent, attribute = self.view.place(self.model, name)
        return getattr(parent, attribute).weight.data

    def _block(self, name: str) -> int:
        block = self.view.blocks[name]
        assert block is not None
        return block

    def _names(self, block: int) -> list[str]:
        return [name for name in self.configs if self.view.blocks[name] == block]

    def _tell(self, best: float, chosen: dict[str, float]) -> None:
        found = ", ".join(f"{name} at {rate:g}" for name, rate in chosen.items()) or "no reduction lowers it"
        self.view.note(f"laser: loss of the calibration rows {self.original:.4f} -> {best:.4f}: {found}")


def _rows(view: View, wanted: int) -> list[Tensor]:
    return [row[None] for batch in view.batches for row in batch][:wanted]


class _SuffixLoss:
    """The loss of token rows [1, length], computed from a block on."""

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], rows: Sequence[Tensor]):
        self.model, self.blocks, self.rows = model, blocks, rows
        self.device = next(model.parameters()).device

    @torch.no_grad()
    def inputs(self, block: int) -> list[Tensor]:
        """What enters `block` for each row."""
        entered: list[Tensor] = []

        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entered.append(args[0] if args else kwargs["hidden_states"])
            raise _EnoughError

        hook = self.blocks[block].register_forward_pre_hook(see, with_kwargs=True)
        try:
            for row in self.rows:
                with suppress(_EnoughError):
                    self.model(input_ids=row.to(self.device), use_cache=False)
        finally:
            hook.remove()
        return entered

    @torch.no_grad()
    def from_block(self, block: int, inputs: Sequence[Tensor]) -> float:
        """Mean negative log-likelihood per predicted token, the blocks before `block` taken as run."""
        total, count = 0.0, 0
        for row, hidden in zip(self.rows, inputs, strict=True):
            with self._entering(block, hidden):
                logits = self.model(input_ids=row.to(self.device), use_cache=False).logits
            targets = row[0, 1:].to(self.device)
            total += float(functional.cross_entropy(logits[0, :-1].float(), targets, reduction="sum"))
            count += targets.numel()
        if total != total:
            raise NumericsError("laser: the loss of the calibration rows is not a number; check the checkpoint")
        return total / max(count, 1)

    @contextmanager
    def _entering(self, block: int, hidden: Tensor) -> Iterator[None]:
        """The blocks before `block` give `hidden` without computing anything."""
        skipped = self.blocks[:block]
        for module in skipped:
            module.forward = lambda *args, **kwargs: hidden  # type: ignore[method-assign]
        try:
            yield
        finally:
            for module in skipped:
                del module.forward


class _EnoughError(Exception):
    """What was wanted has been seen."""
