"""One stage: every block in turn is loaded, compressed step by step, written, read back, checked, and left behind.

    for each block:
        for each step, for each site in data order:  capture -> compress -> go on through the compressed modules
        write the shard -> read it back -> the probe must come out bit for bit the same -> journal

The probe is the beginning of the first row: run by itself, so that the check is exact and costs next to nothing.

A block that the journal knows is not compressed again: it is run from its shard, to get the hidden states back.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.calibration.capture import BlockPass, OriginalStream, Place
from compress.calibration.statistics import SiteStatistics, gather
from compress.calibration.store import Allowance, HiddenStates, ReadOnly, embedded
from compress.checkpoint.stream import StreamedModel, tensors_in
from compress.errors import CheckpointError, NumericsError
from compress.methods.base import Outcome
from compress.models.architecture import Site
from compress.models.families import module_name
from compress.pipeline.ends import write_entry, write_head
from compress.pipeline.folding import scale_module, scaled_input
from compress.pipeline.journal import BlockEntry, Journal
from compress.pipeline.layers import Layers
from compress.pipeline.learning import Learner
from compress.pipeline.memory import kept_file, read_kept
from compress.pipeline.meter import Stopwatch, release_free_memory
from compress.pipeline.plan import Plan
from compress.pipeline.progress import Progress
from compress.pipeline.rewriting import open_source, seeded
from compress.pipeline.shards import ENTRY, Shards, part_numbers, stores_head
from compress.pipeline.steps import StepPlan
from compress.pipeline.targets import Target, compress_targets, merged

PROBE_TOKENS = 128  # enough for most experts to be reached, few enough to be free


@dataclass
class StageResult:
    """What a stage leaves behind for the report: figures per layer, seconds by activity, notes."""

    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    replayed_blocks: int = 0


class Stage:
    """Runs one stage of a plan. `batches` are token ids [batch, length].

    After `run`, `probe_ids` and `probe_hidden` are the probe and where it had arrived behind the last block.
    """

    def __init__(
        self,
        plan: Plan,
        number: int,
        source: Path,
        out: Path,
        journal: Journal,
        batches: list[Tensor],
        compute_dtype: torch.dtype,
        device: torch.device,
        activation_bytes: int,
        progress: Progress,
    ):
        self.plan, self.number, self.out, self.journal = plan, number, out, journal
        self.steps = plan.stages[number]
        self.batches, self.compute_dtype, self.device = batches, compute_dtype, device
        self.allowance, self.progress = Allowance(activation_bytes), progress
        self.probe_ids = batches[0][:1, :PROBE_TOKENS]
        self.scratch = journal.path.parent
        self.model = open_source(plan, plan.rewrites, source, self.scratch, compute_dtype, device)
        self.needs_original = any(step.needs_original for step in self.steps)
        self.watch = Stopwatch()
        self.layers = Layers(plan, self.model, compute_dtype, device)
        self.shards = Shards(plan, number, out, self.model.reader, self.watch)
        self.learners = {
            step.number: Learner(self, step, self._start, lambda detail: self.progress.advance(0, detail))
            for step in self.steps
            if step.method.by_blocks
        }
        self.result = StageResult()
        self.folded: dict[str, Tensor] = {}  # of the block at hand: modules whose outputs are scaled

    # ---- the order of things

    @torch.no_grad()
    def run(self) -> StageResult:
        architecture = self.plan.architecture
        finished = self.journal.trusted(self.number, part_numbers(self.plan), self.progress.note)
        self.progress.begin("compress", architecture.n_blocks, "block")
        write_entry(self, finished.get(ENTRY))
        with self.watch("embed"):
            hidden = self.embed_all()
            self.probe_hidden = self.model.embed(self.probe_ids)
            original = hidden.copied(self.scratch) if self.needs_original else None
            for learner in self.learners.values():
                learner.open()
        for index in range(architecture.n_blocks):
            start = time.perf_counter()
            if index in finished:
                self._replay(index, hidden, original)
                self.result.layers.update(finished[index].layers)
                self.result.replayed_blocks += 1
            else:
                self._compress_block(index, hidden, original)
            self.progress.advance(1, f"{architecture.blocks[index]} {time.perf_counter() - start:.1f} s")
        if stores_head(self.plan):
            write_head(self, finished.get(architecture.n_blocks), hidden)
        self.progress.end()
        for states in (hidden, original, *self.learners.values()):
            if states is not None:
                states.close()
        self.result.seconds = self.watch.seconds
        return self.result

    # ---- hidden states

    def embed_all(self) -> HiddenStates:
        return embedded(self.model.embed, self.batches, self.allowance, self.scratch)

    def propagate(self, block: nn.Module, index: int, hidden: HiddenStates, batches: int | None = None) -> None:
        """Run a whole block; `hidden` becomes its outputs, in the first `batches` if not all are wanted."""
        for batch in range(len(hidden))[:batches]:
            hidden[batch] = self.model.call_block(block, index, hidden[batch].to(self.device))

    def _pass_on(self, block: nn.Module, index: int, hidden: HiddenStates) -> None:
        """Run a finished block for what comes behind it. Behind the last one that is the head, if it is compressed; otherwise one
        batch is enough, which shows whether the outputs are finite."""
        wanted = index + 1 < self.plan.architecture.n_blocks or stores_head(self.plan)
        with self.watch("forward"):
            self.propagate(block, index, hidden, None if wanted else 1)

    # ---- one block

    def _compress_block(self, index: int, hidden: HiddenStates, original: HiddenStates | None) -> None:
        with self.watch("forward"):
            for learner in self.learners.values():
                learner.advance(index)
        with self.watch("read"):
            block = self.model.load_block(index)
        self.model.check_finite(index)
        unchanged = copy.deepcopy(block) if original is not None else None
        outcomes: dict[str, Outcome] = {}
        self.folded = {}
        stream = None
        if unchanged is not None and original is not None:
            stream = self._original_stream(unchanged, index, original)
        for step in self.steps:
            last = step is self.steps[-1]
            done = self._step(block, index, step, hidden, stream if step.needs_original else None, last, outcomes)
            outcomes |= {name: merged(outcomes.get(name), outcome) for name, outcome in done.items()}
        if stream is not None:
            with self.watch("forward"):
                stream.finish()
        expected = self.model.call_block(block, index, self.probe_hidden)
        self.model.unload_block(index)
        del block, unchanged, stream
        for learner in self.learners.values():
            learner.leave(index)
        release_free_memory()
        if not hidden.finite:
            raise NumericsError(
                f"{self.plan.architecture.blocks[index]}: its output is not finite after compression; try "
                f"calibration.dtype=float32 or more bits, or check the checkpoint with: compress inspect"
            )
        entry = self.shards.write_block(index, outcomes, self.folded)
        with self.watch("read back"):
            self._check_probe(index, entry, expected)
        self.journal.add(entry)
        self.result.layers.update(entry.layers)

    def _step(
        self,
        block: nn.Module,
        index: int,
        step: StepPlan,
        hidden: HiddenStates,
        stream: OriginalStream | None,
        last: bool,
        before: dict[str, Outcome],
    ) -> dict[str, Outcome]:
        """What one step makes of its layers in the block. `before`: what the steps before it made."""
        if step.method.by_blocks:
            return self._learn(block, index, step, hidden, last, before)
        sites = [s for s in self.plan.architecture.sites(index) if any(n in step.configs for n in s.linears)]
        outcomes: dict[str, Outcome] = {}
        if not sites or not step.needs_data:
            for site in sites:
                for name, outcome in self._compress_site(site, step, None, before).items():
                    outcomes[name] = outcome
                    self.model.skeleton.replace(name, self.layers.running(name, outcome.module))
            if last:
                self._pass_on(block, index, hidden)
            return outcomes
        places = {site.name: self.places(site, step) for site in sites}
        folding = any(name in step.folds for site in sites for name in site.linears)
        target = hidden if last and not folding else ReadOnly(hidden)
        folds: dict[str, Tensor] = {}
        with BlockPass(
            block, Call(self.model, index, hidden), target, places, self.scratch, self.device, stream
        ) as run:
            release_free_memory()
            with self.watch("forward"):
                run.start()
            for site in sites:
                release_free_memory()
                with self.watch("statistics"):
                    statistics = self.gather(site, step, run)
                done = self._compress_site(site, step, statistics, before)
                del statistics
                names = [name for name in site.linears if name in step.configs]
                for position, name in enumerate(names):
                    outcomes[name] = done[name]
                    running, fold = self.layers.running(name, done[name].module), done[name].fold
                    if fold is not None:
                        folds[site.name] = fold
                        running = scaled_input(running, fold)
                    run.replace(site.name, position, running)
                release_free_memory()
                with self.watch("forward"):
                    if last or stream is not None or site is not sites[-1]:
                        run.release(site.name)
            if last:
                run.finish()
        if folding:
            self._fold([site for site in sites if site.name in folds], folds, places, outcomes)
            if last:
                self._pass_on(block, index, hidden)  # as it will from the shard, to the last bit
        return outcomes

    def _fold(
        self, sites: list[Site], folds: dict[str, Tensor], places: dict[str, list[Place]], outcomes: dict[str, Outcome]
    ) -> None:
        """Take scales from the inputs of sites into what makes these inputs."""
        for site in sites:
            for parent, attribute in places[site.name]:
                parent._modules[attribute] = parent.get_submodule(attribute).get_submodule("module")
        for site in sites:
            assert site.producer is not None
            maker, scale = site.producer.name, folds[site.name]
            if maker in outcomes:
                outcomes[maker].module.scale_rows(scale)
                self.model.skeleton.replace(maker, self.layers.running(maker, outcomes[maker].module))
                continue
            scale_module(self.model.skeleton.module(maker), scale, self.plan.architecture.transposed)
            self.folded[maker] = self.folded[maker] * scale if maker in self.folded else scale

    def _learn(
        self,
        block: nn.Module,
        index: int,
        step: StepPlan,
        hidden: HiddenStates,
        last: bool,
        before: dict[str, Outcome],
    ) -> dict[str, Outcome]:
        with self.watch(step.method.name):
            outcomes = self.learners[step.number].learn(block, index, hidden, before)
        self._check(step, outcomes)
        for name, outcome in outcomes.items():
            self.model.skeleton.replace(name, self.layers.running(name, outcome.module))
        if last:
            self._pass_on(block, index, hidden)
        return outcomes

    def _start(
        self, block: nn.Module, index: int, step: StepPlan, hidden: HiddenStates, before: Mapping[str, Outcome]
    ) -> dict[str, Outcome]:
        """What a step that learns starts from: the layers as another method rounds them, site by site."""
        return self._step(block, index, step, hidden, None, False, dict(before))

    def places(self, site: Site, step: StepPlan) -> list[Place]:
        return [self._place(name) for name in site.linears if name in step.configs]

    def _place(self, name: str) -> Place:
        parent, _, attribute = module_name(self.plan.architecture, name).rpartition(".")
        return self.model.skeleton.model.get_submodule(parent), attribute

    def _original_stream(self, unchanged: nn.Module, index: int, original: HiddenStates) -> OriginalStream:
        paths = {id(module): path for path, module in self.model.skeleton.blocks[index].named_modules()}

        def twin(place: Place) -> Place:
            parent, attribute = place
            return unchanged.get_submodule(paths[id(parent)]), attribute

        return OriginalStream(unchanged, Call(self.model, index, original), original, twin, self.scratch, self.device)

    def gather(self, site: Site, step: StepPlan, run: BlockPass) -> SiteStatistics:
        """The statistics that a step asks for, of the inputs that wait at `site`."""
        names = [name for name in site.linears if name in step.configs]
        requests = tuple(dict.fromkeys(r for n in names for r in step.method.statistics(step.configs[n])))
        width = self.plan.layers[names[0]].in_features
        n_tokens = sum(ids.numel() for ids in self.batches)
        gatherer = gather(requests, width, n_tokens, self.generator(step, site.name, "statistics"))
        for x, original in run.inputs(site.name):
            gatherer.add(x, original)
        return gatherer.result(f"{site.name} ({step.method.name})")

    def _compress_site(
        self, site: Site, step: StepPlan, statistics: SiteStatistics | None, before: dict[str, Outcome]
    ) -> dict[str, Outcome]:
        targets = [self._target(name, site, step, before) for name in site.linears if name in step.configs]
        return self.compress_targets(site, step, targets, statistics)

    def _target(self, name: str, site: Site, step: StepPlan, before: dict[str, Outcome]) -> Target:
        """A layer, with what its module borrows where that is new to it: not there yet, or changed by this run."""
        target, spec = self.layers.target(name, site, before.get(name)), step.specs[name]
        if spec.lender() is None or name in before or (target.module and spec.lender() not in self.plan.layers):
            return target
        return replace(target, lender=self.shards.lender(spec, self.journal.finished(self.number)))

    def compress_targets(
        self, site: Site, step: StepPlan, targets: list[Target], statistics: SiteStatistics | None
    ) -> dict[str, Outcome]:
        with self.watch(step.method.name):
            outcomes = compress_targets(
                step,
                site.name,
                targets,
                statistics,
                self.layers.float_dtype,
                lambda purpose: self.generator(step, site.name, purpose),
                lambda detail: self.progress.advance(0, detail),
                continuous=step.starts is not None,
                kept=lambda name: read_kept(kept_file(self.scratch, step.number, name)),
            )
        self._check(step, outcomes)
        return outcomes

    def _check(self, step: StepPlan, outcomes: dict[str, Outcome]) -> None:
        for name, outcome in outcomes.items():
            planned = step.specs[name]
            assert outcome.module.spec == planned, f"{name}: {outcome.module.spec} where {planned} was planned"
            for note in (
                [] if step.starts is not None else outcome.notes
            ):  # what learns on from a start repeats its notes
                self.progress.note(f"{name}: {note}")

    def generator(self, step: StepPlan, site: str, purpose: str) -> torch.Generator:
        """Randomness that depends on the seed and the place only, so that a resumed run draws the same."""
        return seeded(self.plan.recipe.seed, self.number, step.number, site, purpose)

    def _check_probe(self, index: int, entry: BlockEntry, expected: Tensor) -> None:
        """The block as read back from its shard must turn the probe into the very same numbers; it goes on from there."""
        file = self.out / entry.file
        entries = {**self.journal.finished(self.number), index: entry}
        with self.shards.open_block(index, entries) as reader:
            block = self.model.load_block(index, reader, self.plan.specs)
        output = self.model.call_block(block, index, self.probe_hidden)
        self.model.unload_block(index)
        if not torch.equal(output, expected):
            difference = (output - expected).abs().max().item()
            raise CheckpointError(
                f"{file}: read back, {self.plan.architecture.blocks[index]} gives other numbers than before it was written "
                f"(by {difference:.3g}); the disk or the memory is faulty: run again on another disk"
            )
        self.probe_hidden = output

    def _replay(self, index: int, hidden: HiddenStates, original: HiddenStates | None) -> None:
        """Run a finished block from its shard."""
        with self.watch("replay"):
            if original is not None:
                block = self.model.load_block(index)
                self.propagate(block, index, original)
                self.model.unload_block(index)
            for learner in self.learners.values():
                learner.replayed(index)
            with self.shards.open_block(index, self.journal.finished(self.number)) as reader:
                block = self.model.load_block(index, reader, self.plan.specs)
            self.propagate(block, index, hidden)
            self.probe_hidden = self.model.call_block(block, index, self.probe_hidden)
            self.model.unload_block(index)

    def normed(self, hidden: HiddenStates) -> Iterator[Tensor]:
        for batch in range(len(hidden)):
            yield self.model.final_norm(hidden[batch].to(self.device)).flatten(0, -2)


class Call:
    """Runs block `index` for a BlockPass."""

    def __init__(self, model: StreamedModel, index: int, hidden: HiddenStates):
        self.model, self.index, self.shapes = model, index, hidden.shapes

    def __call__(self, block: nn.Module, batch: int, hidden: Tensor) -> Tensor:
        return self.model.call_block(block, self.index, hidden)

    def shared(self, batch: int) -> list[Tensor]:
        return tensors_in(self.model.block_arguments(self.index, self.shapes[batch][:2]))  # type: ignore[arg-type]
