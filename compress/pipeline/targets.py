"""One step at one site: every layer goes through the method, those that an earlier step made leaf by leaf.

Leaves are compressed in data order. The first ones see the site's input, like whole layers do, and share a task with them:
statistics, factors of statistics, column loops. Behind them each leaf has an input of its own, whose statistics follow from
the site's; and it was fitted anew to what became of the leaves before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from compress.calibration.statistics import SecondMoment, SiteStatistics
from compress.methods.base import Kept, Layer, LayerShape, Outcome, SiteTask, nothing_kept
from compress.modules.base import CompressedModule, Leaf
from compress.pipeline.steps import StepPlan, leaf_name


@dataclass(frozen=True)
class Target:
    """A layer that a step applies to. `module` is what earlier steps made of it, in the dtype in which it is stored;
    without one, `weight` float32 [out_features, in_features] is what there is. `lender`: of what the layer borrows, where that
    is new to it."""

    name: str
    weight: Tensor | None
    bias: Tensor | None
    module: CompressedModule | None = None
    kind: Literal["linear", "embedding"] = "linear"
    lender: nn.Module | None = None


def compress_targets(
    step: StepPlan,
    site: str,
    targets: Sequence[Target],
    statistics: SiteStatistics | None,
    scale_dtype: torch.dtype,
    generator: Callable[[str], torch.Generator],
    tell: Callable[[str], None],
    continuous: bool = False,
    kept: Callable[[str], Tensor] = nothing_kept,
) -> dict[str, Outcome]:
    """Layer name -> what the step made of it.

    Args:
        statistics: of the input that all targets share.
        generator: randomness for a purpose.
        tell: takes a line about what goes on inside the step.
        continuous: whether `Outcome.continuous` is wanted.
        kept: gives what the step's method kept when it looked at the model.

    Raises: NumericsError naming layer and step.
    """
    second_moment = None if statistics is None else statistics.values.get(SecondMoment())
    works = [_Work(_with_lent(target, second_moment), step) for target in targets]
    for position in range(max(len(work.leaves) for work in works)):
        jobs = [_job(work, work.leaves[position], scale_dtype) for work in works if position < len(work.leaves)]
        together = [job for job in jobs if job.leaf.input_map is None]
        for group in [together, *([job] for job in jobs if job.leaf.input_map is not None)]:
            if not group:
                continue
            shared = None if statistics is None else statistics.mapped(group[0].leaf.input_map)
            where = site if group is together else group[0].layer.name
            purpose = "compress" if where == site else f"compress/{where}"
            task = SiteTask(where, tuple(job.layer for job in group), tell, continuous, kept)
            done = step.method.compress(task, shared, generator(purpose))
            for job in group:
                job.work.take(job.name, done[job.layer.name], second_moment)
    return {work.target.name: work.outcome() for work in works}


def _with_lent(target: Target, second_moment: Tensor | None) -> Target:
    """A module that is there, fitted to what is lent to it now."""
    if target.lender is None or target.module is None:
        return target
    return replace(target, module=target.module.with_lent(target.lender, second_moment), lender=None)


def merged(before: Outcome | None, after: Outcome) -> Outcome:
    """`after`, with what was said of the layer before."""
    if before is None:
        return after
    return Outcome(after.module, {**before.report, **after.report}, [*before.notes, *after.notes])


@dataclass
class _Work:
    """A layer on its way through a step."""

    target: Target
    step: StepPlan
    module: CompressedModule | None = None
    leaves: list[str] = field(default_factory=list)  # those that the method compresses, in data order
    report: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    continuous: Tensor | None = None
    fold: Tensor | None = None

    def __post_init__(self) -> None:
        self.module = self.target.module
        config = self.step.configs[self.target.name]
        shapes = {"": (0, 0)} if self.module is None else self.module.spec.leaf_shapes()
        self.leaves = list(shapes)
        if self.leaves != [""]:
            masked = frozenset() if self.module is None else self.module.spec.masked_leaves()
            planned = {
                leaf: self.step.method.plan(
                    LayerShape(leaf_name(self.target.name, leaf), *shape, masked=leaf in masked), config
                )
                for leaf, shape in shapes.items()
            }
            self.leaves = [leaf for leaf in self.leaves if not isinstance(planned[leaf], Kept)]

    def leaf(self, name: str) -> Leaf:
        if self.module is not None:
            return self.module.leaves()[name]
        assert self.target.weight is not None
        return Leaf(self.target.weight)

    def take(self, leaf: str, outcome: Outcome, second_moment: Tensor | None) -> None:
        if self.module is None:
            self.module = outcome.module
        else:
            self.module = self.module.with_leaf(leaf, outcome.module, second_moment)
        self.report |= {leaf_name(leaf, key) if leaf else key: value for key, value in outcome.report.items()}
        self.notes += [f"{leaf}: {note}" if leaf else note for note in outcome.notes]
        self.continuous = outcome.continuous if leaf == "" else None
        self.fold = outcome.fold

    def outcome(self) -> Outcome:
        assert self.module is not None
        return Outcome(self.module, self.report, self.notes, self.fold, continuous=self.continuous)


@dataclass(frozen=True)
class _Job:
    """A leaf, ready for the method."""

    work: _Work
    name: str
    leaf: Leaf
    layer: Layer


def _job(work: _Work, name: str, scale_dtype: torch.dtype) -> _Job:
    leaf, target = work.leaf(name), work.target
    whole = name == ""
    starts = work.step.starts
    layer = Layer(
        leaf_name(target.name, name),
        leaf.weight if starts is None else starts(target.name, leaf.weight),
        target.bias if whole else None,
        work.step.configs[target.name],
        scale_dtype,
        target.kind if whole else "linear",
        leaf.mask,
        lender=target.lender if whole else None,
        folds=target.name in work.step.folds,
    )
    return _Job(work, name, leaf, layer)
