"""How a method that rewrites the model looks at it before: block by block, or whole.

What it finds is kept in the work folder, figures as JSON lines and matrices as safetensors, so that a resumed run does not
look again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from compress.calibration.store import Allowance, HiddenStates, embedded
from compress.checkpoint.stream import StreamedModel
from compress.errors import CheckpointError, RecipeError
from compress.evaluation.chunks import LOGIT_BYTES, MIN_CHUNK_TOKENS
from compress.methods.rewrite import LoadedBlock, ModelView
from compress.models.branches import Branches, named_arguments
from compress.models.families import module_name
from compress.pipeline.memory import Memory, keep, kept_file, read_kept, tracked
from compress.pipeline.meter import release_free_memory
from compress.pipeline.output import OBSERVED
from compress.pipeline.plan import Plan, plan_source
from compress.pipeline.rewriting import RewritePlan, model_shape, open_source, plan_rewrites, seeded, whole_model

if TYPE_CHECKING:
    from compress.pipeline.progress import Progress


@dataclass(frozen=True)
class Looking:
    """With what a method looks at the model: where the original and the work folder are, on which tokens, how."""

    source: Path
    work: Path
    batches: list[Tensor]
    dtype: torch.dtype
    device: torch.device
    activation_bytes: int
    progress: Progress


def settle_rewrites(plan: Plan, looking: Looking) -> Plan:
    """The plan in which every step that rewrites the model has looked at it."""
    if all(step.settled for step in plan.rewrites):
        return plan
    values: dict[int, Any] = {}

    def kept(number: int, name: str) -> Tensor:
        return read_kept(kept_file(looking.work, number, name))

    def planned() -> tuple[RewritePlan, ...]:
        return plan_rewrites(plan.recipe, plan.original, plan.float_dtype, values, kept)

    for number in range(len(plan.rewrites)):
        before = planned()
        step = before[number]
        if not step.observes:
            continue
        memory = Memory(looking.work / f"{OBSERVED}{number}.jsonl")

        def observe(step: RewritePlan = step, before: Any = before, memory: Memory = memory) -> dict[str, Any]:
            view = StreamedView(plan, step, before[: step.number], memory, looking)
            try:
                return step.method.observe(view, step.config)
            except RecipeError as error:
                raise RecipeError(f"steps.{step.number}.{step.method.name}: {error}") from None
            finally:
                view.close()

        values[number] = memory.remember("settled", observe)
    settled = plan_source(plan.recipe, plan.original, None, planned())
    peak, seconds = max(plan.peak_bytes, settled.peak_bytes), max(plan.seconds, settled.seconds)
    return replace(settled, peak_bytes=peak, seconds=seconds)  # looking is part of the run


class StreamedView(ModelView):
    """The model behind the rewrites `before`, as the method of `step` may look at it."""

    def __init__(
        self, plan: Plan, step: RewritePlan, before: tuple[RewritePlan, ...], memory: Memory, looking: Looking
    ):
        self._plan, self._step, self._before = plan, step, before
        self._memory, self._looking = memory, looking
        self.batches = looking.batches
        self._allowance = Allowance(looking.activation_bytes)
        self._model = open_source(plan, before, looking.source, looking.work, looking.dtype, looking.device)
        self.device = self._model.device
        self.shape = model_shape(self._model.architecture, step.before.infos, plan.float_dtype, self._model.specs)

    def embedded(self, batches: Sequence[Tensor] | None = None) -> HiddenStates:
        batches = self.batches if batches is None else batches
        hidden = embedded(self._model.embed, batches, self._allowance, self._looking.work)
        if not hidden.finite:
            raise CheckpointError(
                f"{self._step.before.name}: tensor {self._model.architecture.embeddings[0]}.weight holds NaN or infinity; the "
                f"checkpoint is damaged: fetch it again"
            )
        return hidden

    def like(self, hidden: HiddenStates, on_disk: bool = False) -> HiddenStates:
        allowance = Allowance(0) if on_disk else self._allowance
        return HiddenStates(list(hidden.shapes), hidden.dtype, allowance, self._looking.work)

    @contextmanager
    def loaded(self, index: int) -> Iterator[LoadedBlock]:
        module = self._model.load_block(index)
        self._model.check_finite(index)
        try:
            yield _Loaded(self._model, index, module)
        finally:
            self._model.unload_block(index)
            release_free_memory()

    def losses(self, hidden: Tensor, ids: Tensor) -> Tensor:
        model = self._model
        normed = model.final_norm(hidden.to(model.device))[:, :-1]
        targets = ids[:, 1:].to(model.device)
        n_rows, n_targets = targets.shape
        tokens = max(MIN_CHUNK_TOKENS, LOGIT_BYTES // (4 * model.architecture.vocab_size))
        parts = [
            _token_losses(model, part, following)
            for part, following in zip(normed.flatten(0, 1).split(tokens), targets.flatten().split(tokens), strict=True)
        ]
        return torch.cat(parts).view(n_rows, n_targets).sum(-1) / max(n_targets, 1)

    def model(self) -> nn.Module:
        return whole_model(self._plan, self._before, self._looking.source, self._looking.work, self._model.device)

    def module(self, model: nn.Module, name: str) -> nn.Module:
        try:
            return model.get_submodule(module_name(self._model.architecture, name))
        except AttributeError:
            raise RecipeError(f"{name} is fused with other layers in the whole model") from None

    def generator(self, purpose: str) -> torch.Generator:
        return seeded(self._plan.recipe.seed, "rewrite", self._step.number, purpose)

    def remember(self, key: str, make: Callable[[], Any]) -> Any:
        return self._memory.remember(key, make)

    def keep(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        return keep(kept_file(self._looking.work, self._step.number, name), make)

    def track(self, phase: str, total: int, unit: str) -> AbstractContextManager[Callable[[str], None]]:
        return tracked(self._looking.progress, phase, total, unit)

    def note(self, message: str) -> None:
        self._looking.progress.note(message)

    def close(self) -> None:
        self._model.close()


def _token_losses(model: StreamedModel, normed: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each of `targets` [tokens]. For a backward pass, logits are computed again, not kept."""

    def losses(normed: Tensor) -> Tensor:
        return functional.cross_entropy(model.logits(normed[None])[0].float(), targets, reduction="none")

    if not (torch.is_grad_enabled() and normed.requires_grad):
        return losses(normed)
    found = checkpoint(losses, normed, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(found, Tensor)
    return found


class _Loaded(LoadedBlock):
    def __init__(self, model: StreamedModel, index: int, module: nn.Module):
        self._model, self.index, self.module = model, index, module
        self._branches: Branches | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        return self._model.call_block(self.module, self.index, hidden.to(self._model.device))

    def branch(self, kind: str, hidden: Tensor) -> Tensor:
        if self._branches is None:
            self._branches = Branches(self._model.architecture, self.index)
        args, kwargs = self._model.block_arguments(self.index, (hidden.shape[0], hidden.shape[1]))
        arguments = named_arguments(self.module, args, kwargs)
        return self._branches.run(kind, self.module, hidden.to(self._model.device), arguments)
