"""A stacked model that grows and shrinks with the memory that others leave: so much of the machine's is kept free.

    with FollowMemory(model, keep_free=2 * 2**30):
        model.generate(…)

A thread looks EVERY seconds. Too little free: the model shrinks at once, to the largest size that leaves enough, or to its
smallest. More free than that: it grows, if by GROWTH of its size at least, so that it does not follow every ripple.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from compress.checkpoint.budget import Budget
from compress.checkpoint.headers import read_base_headers
from compress.checkpoint.stack import stack_of
from compress.errors import CompressError

if TYPE_CHECKING:
    from compress.checkpoint.resize import Resized
    from compress.checkpoint.stack import StackTable

EVERY = 0.5  # seconds
GROWTH = 0.02  # of the model's bytes


@dataclass(frozen=True)
class Change:
    """A change of size: `seconds` after following began, with `free` bytes of memory before it."""

    seconds: float
    free: int
    done: Resized


class FollowMemory:
    """Follows while it is entered. `changes`: what was done. `error`: what ended it early, such as a file that was replaced."""

    def __init__(
        self,
        model: Any,
        keep_free: int,
        *,
        most: Budget | None = None,
        free: Callable[[], int] | None = None,
        tell: Callable[[Change], object] = lambda change: None,
        every: float = EVERY,
    ):
        """
        Args:
            keep_free: bytes.
            most: the model does not grow above it.
            free: gives the bytes that are free now; by default, of the memory that the model lies in.
            tell: called in the following thread after each change.
        """
        self.model, self.keep_free, self.every = model, keep_free, every
        self.most = _most(model.stack.table, most)
        self.changes: list[Change] = []
        self.error: CompressError | None = None
        self._free = free or (lambda: free_memory(model.device))
        self._tell = tell
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="follow-memory", daemon=True)
        self._began = time.perf_counter()

    def __enter__(self) -> FollowMemory:
        self._began = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(None if kind is None else self.every)  # an interrupted pass would be waited for in vain

    def look(self) -> Change | None:
        """Look once, and change the size if it must or may be changed."""
        stack, free = self.model.stack, self._free()
        size = max(stack.table.minimum, min(stack.nbytes + free - self.keep_free, self.most))
        wanted = stack.table.prefix_for(Budget(str(size), nbytes=size))
        gain = stack.table.nbytes(wanted) - stack.nbytes
        if wanted == stack.n_entries or 0 < gain < GROWTH * stack.nbytes:
            return None
        done = self.model.resize(size)
        if not done.changed:
            return None
        change = Change(time.perf_counter() - self._began, free, done)
        self.changes.append(change)
        self._tell(change)
        return change

    def _follow(self) -> None:
        try:
            while not self._stop.wait(self.every):
                self.look()
        except CompressError as error:
            self.error = error


def free_memory(device: torch.device) -> int:
    """Bytes that are free where a model on `device` lies."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    from compress.pipeline.estimate import available_memory

    return available_memory()


def first_budget(folder: Path, keep_free: int, most: Budget | None, device: torch.device) -> Budget | None:
    """What to load at first so that `keep_free` bytes stay free, the smallest model at least; None if `folder` is no stack."""
    table = stack_of(folder, read_base_headers(folder))
    if table is None:
        return None
    size = max(table.minimum, min(_most(table, most), free_memory(device) - keep_free))
    return Budget(str(size), nbytes=size)


def _most(table: StackTable, most: Budget | None) -> int:
    return table.nbytes(table.fits(most))
