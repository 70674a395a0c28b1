"""Changing how much of its stack a loaded model holds, while it runs.

    model.resize("3.1GiB")        or "2.5bits" per weight, or a number of bytes

What it has stays where it is: growing reads the entries behind it, shrinking lets go of the last ones. A change takes effect
between two forward passes, in whatever threads they run; a pass that has begun ends on the blocks it began with. Keys and
values that a generation has cached stay those of the size at which they were computed.

Files are read, and checked, before the model is touched: a growth that fails leaves it as it was.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from compress.checkpoint.budget import Budget, parse_budget

if TYPE_CHECKING:
    from torch import nn

    from compress.checkpoint.stacked import LoadedStack


@dataclass(frozen=True)
class Resized:
    """What a change of size came to. `nbytes` of the model's tensors, `bits` per weight of the stacked layers; entries of the
    stack before and after."""

    nbytes: int
    bits: float
    n_entries: int
    n_before: int
    nbytes_before: int

    @property
    def changed(self) -> bool:
        return self.n_entries != self.n_before


class Gate:
    """Forward passes go through it, as many at a time as there are; a change of the model waits until none is under way, and
    those that come then wait for it."""

    def __init__(self) -> None:
        self.changing = threading.Lock()  # one change at a time
        self._moved = threading.Condition()
        self._inside = 0  # threads
        self._closing = 0
        self._thread = threading.local()

    def watch(self, module: nn.Module) -> None:
        """Forward passes of `module` go through this gate."""
        module.register_forward_pre_hook(self.enter)
        module.register_forward_hook(self.leave, always_call=True)

    def enter(self, module: nn.Module, *_: Any) -> None:
        """A forward pass of `module` begins."""
        under_way = self._under_way
        if module in under_way:  # no module calls itself: that pass was interrupted by something that hooks do not see
            del under_way[under_way.index(module) :]
        elif not under_way:
            with self._moved:
                while self._closing:
                    self._moved.wait()
                self._inside += 1
        under_way.append(module)

    def leave(self, module: nn.Module, *_: Any) -> None:
        """A forward pass of `module` ends, well or not."""
        if module in self._under_way:
            del self._under_way[self._under_way.index(module) :]
            if not self._under_way:
                self._let_out()

    @contextmanager
    def closed(self) -> Iterator[None]:
        """No forward pass is under way, and none begins."""
        if self._under_way:  # who asks has no pass under way: it was interrupted
            self._under_way.clear()
            self._let_out()
        with self._moved:
            self._closing += 1
            try:
                while self._inside:
                    self._moved.wait()
                yield
            finally:
                self._closing -= 1
                self._moved.notify_all()

    @property
    def _under_way(self) -> list[nn.Module]:
        """Modules whose forward pass this thread is in, outermost first."""
        if not hasattr(self._thread, "modules"):
            self._thread.modules = []
        return self._thread.modules

    def _let_out(self) -> None:
        with self._moved:
            self._inside -= 1
            self._moved.notify_all()

    def __reduce__(self) -> tuple[type[Gate], tuple[()]]:
        return Gate, ()  # a copy of a model has one of its own


def make_resizable(model: Any) -> None:
    """Give `model`, which holds its `stack`, the method `resize`; its forward passes are watched from here on."""
    stack: LoadedStack = model.stack
    base = getattr(model, "base_model", model)
    for module in {id(m): m for m in (model, base)}.values():  # either may be called
        stack.gate.watch(module)
    model.resize = partial(resize, stack)


def resize(stack: LoadedStack, budget: Budget | str | int | float) -> Resized:
    """Bring the model of `stack` to the largest size that fits `budget`: all its tensors, or bits per weight of the stacked ones.

    May be called in any thread; one change at a time. A budget above the whole stack, or above what lies whole in its folder,
    loads what there is.

    Raises: CheckpointError if not even the smallest model fits, saying how large it is; or if what is to be read was changed
        since the model was loaded. The model is as it was then.
    """
    with stack.gate.changing:
        wanted = stack.table.prefix_for(parse_budget(budget, "budget"))
        n_before, nbytes_before = stack.n_entries, stack.nbytes
        if wanted > n_before:
            stack.grow(wanted)
        elif wanted < n_before:
            stack.shrink(wanted)
            give_back()
        return Resized(stack.nbytes, stack.bits, stack.n_entries, n_before, nbytes_before)


def give_back() -> None:
    """Memory that was freed goes back to the system; the C library and torch would keep much of it for later."""
    import torch

    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
