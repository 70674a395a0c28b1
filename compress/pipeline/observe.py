"""What must be settled before the first block is compressed: ranks under a common budget, the layers worth compressing.

A method that `observes` looks at the model as it is before the run, through a `View`: site by site with statistics, block by
block with hidden states, or as a whole. What it settles, a configuration for each layer, is kept in the work folder, so
that a resumed run neither looks again nor decides otherwise; the plan is made anew from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compress.calibration.capture import BlockPass
from compress.calibration.statistics import SiteStatistics, gather
from compress.calibration.store import HiddenStates, ReadOnly
from compress.errors import RecipeError
from compress.methods.base import Kept, Layer, LayerShape, MethodConfig, SiteTask, View
from compress.models.architecture import Site
from compress.models.families import module_name
from compress.pipeline.memory import Memory, keep, kept_file, tracked
from compress.pipeline.output import OBSERVED
from compress.pipeline.plan import Plan, plan_source
from compress.pipeline.rewriting import whole_model
from compress.pipeline.stage import Call, Stage
from compress.pipeline.steps import Decisions, StepPlan, sizes
from compress.pipeline.targets import Target

if TYPE_CHECKING:
    from compress.pipeline.progress import Progress


def settle(plan: Plan, stage: Callable[[], Stage], source: Path, work: Path, progress: Progress) -> Plan:
    """The plan in which nothing is left to be settled.

    Args:
        stage: opens the pass whose model is looked at.
        work: the folder in which decisions are kept.
    """
    decisions: Decisions = {}
    for step in (step for steps in plan.stages for step in steps):
        observing = {name: config for name, config in step.configs.items() if step.method.observes(config)}
        if observing:
            decisions[step.number] = _settle_step(plan, step, observing, stage(), source, work, progress)
    if not decisions:
        return plan
    settled = plan_source(plan.recipe, plan.original, decisions, plan.rewrites)
    peak, seconds = max(plan.peak_bytes, settled.peak_bytes), max(plan.seconds, settled.seconds)
    settled = replace(settled, peak_bytes=peak, seconds=seconds)  # looking is part of the run
    if settled.bytes_after > plan.bytes_after:
        progress.note(f"settled: {settled.bytes_after:,} bytes of layers, where {plan.bytes_after:,} were planned")
    return settled


def _settle_step(
    plan: Plan,
    step: StepPlan,
    observing: dict[str, MethodConfig],
    stage: Stage,
    source: Path,
    work: Path,
    progress: Progress,
) -> dict[str, MethodConfig | Kept]:
    memory = Memory(work / f"{OBSERVED}{step.number}.jsonl")

    def observe() -> dict[str, Any]:
        found = step.method.observe(StageView(plan, step, observing, stage, source, memory, progress), observing)
        assert found.keys() == observing.keys(), f"{step.method.name} settled other layers than it was asked for"
        return {
            name: {"kept": choice.reason} if isinstance(choice, Kept) else {"config": choice.model_dump(mode="json")}
            for name, choice in found.items()
        }

    try:
        settled = memory.remember("settled", observe)
    finally:
        stage.model.close()
    return {
        name: Kept(choice["kept"]) if "kept" in choice else step.method.Config.model_validate(choice["config"])
        for name, choice in settled.items()
    }


class StageView(View):
    """The source of a stage, as a method may look at it."""

    def __init__(
        self,
        plan: Plan,
        step: StepPlan,
        observing: dict[str, MethodConfig],
        stage: Stage,
        source: Path,
        memory: Memory,
        progress: Progress,
    ):
        self._plan, self._stage, self._source, self._memory, self._progress = plan, stage, source, memory, progress
        self._step = StepPlan(step.number, step.method, observing, step.specs, step.needs_data, step.needs_original)
        layers = {name: plan.layers[name] for name in observing}
        roles = {name: site.role(name) for site in plan.architecture.all_sites() for name in site.linears}
        self.shapes = {n: LayerShape(n, y.out_features, y.in_features, role=roles[n]) for n, y in layers.items()}
        steps = [step for stage_ in plan.stages for step in stage_]
        self.nbytes = sizes(steps, step.number, self.shapes, plan.source_specs, plan.float_dtype)
        self.blocks = {name: layer.block for name, layer in layers.items()}
        self.n_blocks = plan.architecture.n_blocks
        self.batches = stage.batches

    @torch.no_grad()
    def sites(self) -> Iterator[tuple[SiteTask, SiteStatistics | None]]:
        stage, step = self._stage, self._step
        with self.track("observe", self.n_blocks, "block") as advance:
            hidden = stage.embed_all() if step.needs_data else None
            if self._plan.architecture.embedding.linears[0] in step.configs:
                yield self._outer(self._plan.architecture.embedding, None), None
            for index in range(self.n_blocks):
                yield from self._block_sites(index, hidden)
                advance(self._plan.architecture.blocks[index])
            head = self._plan.architecture.head
            if head.linears[0] in step.configs:
                yield self._outer(head, hidden), self._head_statistics(head, hidden)
            if hidden is not None:
                hidden.close()

    def _block_sites(self, index: int, hidden: HiddenStates | None) -> Iterator[tuple[SiteTask, SiteStatistics | None]]:
        stage, step = self._stage, self._step
        sites = [s for s in self._plan.architecture.sites(index) if any(n in step.configs for n in s.linears)]
        if hidden is None and not sites:
            return
        block = stage.model.load_block(index)
        stage.model.check_finite(index)
        if hidden is None:
            for site in sites:
                yield self._task(site), None
        elif not sites:
            stage.propagate(block, index, hidden)
        else:
            places = {site.name: stage.places(site, step) for site in sites}
            call = Call(stage.model, index, hidden)
            with BlockPass(block, call, hidden, places, stage.scratch, stage.device) as run:
                run.start()
                for site in sites:
                    yield self._task(site), stage.gather(site, step, run)
                    run.release(site.name)
                run.finish()
        stage.model.unload_block(index)

    def _task(self, site: Site) -> SiteTask:
        targets = [self._stage.layers.target(name, site, None) for name in site.linears if name in self._step.configs]
        return self._site_task(site, targets)

    def _outer(self, site: Site, hidden: HiddenStates | None) -> SiteTask:
        return self._site_task(site, [self._stage.layers.outer_target(site, None)])

    def _site_task(self, site: Site, targets: list[Target]) -> SiteTask:
        layers = []
        for target in targets:
            weight = target.weight if target.module is None else target.module.dense(torch.float32)
            assert weight is not None
            config, dtype = self._step.configs[target.name], self._stage.layers.float_dtype
            layers.append(Layer(target.name, weight, target.bias, config, dtype, target.kind))
        return SiteTask(site.name, tuple(layers))

    def _head_statistics(self, site: Site, hidden: HiddenStates | None) -> SiteStatistics | None:
        if hidden is None:
            return None
        name, stage = site.linears[0], self._stage
        requests = self._step.method.statistics(self._step.configs[name])
        n_tokens = sum(ids.numel() for ids in self.batches)
        generator = stage.generator(self._step, site.name, "statistics")
        gatherer = gather(requests, self.shapes[name].in_features, n_tokens, generator)
        for x in stage.normed(hidden):
            gatherer.add(x)
        return gatherer.result(f"{name} ({self._step.method.name})")

    def weight(self, name: str) -> Tensor:
        return self._stage.layers.source_weight(name)

    @torch.no_grad()
    def states(self) -> Iterator[Tensor]:
        stage = self._stage
        with self.track("observe", self.n_blocks, "block") as advance:
            hidden = stage.embed_all()
            yield self._last_tokens(hidden)
            for index in range(self.n_blocks):
                block = stage.model.load_block(index)
                stage.propagate(block, index, hidden)
                stage.model.unload_block(index)
                yield self._last_tokens(hidden)
                advance(self._plan.architecture.blocks[index])
            hidden.close()

    def _last_tokens(self, hidden: HiddenStates | ReadOnly) -> Tensor:
        return torch.cat([hidden[batch][:, -1].float() for batch in range(len(hidden))])

    def model(self) -> nn.Module:
        return whole_model(self._plan, self._plan.rewrites, self._source, self._stage.scratch, self._stage.device)

    def place(self, model: nn.Module, name: str) -> tuple[nn.Module, str]:
        parent, _, attribute = module_name(self._plan.architecture, name).rpartition(".")
        try:
            return model.get_submodule(parent), attribute
        except AttributeError:
            raise RecipeError(
                f"steps.{self._step.number}.{self._step.method.name}: {name} is fused with other layers in the whole model; "
                f"skip the experts"
            ) from None

    def block_modules(self, model: nn.Module) -> list[nn.Module]:
        architecture = self._plan.architecture
        return [model.get_submodule(module_name(architecture, block)) for block in architecture.blocks]

    def generator(self, purpose: str) -> torch.Generator:
        return self._stage.generator(self._step, "observe", purpose)

    def remember(self, key: str, make: Callable[[], Any]) -> Any:
        return self._memory.remember(key, make)

    def keep(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        return keep(kept_file(self._stage.scratch, self._step.number, name), make)

    def track(self, phase: str, total: int, unit: str) -> AbstractContextManager[Callable[[str], None]]:
        return tracked(self._progress, phase, total, unit)

    def note(self, message: str) -> None:
        self._progress.note(message)
