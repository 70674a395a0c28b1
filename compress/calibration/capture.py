"""One pass of all batches through one block, stopped at every site, each operation done once.

A method that compresses site after site must see the inputs of each site as the already compressed sites before it leave
them. Running the block again for every site repeats all that came before. Here nothing is repeated: every batch has a
forward of its own (a greenlet), which stops when the input of a site arrives, holding just what the rest of the block still
needs; when the site's new modules are in place, it goes on from there.

    start      every batch runs to its first site
    inputs     the batches stopped at a site hand over its input
    release    the site's modules were replaced: its batches run on, to their next site or to the block's end

A batch need not visit a site (an expert that got no token), so a batch can wait at a later site than another one.
Only one forward runs at a time, always on this thread: thread-local state of torch (grad mode, devices) is shared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from greenlet import greenlet
from torch import Tensor, nn

from compress.calibration.store import HiddenStates, ReadOnly, Spill

Place = tuple[nn.Module, str]  # a linear's parent module and its name there


class BlockCall(Protocol):
    """Runs a block on the hidden states of one batch, with the keyword arguments that the model gives this block."""

    def __call__(self, block: nn.Module, batch: int, hidden: Tensor) -> Tensor: ...

    def shared(self, batch: int) -> list[Tensor]:
        """The tensors among those arguments: masks, rotary tables. Other batches use them too."""


class Gate(nn.Module):
    """Stands in the place of a linear during the pass: stops the forward when its site is open, else just runs it."""

    def __init__(self, site: str, target: nn.Module):
        super().__init__()
        self.site = site
        self.target = target
        self.open = True

    def forward(self, x: Tensor) -> Tensor:
        if self.open:
            _stop(self.site, x)
        return self.target(x)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("target"), name)


def _stop(site: str, x: Tensor) -> None:
    """Hand `x` to whoever started this forward, and wait to be resumed."""
    parent = greenlet.getcurrent().parent
    assert parent is not None, "a gated module ran outside a BlockPass"
    parent.switch((site, x))


@dataclass
class Stopped:
    """A forward that waits: at which site, with which input."""

    site: str
    x: Tensor


class _Runner(greenlet):
    """A greenlet that knows what may be emptied while it waits: tensors of `watched_numel` elements or more."""

    spill: Spill
    watched_numel: int


class Forward:
    """One batch on its way through one block. While it waits, what memory has no room for lies on disk."""

    def __init__(self, run: Callable[[Tensor], Tensor], spill: Spill):
        self._greenlet = _Runner(run)
        self._greenlet.spill = self._spill = spill
        self.stopped: Stopped | None = None
        self.output: Tensor | None = None

    def start(self, hidden: Tensor) -> None:
        self._greenlet.watched_numel = hidden.numel()
        self._note(self._greenlet.switch(hidden))

    def resume(self) -> None:
        self._spill.fill()
        self.stopped = None
        self._note(self._greenlet.switch())

    def input(self) -> Tensor:
        """The input of the site where it waits."""
        assert self.stopped is not None
        self._spill.peek(self.stopped.x)
        return self.stopped.x

    def rest(self) -> None:
        """The input was used: let go of memory until `resume`."""
        self._spill.empty()

    def abandon(self) -> None:
        """End a waiting forward without finishing it."""
        if not self._greenlet.dead:
            self._greenlet.throw()
        self.stopped = None
        self._spill.close()

    def _note(self, result: Any) -> None:
        if self._greenlet.dead:
            self.output = result
            self._spill.close()
            return
        site, x = result
        self.stopped = Stopped(site, x)
        self._spill.watch(x)
        self._spill.empty()


class Watch:
    """Shows the large tensors that go in and out of a block's modules to the forward that runs, until `end`."""

    def __init__(self, block: nn.Module):
        modules = list(block.modules())
        self._hooks = [module.register_forward_pre_hook(self._see) for module in modules]
        self._hooks += [module.register_forward_hook(self._see) for module in modules]

    def end(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @staticmethod
    def _see(module: nn.Module, args: tuple[Any, ...], output: Any = None) -> None:
        runner = greenlet.getcurrent()
        if isinstance(runner, _Runner):
            for value in (*args, *(output if isinstance(output, tuple) else (output,))):
                if isinstance(value, Tensor) and value.numel() >= runner.watched_numel:
                    runner.spill.watch(value)


class BlockPass:
    """Runs every batch through `block`, site by site. Use as a context manager: gates are removed at the end.

    Args:
        block: the block, on its device, with real weights.
        call: runs the block on one batch (it knows the block's keyword arguments).
        hidden: the block's inputs, replaced by its outputs as batches finish (by `finish`).
        sites: site name -> places of its linears: where to stop, in data order.
        scratch: the folder for activations that do not fit into memory.
        original: the same block unchanged, with its own inputs, for methods that compare the two streams.
    """

    def __init__(
        self,
        block: nn.Module,
        call: BlockCall,
        hidden: HiddenStates | ReadOnly,
        sites: dict[str, list[Place]],
        scratch: Path,
        device: torch.device,
        original: OriginalStream | None = None,
    ):
        self.block, self.call, self.hidden, self.sites = block, call, hidden, sites
        self.scratch, self.device, self.original = scratch, device, original
        self.gates: dict[str, list[Gate]] = {}
        self.forwards: list[Forward] = []
        self._done: set[str] = set()
        self._watch: Watch | None = None

    def __enter__(self) -> BlockPass:
        self.gates = place_gates(self.sites)
        self._watch = Watch(self.block)
        if self.original is not None:
            self.original.place_gates(self.sites)
        return self

    def __exit__(self, *_: object) -> None:
        for forward in self.forwards:
            forward.abandon()
        if self._watch is not None:
            self._watch.end()
        for site, places in self.sites.items():
            for (parent, attribute), gate in zip(places, self.gates[site], strict=True):
                parent._modules[attribute] = gate.target
        if self.original is not None:
            self.original.remove_gates()

    def start(self) -> None:
        """Every batch runs to its first site (or through, if it meets none)."""
        for batch in range(len(self.hidden)):
            self.forwards.append(start_forward(self.block, self.call, batch, self.hidden, self.device, self.scratch))
            self._keep_output(batch)
        if self.original is not None:
            self.original.start()

    def inputs(self, site: str) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The inputs that arrived at `site`, batch by batch, as [tokens, in_features]; beside it the original's, if wanted."""
        for batch, forward in enumerate(self.forwards):
            if forward.stopped is None or forward.stopped.site != site:
                continue
            original = None if self.original is None else self.original.input(batch, site)
            yield forward.input().flatten(0, -2), original
            forward.rest()
            if self.original is not None:
                self.original.rest(batch)

    def replace(self, site: str, position: int, module: nn.Module) -> None:
        """Put `module` in the place of the site's linear number `position`."""
        self.gates[site][position].target = module

    def release(self, site: str) -> None:
        """Let the batches that wait at `site` run on."""
        self._done.add(site)
        for gate in self.gates[site]:
            gate.open = False
        for batch, forward in enumerate(self.forwards):
            if forward.stopped is not None and forward.stopped.site == site:
                forward.resume()
                self._keep_output(batch)
        if self.original is not None:
            self.original.release(site)

    def finish(self) -> None:
        """All sites are done: every batch must have come out of the block. `hidden` then holds the outputs."""
        for batch, forward in enumerate(self.forwards):
            if forward.stopped is not None:
                raise AssertionError(
                    f"batch {batch} still waits at {forward.stopped.site}: the sites are not in data order"
                )

    def _keep_output(self, batch: int) -> None:
        forward = self.forwards[batch]
        if forward.output is not None:
            self.hidden[batch] = forward.output
            forward.output = None


class OriginalStream:
    """The unchanged block beside the one being compressed, batch for batch, stopped at the same sites.

    `twin` leads from a place in the compressed block to the same place in the unchanged one.
    """

    def __init__(
        self,
        block: nn.Module,
        call: BlockCall,
        hidden: HiddenStates,
        twin: Callable[[Place], Place],
        scratch: Path,
        device: torch.device,
    ):
        self.block, self.call, self.hidden, self.twin = block, call, hidden, twin
        self.scratch, self.device = scratch, device
        self.forwards: list[Forward] = []
        self._outputs: dict[int, Tensor] = {}

    def place_gates(self, sites: dict[str, list[Place]]) -> None:
        self._sites = {site: [self.twin(place) for place in places] for site, places in sites.items()}
        self._gates = place_gates(self._sites)
        self._watch = Watch(self.block)

    def remove_gates(self) -> None:
        self._watch.end()
        for batch, forward in enumerate(self.forwards):
            if forward.output is not None:
                self._outputs[batch] = forward.output
            forward.abandon()
        self.forwards = []
        for site, places in self._sites.items():
            for (parent, attribute), gate in zip(places, self._gates[site], strict=True):
                parent._modules[attribute] = gate.target

    def start(self) -> None:
        for batch in range(len(self.hidden)):
            self.forwards.append(start_forward(self.block, self.call, batch, self.hidden, self.device, self.scratch))

    def input(self, batch: int, site: str) -> Tensor:
        forward = self.forwards[batch]
        assert forward.stopped is not None and forward.stopped.site == site, "the two streams visit different sites"
        return forward.input().flatten(0, -2)

    def rest(self, batch: int) -> None:
        self.forwards[batch].rest()

    def release(self, site: str) -> None:
        for gate in self._gates[site]:
            gate.open = False
        for forward in self.forwards:
            if forward.stopped is not None and forward.stopped.site == site:
                forward.resume()

    def finish(self) -> None:
        """`hidden` becomes the outputs of the unchanged block, which is run once more if no pass went through to its end."""
        for batch in range(len(self.hidden)):
            output = self._outputs.pop(batch, None)
            self.hidden[batch] = (
                self.call(self.block, batch, self.hidden[batch].to(self.device)) if output is None else output
            )


def start_forward(
    block: nn.Module, call: BlockCall, batch: int, hidden: HiddenStates | ReadOnly, device: torch.device, scratch: Path
) -> Forward:
    """Send one batch on its way."""
    spill = Spill(hidden.allowance, scratch)
    for tensor in call.shared(batch):
        spill.keep(tensor)
    start = hidden[batch].to(device)
    if hidden.in_memory[batch] and device.type == "cpu":
        spill.keep(start)  # it lies in `hidden`, which counts it
    else:
        spill.watch(start)
    forward = Forward(lambda x: call(block, batch, x), spill)
    forward.start(start)
    return forward


def place_gates(sites: dict[str, list[Place]]) -> dict[str, list[Gate]]:
    """Put a gate in front of each linear. Only the gate holds the linear then, so a replaced one is freed."""
    gates: dict[str, list[Gate]] = {}
    for site, places in sites.items():
        gates[site] = []
        for parent, attribute in places:
            linear = parent._modules[attribute]
            assert linear is not None
            gates[site].append(Gate(site, linear))
            parent._modules[attribute] = gates[site][-1]
    return gates
