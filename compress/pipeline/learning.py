"""Steps that learn a block's layers together (compress/methods/block.py): what they are given, over windows of blocks.

Beside the hidden states behind the compressed blocks, the original model's run along, up to the end of the window: they are
what is to be matched. Of a window of several blocks the first is the stage's; the others are copies, loaded for the while,
in which the layers are as they were left when the window stood one block earlier, or as the start rounds them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from compress.calibration.store import Allowance, HiddenStates, embedded
from compress.checkpoint.stream import StreamedModel
from compress.checkpoint.writer import replace_file
from compress.errors import CheckpointError
from compress.methods.base import Layer, Outcome
from compress.methods.block import BlockMethod, Learned, WindowTask
from compress.models.families import module_name
from compress.pipeline.layers import Layers
from compress.pipeline.steps import StepPlan

Place = tuple[nn.Module, str]
Begin = Callable[[nn.Module, int, StepPlan, HiddenStates, Mapping[str, Outcome]], dict[str, Outcome]]
"""Rounds the layers of a block, which is loaded, site by site, as the step says: (block, its index, step, inputs, what the
steps before made of its layers) -> outcomes, which are in place."""


class Surroundings(Protocol):
    """What of a stage a `Learner` uses."""

    model: StreamedModel
    layers: Layers
    batches: list[Tensor]
    device: torch.device
    allowance: Allowance
    scratch: Path

    def propagate(self, block: nn.Module, index: int, hidden: HiddenStates) -> None: ...

    def generator(self, step: StepPlan, site: str, purpose: str) -> torch.Generator: ...


class Learner:
    """One step that learns. `begin` rounds what a window has not seen yet; `tell` takes lines about the progress."""

    def __init__(self, stage: Surroundings, step: StepPlan, begin: Begin, tell: Callable[[str], None]):
        assert issubclass(step.method, BlockMethod)
        self.stage, self.step, self.begin, self.tell = stage, step, begin, tell
        self.method: type[BlockMethod] = step.method
        first = {name: self.method.start(config) for name, config in step.configs.items()}
        method = next(iter(first.values()))[0]  # one for all: `window` saw to it in the plan
        configs = {name: config for name, (_, config) in first.items()}
        needs_data = any(method.needs_tokens(config) for config in configs.values())
        self.start = replace(step, method=method, configs=configs, needs_data=needs_data, starts=self._prepared)
        self.width, self.stride = self.method.window(step.configs), self.method.stride(step.configs)
        self.states: dict[str, dict[str, Tensor]] = {}
        self.ahead: HiddenStates | None = None  # of the original model, at the end of the window
        self.behind: HiddenStates | None = None  # of the original model, at the window's beginning, where wanted
        self.passed = 0  # blocks that `ahead` has passed
        self.first = min(index for index in range(stage.model.n_blocks) if self._names(index))

    def _prepared(self, name: str, weight: Tensor) -> Tensor:
        return self.method.prepared(weight, self.step.configs[name])

    # ---- the original model

    def open(self) -> None:
        """Before block 0."""
        embed = self.stage.model.embed
        self.ahead = embedded(embed, self.stage.batches, self.stage.allowance, self.stage.scratch)
        if self.method.original_inputs(self.step.configs):
            self.behind = embedded(embed, self.stage.batches, self.stage.allowance, self.stage.scratch)

    def advance(self, index: int) -> None:
        """The original model runs on to the end of the window that begins with block `index`, which is not loaded yet."""
        assert self.ahead is not None
        while self.passed < self._end(index):
            self._propagate(self.passed, self.ahead)
            self.passed += 1

    def leave(self, index: int) -> None:
        """Block `index` is finished, and not loaded any more."""
        if self.behind is not None and index + 1 < self.stage.model.n_blocks:
            self._propagate(index, self.behind)

    def replayed(self, index: int) -> None:
        """Block `index` was finished by an earlier run."""
        self.advance(index)
        self.leave(index)
        if self.width > 1:
            self._restore(index)

    def close(self) -> None:
        for hidden in (self.ahead, self.behind):
            if hidden is not None:
                hidden.close()

    def _learns(self, index: int) -> bool:
        """Whether a window begins with block `index`; others are finished as the one that left them has them."""
        return (index - self.first) % self.stride == 0

    def _end(self, index: int) -> int:
        """Behind which block the window ends that begins with `index`, or that left it."""
        begin = index - (index - self.first) % self.stride if index > self.first else index
        return min(begin + self.width, self.stage.model.n_blocks)

    def _propagate(self, index: int, hidden: HiddenStates) -> None:
        model = self.stage.model
        self.stage.propagate(model.load_block(index), index, hidden)
        model.unload_block(index)

    # ---- a window

    def learn(
        self, block: nn.Module, index: int, hidden: HiddenStates, before: Mapping[str, Outcome]
    ) -> dict[str, Outcome]:
        """What the step makes of the layers of block `index`, which is loaded and has `hidden` as inputs; `before` is what the
        steps before made of them. The outcomes are in place."""
        names = self._names(index)
        self._check_restored(index, names)
        places = {name: self._place(name) for name in names}
        originals = {name: parent.get_submodule(attribute) for name, (parent, attribute) in places.items()}
        layers = {name: self._layer(name, index, before) for name in names}
        started: dict[str, Outcome] = {}
        final = not self._learns(index)
        if not all(name in self.states for name in names):
            started |= self.begin(block, index, self.start, hidden, before)
            for name, (parent, attribute) in places.items():
                parent._modules[attribute] = originals[name]
        blocks = {index: block}
        if not final and self._end(index) > index + 1:
            self._begin_rest(index, hidden, blocks, places, layers, started)
        if not layers:
            return {}
        assert self.ahead is not None
        task = WindowTask(
            name=self.stage.model.architecture.blocks[index],
            layers=layers,
            started=started,
            states={name: state for name, state in self.states.items() if name in layers},
            finish=frozenset(names),
            rows=WindowRows(hidden, self.behind, self.ahead, self.stage.device),
            run=lambda x: self._run(blocks, x),
            replaced=lambda modules: _replaced(places, modules),
            final=final,
            tell=self.tell,
        )
        learned = self.method.learn(task, self.stage.generator(self.step, task.name, "learn"))
        if self.width > 1:
            self._keep(index, learned)
        return learned.outcomes

    def _begin_rest(
        self,
        index: int,
        hidden: HiddenStates,
        blocks: dict[int, nn.Module],
        places: dict[str, Place],
        layers: dict[str, Layer],
        started: dict[str, Outcome],
    ) -> None:
        """Copies of the window's other blocks, and what their layers are as yet."""
        model = self.stage.model
        entering = hidden.copied(self.stage.scratch)
        for j in range(index + 1, self._end(index)):
            own = {name: layers[name] for name in self._names(j - 1)}
            with _replaced(places, {name: self._running(layer, started) for name, layer in own.items()}):
                self.stage.propagate(blocks[j - 1], j - 1, entering)
            loaded = model.load_block(j)
            names = self._names(j)
            layers |= {name: self._layer(name, j, {}) for name in names}
            unchanged = copy.deepcopy(loaded)
            paths = {id(module): path for path, module in loaded.named_modules()}
            for name in names:
                parent, attribute = self._place(name)
                places[name] = (unchanged.get_submodule(paths[id(parent)]), attribute)
            if not all(name in self.states for name in names):
                started |= self.begin(loaded, j, self.start, entering, {})
            model.unload_block(j)
            blocks[j] = unchanged
        entering.close()

    def _running(self, layer: Layer, started: Mapping[str, Outcome]) -> nn.Module:
        if layer.name in self.states:
            return self.method.resumed(layer, self.states[layer.name])
        return self.stage.layers.running(layer.name, started[layer.name].module)

    def _run(self, blocks: dict[int, nn.Module], x: Tensor) -> Tensor:
        for index, block in blocks.items():
            x = self.stage.model.call_block(block, index, x)
        return x

    def _names(self, index: int) -> list[str]:
        sites = self.stage.model.architecture.sites(index)
        return [name for site in sites for name in site.linears if name in self.step.configs]

    def _layer(self, name: str, index: int, before: Mapping[str, Outcome]) -> Layer:
        sites = self.stage.model.architecture.sites(index)
        site = next(site for site in sites if name in site.linears)
        target = self.stage.layers.target(name, site, before.get(name))
        weight = target.weight if target.module is None else target.module.dense(torch.float32)
        assert weight is not None
        bias = None if target.bias is None else target.bias.detach()
        return Layer(name, weight, bias, self.step.configs[name], self.stage.layers.float_dtype, target.kind)

    def _place(self, name: str) -> Place:
        parent, _, attribute = module_name(self.stage.model.architecture, name).rpartition(".")
        return self.stage.model.skeleton.model.get_submodule(parent), attribute

    # ---- what goes on with the window

    def _keep(self, index: int, learned: Learned) -> None:
        if self._learns(index):
            self.states = learned.state
        flat = {
            f"{name}/{key}": value.contiguous() for name, state in self.states.items() for key, value in state.items()
        }
        file = self._file(index)
        replace_file(file, lambda stream: stream.write(save(flat)))
        self._file(index - 2).unlink(missing_ok=True)

    def _restore(self, index: int) -> None:
        """What was learned beyond block `index` when it was finished."""
        self.states = {}
        file = self._file(index)
        if not file.is_file():  # `learn` says so if it was needed
            return
        for key, value in load_file(file).items():
            name, _, part = key.rpartition("/")
            self.states.setdefault(name, {})[part] = value

    def _check_restored(self, index: int, names: list[str]) -> None:
        """Raises: CheckpointError if what was learned of block `index` by an interrupted run is gone."""
        known = index > self.first and (self.width > self.stride or not self._learns(index))
        if known and not all(name in self.states for name in names):
            raise CheckpointError(
                f"{self._file(index - 1)}: is gone, which held what was learned of {self.stage.model.architecture.blocks[index]} "
                f"when the run stopped; start again with --overwrite"
            )

    def _file(self, index: int) -> Path:
        return self.stage.scratch / f"learned-{self.step.number}-{index}.safetensors"


class WindowRows:
    """Rows of hidden states: see `compress.methods.block.Rows`."""

    def __init__(
        self, hidden: HiddenStates, original: HiddenStates | None, targets: HiddenStates, device: torch.device
    ):
        self._hidden, self._original, self._targets, self._device = hidden, original, targets, device
        self._at = [(batch, row) for batch, shape in enumerate(hidden.shapes) for row in range(shape[0])]
        self.lengths = [hidden.shapes[batch][1] for batch, _ in self._at]

    def inputs(self, rows: list[int], original: bool = False) -> Tensor:
        if not original:
            return self._take(self._hidden, rows)
        assert self._original is not None
        return self._take(self._original, rows)

    def targets(self, rows: list[int]) -> Tensor:
        return self._take(self._targets, rows)

    def _take(self, hidden: HiddenStates, rows: list[int]) -> Tensor:
        held: dict[int, Tensor] = {}
        for row in rows:
            batch = self._at[row][0]
            if batch not in held:
                held[batch] = hidden[batch]
        taken = [held[batch][row] for batch, row in (self._at[r] for r in rows)]
        return torch.stack(taken).to(self._device)


@contextmanager
def _replaced(places: Mapping[str, Place], modules: Mapping[str, nn.Module]) -> Iterator[None]:
    before = {name: places[name][0].get_submodule(places[name][1]) for name in modules}
    try:
        for name, module in modules.items():
            parent, attribute = places[name]
            parent._modules[attribute] = module
        yield
    finally:
        for name, module in before.items():
            parent, attribute = places[name]
            parent._modules[attribute] = module
