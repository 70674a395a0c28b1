"""How `drop_blocks` finds out what each block is worth, with one block in memory.

Perplexity. The model without block j is the whole model up to j, so its hidden states begin as a copy of those that enter
block j, and go through the blocks behind it beside those of the others:

    block i loaded:   h <- block_i(h);   h_j <- block_i(h_j) for each j < i;   h_i <- h as it entered

That is O(L^2 / 2) block runs for L blocks. `AT_ONCE` variants go together, so hidden states stay flat in depth; what a
group found is remembered. h itself is carried from group to group.

Taylor. Forward once, with the inputs of each block on disk; the gradient of the loss by the last hidden states; then block
by block from the last, each run again and differentiated: its weights' gradients are summed up and dropped, its input's
goes on to the block before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from compress.calibration.store import HiddenStates
from compress.errors import NumericsError
from compress.evaluation.chunks import LOGIT_BYTES, MIN_CHUNK_TOKENS
from compress.linalg.angles import angular_distance
from compress.methods.base import Extent
from compress.methods.drop_blocks import DropBlocksConfig, candidates, enough, taken
from compress.methods.rewrite import ModelView
from compress.methods.whole_model import FRAGMENTATION, LOGIT_COPIES, SAVED_HIDDEN
from compress.modules.base import CompressedModule

AT_ONCE = 8  # models with one block left out that run beside each other

Scores = dict[int, float]  # by block


@dataclass(frozen=True)
class Look:
    """What was seen. `loss`: of the model with all the blocks that were there, where it was measured."""

    scores: Scores
    loss: float | None = None

    def to_dict(self, n_blocks: int) -> dict[str, Any]:
        """For the report: a score, or None, for each block of the original."""
        found: dict[str, Any] = {"scores": [self.scores.get(block) for block in range(n_blocks)]}
        return found if self.loss is None else {**found, "loss": self.loss}


def choose(view: ModelView, config: DropBlocksConfig) -> dict[str, Any]:
    """Which blocks go, in which order they were chosen, and the scores of each round."""
    if config.selection == "contiguous":
        return _contiguous(view, config)
    n_blocks, look = view.shape.n_blocks, _LOOKS[config.score]
    batches = first_rows(view.batches, config.rows)
    may_go = candidates(view.shape, config)
    dropped: list[int] = []
    rounds: list[Look] = []
    while not dropped or not enough(view.shape, config, dropped):
        stay, left = ([b for b in blocks if b not in dropped] for blocks in (range(n_blocks), may_go))
        rounds.append(look(view, batches, stay, left))
        order = sorted(left, key=lambda block: (rounds[-1].scores[block], block))
        dropped = [*dropped, order[0]] if config.selection == "iterative" else taken(view.shape, config, order)
    scores = [rounds[min(place, len(rounds) - 1)].scores[block] for place, block in enumerate(dropped)]
    listed = ", ".join(f"{block} ({score:.4g})" for block, score in zip(dropped, scores, strict=True))
    view.note(f"drop_blocks: lowest {config.score}: blocks {listed}")
    return _found(config, dropped, [seen.to_dict(n_blocks) for seen in rounds])


def _found(config: DropBlocksConfig, dropped: list[int], rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """`order`: as they were chosen; a round for each look at the model."""
    chosen = {"blocks": sorted(dropped), "order": dropped}
    return {**chosen, "score": config.score, "selection": config.selection, "rounds": rounds}


def first_rows(batches: Sequence[Tensor], n_rows: int) -> list[Tensor]:
    """The first rows of token batches, batched as they were."""
    found: list[Tensor] = []
    for ids in batches:
        if n_rows > 0:
            found.append(ids[:n_rows])
        n_rows -= len(ids)
    return found


@torch.no_grad()
def perplexity(view: ModelView, batches: Sequence[Tensor], stay: Sequence[int], may_go: Sequence[int]) -> Look:
    """The loss of the model of the blocks `stay`, without each one of `may_go`."""
    groups = [may_go[first : first + AT_ONCE] for first in range(0, len(may_go), AT_ONCE)]
    behind = [[block for block in stay if block >= group[0]] for group in groups]
    base = _Base(view, batches, stay)
    scores: Scores = {}
    with view.track("observe", sum(map(len, behind)), "block") as advance:
        for group, blocks in zip(groups, behind, strict=True):
            fresh: list[int] = []

            def measured(group: Sequence[int] = group, fresh: list[int] = fresh) -> list[float]:
                fresh += group
                return _losses_without(view, base, group, advance)

            found = view.remember(f"perplexity {list(stay)} without {list(group)}", measured)
            scores |= dict(zip(group, found, strict=True))
            for block in blocks if not fresh else ():
                advance(f"{view.shape.blocks[block]}: known")
    loss = view.remember(f"perplexity {list(stay)}", base.loss)
    base.close()
    return Look(scores, loss)


class _Base:
    """The hidden states of the model with all blocks `stay`, as they enter `stay[at]`."""

    def __init__(self, view: ModelView, batches: Sequence[Tensor], stay: Sequence[int]):
        self.view, self.batches, self.stay, self.at = view, batches, stay, 0
        self._hidden: HiddenStates | None = None

    @property
    def hidden(self) -> HiddenStates:
        if self._hidden is None:
            self._hidden = self.view.embedded(self.batches)
        return self._hidden

    def bring_to(self, block: int) -> None:
        """Let it enter `block`; behind the last one, if it is none of them."""
        while self.at < len(self.stay) and self.stay[self.at] != block:
            run_block(self.view, self.stay[self.at], [self.hidden])
            self.at += 1

    def loss(self) -> float:
        self.bring_to(-1)
        return mean_loss(self.view, self.hidden, self.batches)

    def close(self) -> None:
        if self._hidden is not None:
            self._hidden.close()


def _losses_without(view: ModelView, base: _Base, group: Sequence[int], advance: Callable[[str], None]) -> list[float]:
    base.bring_to(group[0])
    variants: dict[int, HiddenStates] = {}
    for block in base.stay[base.at :]:
        streams = list(variants.values())
        if block in group:
            variants[block] = copied(view, base.hidden)
        if block <= group[-1]:
            streams.append(base.hidden)
            base.at += 1
        run_block(view, block, streams)
        advance(f"{view.shape.blocks[block]}: {len(variants)} models without a block")
    losses = [mean_loss(view, variants[block], base.batches) for block in group]
    for hidden in variants.values():
        hidden.close()
    return losses


def run_block(view: ModelView, block: int, streams: Sequence[HiddenStates]) -> None:
    """Bring hidden states through one block."""
    if not streams:
        return
    with view.loaded(block) as loaded:
        for hidden in streams:
            for batch in range(len(hidden)):
                hidden[batch] = loaded(hidden[batch])


def copied(view: ModelView, hidden: HiddenStates, on_disk: bool = False) -> HiddenStates:
    copy = view.like(hidden, on_disk)
    for batch in range(len(hidden)):
        copy[batch] = hidden[batch]
    return copy


def n_predicted(batches: Sequence[Tensor]) -> int:
    return sum(ids.shape[0] * (ids.shape[1] - 1) for ids in batches)


def mean_loss(view: ModelView, hidden: HiddenStates, batches: Sequence[Tensor]) -> float:
    """Mean negative log-likelihood per predicted token, for hidden states behind the last block."""
    total = 0.0
    for batch, ids in enumerate(batches):
        total += float(view.losses(hidden[batch], ids).double().sum()) * (ids.shape[1] - 1)
    return _finite("perplexity", total / max(n_predicted(batches), 1))


def taylor(view: ModelView, batches: Sequence[Tensor], stay: Sequence[int], may_go: Sequence[int]) -> Look:
    """sum |W * dL/dW| over the matrices of each block."""

    def measured() -> list[float]:
        with view.track("observe", 2 * len(stay), "block") as advance:
            return _by_gradients(view, batches, stay, advance)

    return Look(dict(zip(stay, view.remember(f"taylor {list(stay)}", measured), strict=True)))


def _by_gradients(
    view: ModelView, batches: Sequence[Tensor], stay: Sequence[int], advance: Callable[[str], None]
) -> list[float]:
    inputs: dict[int, HiddenStates] = {}
    hidden = view.embedded(batches)
    with torch.no_grad():
        for block in stay:
            inputs[block] = copied(view, hidden, on_disk=True)
            run_block(view, block, [hidden])
            advance(f"{view.shape.blocks[block]}: forward")
    for batch, ids in enumerate(batches):  # in place of the hidden states, the gradient of the summed loss by them
        last = hidden[batch].detach().clone().requires_grad_(True)
        (view.losses(last, ids).sum() * (ids.shape[1] - 1)).backward()
        assert last.grad is not None
        hidden[batch] = last.grad
    scores: Scores = {}
    for block in reversed(stay):
        change = _differentiated(view, block, inputs[block], hidden)
        inputs.pop(block).close()
        scores[block] = _finite("taylor", change / max(n_predicted(batches), 1))
        advance(f"{view.shape.blocks[block]}: backward")
    hidden.close()
    return [scores[block] for block in stay]


def _differentiated(view: ModelView, block: int, inputs: HiddenStates, gradient: HiddenStates) -> float:
    """sum |W * dL/dW| of a block; `gradient`, by its outputs, becomes that by its inputs."""
    with view.loaded(block) as loaded:
        matrices = list(_matrices(loaded.module))
        for matrix in matrices:
            matrix.requires_grad_(True)
        for batch in range(len(inputs)):
            entering = inputs[batch].detach().requires_grad_(True)
            output = loaded(entering)
            output.backward(gradient[batch].to(output.device))
            assert entering.grad is not None
            gradient[batch] = entering.grad
        return sum(_absolute(matrix * matrix.grad) for matrix in matrices if matrix.grad is not None)


def magnitude(view: ModelView, batches: Sequence[Tensor], stay: Sequence[int], may_go: Sequence[int]) -> Look:
    """sum |W| over the matrices of each block."""
    scores: Scores = {}
    with view.track("observe", len(stay), "block") as advance:
        for block in stay:

            def measured(block: int = block) -> float:
                with view.loaded(block) as loaded:
                    return sum(_absolute(matrix) for matrix in _matrices(loaded.module))

            scores[block] = view.remember(f"magnitude {block}", measured)
            advance(view.shape.blocks[block])
    return Look(scores)


def angular(view: ModelView, batches: Sequence[Tensor], stay: Sequence[int], may_go: Sequence[int]) -> Look:
    """How far each block turns the hidden state of a row's last token."""

    def measured() -> list[float]:
        return [angular_distance(before, behind) for before, behind in pairwise(last_tokens(view, batches, stay))]

    return Look(dict(zip(stay, view.remember(f"angular {list(stay)}", measured), strict=True)))


@torch.no_grad()
def last_tokens(view: ModelView, batches: Sequence[Tensor], stay: Sequence[int]) -> list[Tensor]:
    """Hidden states of the last token of each row [rows, hidden]: entering the first of the blocks, then behind each."""
    hidden = view.embedded(batches)
    found = []
    with view.track("observe", len(stay), "block") as advance:
        found.append(torch.cat([hidden[batch][:, -1].float() for batch in range(len(hidden))]))
        for block in stay:
            run_block(view, block, [hidden])
            found.append(torch.cat([hidden[batch][:, -1].float() for batch in range(len(hidden))]))
            advance(view.shape.blocks[block])
    hidden.close()
    return found


def _contiguous(view: ModelView, config: DropBlocksConfig) -> dict[str, Any]:
    """The run of neighbours around which the angle is smallest; its scores stand at its first block."""
    n_drop, n_blocks = config.n_drop, view.shape.n_blocks
    assert n_drop is not None
    may_go, everything = candidates(view.shape, config), list(range(n_blocks))

    def measured() -> list[float]:
        states = last_tokens(view, first_rows(view.batches, config.rows), everything)
        return [angular_distance(states[first], states[first + n_drop]) for first in range(n_blocks - n_drop + 1)]

    angles = view.remember(f"contiguous {n_drop}", measured)
    scores = {first: angles[first] for first in may_go if first + n_drop - 1 <= may_go[-1]}
    first = min(scores, key=lambda block: (scores[block], block))
    dropped = list(range(first, first + n_drop))
    view.note(f"drop_blocks: blocks {first} to {first + n_drop - 1} turn hidden states least, by {scores[first]:.4f}")
    return _found(config, dropped, [Look(scores).to_dict(n_blocks)])


_LOOKS: dict[str, Callable[[ModelView, Sequence[Tensor], Sequence[int], Sequence[int]], Look]] = {
    "perplexity": perplexity,
    "taylor": taylor,
    "magnitude": magnitude,
    "angular_distance": angular,
}


def _matrices(module: nn.Module) -> Iterator[Tensor]:
    """Every matrix of a block, compressed ones decoded."""
    if isinstance(module, CompressedModule):
        yield module.dense(torch.float32)
        return
    yield from (parameter for parameter in module.parameters(recurse=False) if parameter.ndim > 1)
    for child in module.children():
        yield from _matrices(child)


def _absolute(matrix: Tensor) -> float:
    return float(matrix.detach().abs().sum(dtype=torch.float64))


def _finite(score: str, value: float) -> float:
    if not math.isfinite(value):
        raise NumericsError(
            f"drop_blocks: {score} of the calibration rows is no number; use calibration.dtype=float32, or check the checkpoint"
        )
    return value


def _tokens(extent: Extent, config: DropBlocksConfig) -> int:
    return extent.n_tokens * min(config.rows, extent.n_rows) // max(extent.n_rows, 1)


def peak_bytes(extent: Extent, config: DropBlocksConfig) -> int:
    """Of looking, beyond one block and the hidden states of one model."""
    tokens, batch = _tokens(extent, config), min(extent.batch_tokens, _tokens(extent, config))
    if config.score == "angular_distance":
        return 0
    chunk = max(MIN_CHUNK_TOKENS, LOGIT_BYTES // (4 * extent.vocab_size))
    head = extent.vocab_size * extent.hidden_size + LOGIT_COPIES * min(chunk, batch) * extent.vocab_size
    if config.score == "perplexity":
        return 4 * (head + AT_ONCE * tokens * extent.hidden_size)
    gradients = extent.n_weights // extent.n_blocks
    return 4 * int(head + gradients + FRAGMENTATION * 2 * SAVED_HIDDEN * batch * extent.hidden_size)


def flops(extent: Extent, config: DropBlocksConfig) -> float:
    """Of looking."""
    n_blocks = extent.n_blocks
    forward = 2.0 * extent.n_weights * _tokens(extent, config)
    if config.selection == "iterative":
        n_rounds = config.n_drop or round((1 - (config.keep_ratio or 0)) * n_blocks)
    else:
        n_rounds = 1
    one = {"perplexity": n_blocks / 2 + 1, "taylor": 4.0, "angular_distance": 1.0}[config.score]
    return n_rounds * one * forward
