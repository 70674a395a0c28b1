"""Part A of Dobi-SVD: ranks learned by gradient through truncated outputs, and settled under a budget of bytes.

The parameters are the ranks as fractions of full rank, all equal at first; Adam (0.9, 0.999) with a learning rate that falls
along a cosine to LAST of itself. Everything of a pass over the calibration batches is remembered: an interrupted run goes on
behind the last one that was finished.

Memory: the model in float32 and, since each block is run again in the backward pass, one hidden state per block beside what
a single block needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from compress.errors import NumericsError, naming
from compress.linalg.ranks import proportional, spend
from compress.linalg.svd_gradient import truncate
from compress.methods.base import Kept, LayerShape, View, shared
from compress.methods.dobi_svd import DobiSVDConfig, budget_of, dense_bytes, rank_bytes
from compress.methods.whole_model import next_token_loss, run_again, run_once

ADAM = (0.9, 0.999, 1e-8)
LAST = 0.1  # of the learning rate, at the end
SCALINGS = 50  # until the budget is met: more than one only where some rank is at a bound
COMMON = ("steps", "learning_rate", "beta", "budget_weight", "terms")  # settings that are of all layers together


@dataclass(frozen=True)
class Costs:
    """What the ranks of the layers cost, layer by layer: full rank, bytes per rank, bytes if dense, share of the budget."""

    full: Tensor
    per_rank: Tensor
    dense: Tensor
    shares: Tensor
    multiples: tuple[int, ...]

    @classmethod
    def of(cls, shapes: Mapping[str, LayerShape], configs: Mapping[str, DobiSVDConfig]) -> Costs:
        def column(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64)

        return cls(
            column([min(shapes[n].out_features, shapes[n].in_features) for n in configs]),
            column([rank_bytes(shapes[name], config) for name, config in configs.items()]),
            column([dense_bytes(shapes[name]) for name in configs]),
            column([budget_of(shapes[name], config) for name, config in configs.items()]),
            tuple(config.rank_multiple for config in configs.values()),
        )

    @property
    def budget(self) -> int:
        return int(self.shares.sum())

    @property
    def aim(self) -> float:
        """R*."""
        return self.budget / float(self.dense.sum())

    def ratio(self, fractions: Tensor) -> Tensor:
        """R: bytes of real-valued ranks, those of a dense layer at most, of what all layers take."""
        return torch.minimum(self.per_rank * self.full * fractions, self.dense).sum() / self.dense.sum()

    def start(self) -> Tensor:
        """Fractions of full rank at which every layer takes its own share."""
        return self.clamped(self.shares / (self.per_rank * self.full))

    def clamped(self, fractions: Tensor) -> Tensor:
        """Between rank 1 and full rank."""
        return fractions.clamp(1 / self.full, torch.ones_like(fractions))

    def met(self, fractions: Tensor) -> Tensor:
        """All larger or smaller by one factor, so that they take the budget."""
        for _ in range(SCALINGS):
            fractions = self.clamped(fractions * self.aim / self.ratio(fractions))
        return fractions

    def settled(self, fractions: Tensor) -> list[int | None]:
        """Whole ranks in proportion to `fractions`, None for dense layers: as many as the budget holds.

        What is left of the budget is less than another step of any layer that is not dense takes.
        Raises: RecipeError if the least ranks take more.
        """
        columns = (column.long().tolist() for column in (self.full, self.per_rank, self.dense))
        candidates = [
            proportional(fraction * full, full, multiple, per_rank.__mul__, dense)
            for fraction, multiple, full, per_rank, dense in zip(
                fractions.tolist(), self.multiples, *columns, strict=True
            )
        ]
        return spend(candidates, self.budget)


def settle(view: View, configs: dict[str, DobiSVDConfig]) -> dict[str, DobiSVDConfig | Kept]:
    """The rank of every layer: what `DobiSVD.observe` answers."""
    settings = _common(configs)
    costs = Costs.of(view.shapes, configs)
    if settings.steps:
        ranks = learned_ranks(view, list(configs), settings, costs, costs.settled)
    else:
        ranks = costs.settled(costs.start())
    spent = [
        rank * float(per) if rank else float(d) for rank, per, d in zip(ranks, costs.per_rank, costs.dense, strict=True)
    ]
    view.note(f"ranks settled: {int(sum(spent)):,} of {costs.budget:,} bytes at 16 bits a number")
    return {
        name: Kept("its rank is so high that factors would take its own bytes")
        if rank is None
        else config.model_copy(update={"rank": rank})
        for (name, config), rank in zip(configs.items(), ranks, strict=True)
    }


def learned_ranks(
    view: View,
    names: Sequence[str],
    settings: DobiSVDConfig,
    costs: Costs,
    settled: Callable[[Tensor], list[int | None]],
) -> list[int | None]:
    """The rank of each of the layers `names`, None for dense: learned, or uniform if that turns out better.

    Args:
        settled: whole ranks in proportion to fractions of full rank, within the budget.
    """
    uniform = settled(costs.start())  # what cannot be met is refused before anything is learned
    learner = Learner(view, names, settings, costs)
    try:
        return _better(view, learner, uniform, settled(learner.learn()))
    finally:
        learner.close()


def _better(view: View, learner: Learner, uniform: list[int | None], learned: list[int | None]) -> list[int | None]:
    """Those of two sets of ranks under which the truncated model does better on the calibration rows."""
    found = view.remember(
        "settled ranks", lambda: {"uniform": learner.perplexity(uniform), "learned": learner.perplexity(learned)}
    )
    better = found["learned"] < found["uniform"]
    view.note(
        f"perplexity of the calibration rows with outputs truncated: learned ranks {found['learned']:.4g}, uniform ranks "
        f"{found['uniform']:.4g}" + ("" if better else "; the uniform ones are used")
    )
    return learned if better else uniform


def _common(configs: Mapping[str, DobiSVDConfig]) -> DobiSVDConfig:
    why = "ranks are learned together; override keep_ratio, remap, rank or update only"
    with naming("dobi_svd"):
        return shared(configs, COMMON, why)


class TruncatedLinear(nn.Module):
    """A linear whose outputs, less the bias, are truncated at `rank`, a scalar tensor that is set from outside.

    Where out > in, W = Q R and the outputs of R are truncated: they have the same singular values, and there are fewer.
    """

    def __init__(self, name: str, original: nn.Module, shape: LayerShape, settings: DobiSVDConfig):
        super().__init__()
        self.name, self.beta, self.terms = name, settings.beta, settings.terms
        parameter = next(original.parameters())
        identity = torch.eye(shape.in_features, dtype=torch.float32, device=parameter.device)
        self.bias = getattr(original, "bias", None)
        weight = (
            original(identity).T if self.bias is None else (original(identity) - self.bias).T
        )  # however it is stored
        self.full = min(shape.out_features, shape.in_features)
        self.outer: Tensor | None = None
        self.core = weight.contiguous()
        if shape.out_features > shape.in_features:
            outer, core = torch.linalg.qr(weight.double())
            self.outer, self.core = outer.float(), core.float()
        self.rank = torch.tensor(float(self.full), dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        y = linear(x, self.core)
        rows = y.flatten(0, -2)  # [tokens, min(out, in)]
        share = min(len(rows), self.full) / self.full  # fewer tokens than that have no more directions
        try:
            y = truncate(rows, self.rank * share + 0.5, self.beta, self.terms).view_as(y)
        except NumericsError as error:
            raise NumericsError(f"{self.name}: dobi_svd: {error}; check the checkpoint") from None
        return linear(y, self.outer, self.bias) if self.outer is not None else y if self.bias is None else y + self.bias


class Learner:
    """The ranks of all layers, and the model that says how good they are."""

    def __init__(self, view: View, names: Iterable[str], settings: DobiSVDConfig, costs: Costs):
        self.view, self.names, self.settings, self.costs = view, list(names), settings, costs

    def learn(self) -> Tensor:
        """Fractions of full rank: the mean of the pass over the batches whose mean loss was lowest."""
        steps, n_batches = self.settings.steps, len(self.view.batches)
        fractions = self.costs.start().tolist()
        state = {
            "fractions": fractions,
            "first": [0.0] * len(fractions),
            "second": [0.0] * len(fractions),
            "updates": 0,
        }
        passes = []
        with self.view.track("learn ranks", steps, "step") as advance:
            for start in range(0, steps, n_batches):
                count, before = min(n_batches, steps - start), state
                made: list[str] = []

                def follow(detail: str, made: list[str] = made) -> None:
                    made.append(detail)
                    advance(detail)

                state = self.view.remember(
                    f"pass {start // n_batches}",
                    lambda: self._pass(before, count, follow),  # noqa: B023
                )
                passes.append(state)
                for _ in range(count - len(made)):
                    advance("remembered")
        best = min(passes, key=lambda found: found["loss"])
        return torch.tensor(best["mean"], dtype=torch.float64)

    def perplexity(self, ranks: Sequence[int | None]) -> float:
        """Of the calibration rows, at whole ranks; None: nothing is truncated."""
        full = self.costs.full.tolist()
        self._set(
            torch.tensor([2 * f if r is None else r for r, f in zip(ranks, full, strict=True)], dtype=torch.float64)
        )
        with torch.no_grad():
            losses = [(ids.numel(), float(self._loss(ids))) for ids in self.view.batches]
        return math.exp(sum(n * loss for n, loss in losses) / sum(n for n, _ in losses))

    def _pass(self, state: dict[str, Any], count: int, advance: Callable[[str], None]) -> dict[str, Any]:
        """`count` updates from `state` on; what is remembered of them."""
        fractions, first, second = (
            torch.tensor(state[key], dtype=torch.float64) for key in ("fractions", "first", "second")
        )
        updates = state["updates"]
        order = torch.randperm(len(self.view.batches), generator=self.view.generator(f"pass {updates}"))[:count]
        mean, loss = torch.zeros_like(fractions), 0.0
        for batch in order.tolist():
            value, perplexity, gradient = self._step(fractions, self.view.batches[batch])
            mean, loss = mean + fractions / count, loss + value / count
            updates += 1
            fractions = self._moved(fractions, gradient, first, second, updates)
            advance(f"perplexity {perplexity:.4g}, {float(self.costs.ratio(fractions)):.4f} of the bytes")
        return {
            "fractions": fractions.tolist(), "first": first.tolist(), "second": second.tolist(), "updates": updates,
            "mean": mean.tolist(), "loss": loss,
        }  # fmt: skip

    def _step(self, fractions: Tensor, ids: Tensor) -> tuple[float, float, Tensor]:
        """Loss, perplexity and gradient of the loss."""
        fractions = fractions.clone().requires_grad_()
        self._set(fractions * self.costs.full)
        perplexity = self._loss(ids).double().exp().cpu()
        ratio, value = self.costs.ratio(fractions), perplexity
        if self.settings.budget_weight is not None:
            value = perplexity + self.settings.budget_weight * (ratio - self.costs.aim).abs()
        (gradient,) = torch.autograd.grad(value, fractions, retain_graph=True)
        if self.settings.budget_weight is None:
            (price,) = torch.autograd.grad(ratio, fractions)
            gradient = gradient - price * (gradient @ price) / (price @ price).clamp(min=1e-30)
        if not (torch.isfinite(value) and torch.isfinite(gradient).all()):
            raise NumericsError(
                f"dobi_svd: perplexity {float(perplexity):g} of a calibration batch has no finite gradient; check the checkpoint"
            )
        return float(value.detach()), float(perplexity.detach()), gradient

    def _moved(self, fractions: Tensor, gradient: Tensor, first: Tensor, second: Tensor, updates: int) -> Tensor:
        """An update of Adam, back into 1 .. full rank. `first` and `second` are changed."""
        decay, square_decay, least = ADAM
        first.lerp_(gradient, 1 - decay)
        second.lerp_(gradient.square(), 1 - square_decay)
        progress = (updates - 1) / self.settings.steps
        rate = self.settings.learning_rate * (LAST + (1 - LAST) * (1 + math.cos(math.pi * progress)) / 2)
        size = (second / (1 - square_decay**updates)).sqrt() + least
        moved = fractions - rate * first / (1 - decay**updates) / size
        moved = self.costs.clamped(moved)
        return moved if self.settings.budget_weight is not None else self.costs.met(moved)

    def _loss(self, ids: Tensor) -> Tensor:
        model, _, _ = self._model
        return next_token_loss(model, ids)

    def _set(self, ranks: Tensor) -> None:
        _, layers, _ = self._model
        for layer, rank in zip(layers, ranks, strict=True):
            layer.rank = rank.to(layer.core.device)

    def close(self) -> None:
        """Let go of the model, which holds itself through its blocks' forwards."""
        if "_model" in self.__dict__:
            run_once(self.__dict__.pop("_model")[2])

    @cached_property
    def _model(self) -> tuple[nn.Module, list[TruncatedLinear], list[nn.Module]]:
        """The whole model with its layers truncated, those, and its blocks, which run again in the backward pass."""
        model = self.view.model()
        layers = []
        with torch.no_grad():
            for name in self.names:
                parent, attribute = self.view.place(model, name)
                layer = TruncatedLinear(name, getattr(parent, attribute), self.view.shapes[name], self.settings)
                setattr(parent, attribute, layer)
                layers.append(layer)
        blocks = self.view.block_modules(model)
        run_again(blocks)
        return model, layers, blocks
