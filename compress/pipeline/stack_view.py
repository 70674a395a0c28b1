"""Finished modules as the method that orders their levels may look at them: the model at any level, one block in memory.

The model in which one module has more levels than the others, or fewer, is the same up to that module's block. So its hidden
states begin there, as a copy of the others':

    block i loaded:   for each module of it:  h_m <- block_i with the module changed (h)
    blocks behind:    h_m <- block(h_m), all variants beside each other, AT_ONCE at most
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from compress.calibration.store import Allowance, HiddenStates
from compress.checkpoint.headers import TensorInfo
from compress.checkpoint.reader import CheckpointReader
from compress.checkpoint.stream import StreamedModel, load_module
from compress.evaluation.chunks import LOGIT_BYTES, MIN_CHUNK_TOKENS
from compress.methods.base import StackView
from compress.modules.spec import ModuleSpec
from compress.pipeline.memory import Memory, tracked
from compress.pipeline.meter import release_free_memory
from compress.pipeline.plan import Plan

if TYPE_CHECKING:
    from compress.pipeline.progress import Progress

AT_ONCE = 8  # models with one module changed that run beside each other


class FinishedView(StackView):
    """The modules of a finished pass.

    Args:
        folder: where config.json of the result lies, without an index.
        infos: every tensor of the result, in the files that the pass wrote.
        batches: token ids of the rows that losses are measured on.
        figures: what the report will say of each layer.
    """

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        infos: dict[str, TensorInfo],
        batches: Sequence[Tensor],
        figures: Mapping[str, Mapping[str, Any]],
        memory: Memory,
        dtype: torch.dtype,
        device: torch.device,
        activation_bytes: int,
        progress: Progress,
    ):
        self._plan, self._folder, self._infos, self._batches = plan, folder, infos, batches
        self._memory, self._dtype, self._device, self._progress = memory, dtype, device, progress
        self._activation_bytes = activation_bytes
        self._specs = plan.stacked
        self.figures = figures
        self.levels = {
            name: [spec.level_bytes(level, plan.float_dtype) for level in range(spec.n_levels)]
            for name, spec in self._specs.items()
        }

    def note(self, message: str) -> None:
        self._progress.note(message)

    @torch.no_grad()
    def loss(self, others: int) -> float:
        def measured() -> float:
            base = self._at(others)
            try:
                return base.loss()
            finally:
                base.close()

        return self._memory.remember(f"level {others}", measured)

    @torch.no_grad()
    def losses(self, modules: Sequence[str], level: int, others: int) -> dict[str, float]:
        groups = self._groups(modules)
        n_blocks = self._plan.architecture.n_blocks
        found: dict[str, float] = {}
        base: _AtLevel | None = None
        total = sum(n_blocks - index + 1 for index, _ in groups)
        with tracked(self._progress, f"order: {level} blocks beside {others}", total, "block") as advance:
            for index, names in groups:

                def measured(index: int = index, names: Sequence[str] = names) -> list[float]:
                    nonlocal base
                    base = base or self._at(others)
                    return base.changed(index, names, level, advance)

                values = self._memory.remember(f"level {level} beside {others}: {', '.join(names)}", measured)
                found |= dict(zip(names, values, strict=True))
        if base is not None:
            base.close()
        return found

    def _groups(self, modules: Sequence[str]) -> list[tuple[int, list[str]]]:
        """Modules of one block together, `AT_ONCE` at most; the head's number is behind the last block's."""
        n_blocks, layers = self._plan.architecture.n_blocks, self._plan.layers
        by_block: dict[int, list[str]] = {}
        for name in modules:
            block = layers[name].block
            by_block.setdefault(n_blocks if block is None else block, []).append(name)
        return [
            (index, names[first : first + AT_ONCE])
            for index, names in sorted(by_block.items())
            for first in range(0, len(names), AT_ONCE)
        ]

    def _at(self, level: int) -> _AtLevel:
        specs = dict(self._plan.specs)
        for name, spec in self._specs.items():
            specs[name] = spec.first(min(level, spec.n_levels))
        model = StreamedModel(
            self._folder, self._dtype, self._device, reader=CheckpointReader(self._folder, self._infos), specs=specs,
            trust_remote_code=self._plan.recipe.model.trust_remote_code,
        )  # fmt: skip
        return _AtLevel(model, self._specs, self._batches, Allowance(self._activation_bytes), self._folder)


class _AtLevel:
    """The model with every module at one level, and the hidden states that enter its block `at`."""

    def __init__(
        self,
        model: StreamedModel,
        whole: Mapping[str, ModuleSpec],
        batches: Sequence[Tensor],
        allowance: Allowance,
        scratch: Path,
    ):
        self.model, self.whole, self.batches = model, whole, batches
        self.allowance, self.scratch = allowance, scratch
        first = model.embed(batches[0])
        shapes = [(*ids.shape, first.shape[-1]) for ids in batches]
        self.hidden = HiddenStates(shapes, model.dtype, allowance, scratch)
        for batch, ids in enumerate(batches):
            self.hidden[batch] = model.embed(ids)
        self.at = 0

    def loss(self) -> float:
        self._bring_to(self.model.n_blocks)
        return mean_loss(self.model, self.hidden, self.batches)

    def _bring_to(self, index: int) -> None:
        while self.at < index:
            self._run(self.at, [self.hidden])
            self.at += 1

    def changed(self, index: int, names: Sequence[str], level: int, advance: Callable[[str], None]) -> list[float]:
        """The losses with each of `names`, modules of block `index`, alone at `level`."""
        model, blocks = self.model, self.model.architecture.blocks
        self._bring_to(index)
        if index == model.n_blocks:
            return [self._with_head(name, level, advance) for name in names]
        streams = self._changed_block(index, names, level)
        advance(f"{blocks[index]}: {len(names)} models with one layer at {level} blocks")
        for behind in range(index + 1, model.n_blocks):
            self._run(behind, streams)
            advance(f"{blocks[behind]}: {len(names)} models")
        losses = [mean_loss(model, stream, self.batches) for stream in streams]
        advance("head")
        for stream in streams:
            stream.close()
        return losses

    def _changed_block(self, index: int, names: Sequence[str], level: int) -> list[HiddenStates]:
        model = self.model
        block = model.load_block(index)
        streams = []
        for name in names:
            usual = model.skeleton.module(name)
            changed = load_module(name, self._spec(name, level), model.reader, model.dtype).to(model.device)
            changed.hold(model.dtype)
            model.skeleton.replace(name, changed)
            stream = HiddenStates(list(self.hidden.shapes), model.dtype, self.allowance, self.scratch)
            for batch in range(len(stream)):
                stream[batch] = model.call_block(block, index, self.hidden[batch].to(model.device))
            streams.append(stream)
            model.skeleton.replace(name, usual)
        model.unload_block(index)
        release_free_memory()
        return streams

    def _run(self, index: int, streams: Sequence[HiddenStates]) -> None:
        block = self.model.load_block(index)
        for stream in streams:
            for batch in range(len(stream)):
                stream[batch] = self.model.call_block(block, index, stream[batch].to(self.model.device))
        self.model.unload_block(index)
        release_free_memory()

    def _spec(self, name: str, level: int) -> ModuleSpec:
        return self.whole[name].first(min(level, self.whole[name].n_levels))

    def _with_head(self, name: str, level: int, advance: Callable[[str], None]) -> float:
        model = self.model
        model.replace_head(load_module(name, self._spec(name, level), model.reader, model.dtype))
        loss = mean_loss(model, self.hidden, self.batches)
        model.unload_head()
        advance("head")
        return loss

    def close(self) -> None:
        self.hidden.close()
        self.model.close()


def mean_loss(model: StreamedModel, hidden: HiddenStates, batches: Sequence[Tensor]) -> float:
    """Mean negative log-likelihood of the tokens behind each other, for hidden states behind the last block."""
    tokens = max(MIN_CHUNK_TOKENS, LOGIT_BYTES // (4 * model.architecture.vocab_size))
    total, count = 0.0, 0
    for batch, ids in enumerate(batches):
        normed = model.final_norm(hidden[batch].to(model.device))[:, :-1].flatten(0, 1)
        targets = ids[:, 1:].flatten().to(model.device)
        for part, following in zip(normed.split(tokens), targets.split(tokens), strict=True):
            logits = model.logits(part[None])[0].float()
            total += float(functional.cross_entropy(logits, following, reduction="sum").double())
        count += targets.numel()
    return total / max(count, 1)
