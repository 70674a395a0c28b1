"""Buffers for packed weights: aligned to 64 bytes, and on pages of 2 MB where the system gives them.

Reading weights once per token touches every page of them; with pages of 4 KB the processor looks up addresses as often as
it waits for memory. Large buffers get a mapping of their own, small ones share mappings, so that nothing is lost to
rounding. A mapping lives as long as a tensor over it.

    COMPRESS_HUGE_PAGES=off   ordinary memory
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from contextlib import suppress

import torch
from torch import Tensor

ALIGNMENT = 64
HUGE_PAGE = 2 << 20
SHARED = 32 << 20  # size of a mapping that small buffers share


def allocate(n_bytes: int) -> Tensor:
    """uint8 [n_bytes], not initialised; the address is a multiple of 64."""
    if not huge_pages_possible():
        return _aligned(n_bytes)
    if n_bytes >= SHARED // 2:
        return _mapped(n_bytes)[:n_bytes]
    return _SHARED_MAPPING.take(n_bytes)


def huge_pages_possible() -> bool:
    """Whether the system can be asked for pages of 2 MB."""
    return hasattr(mmap, "MADV_HUGEPAGE") and os.environ.get("COMPRESS_HUGE_PAGES", "").lower() != "off"


def _mapped(n_bytes: int) -> Tensor:
    """uint8, at least n_bytes, whole huge pages; freed with the last tensor over it."""
    whole = -(-n_bytes // HUGE_PAGE) * HUGE_PAGE
    memory = mmap.mmap(-1, whole + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    with suppress(OSError):  # a kernel without huge pages: the buffer is as good as any other
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8, count=whole, offset=-address % HUGE_PAGE)


def _aligned(n_bytes: int) -> Tensor:
    memory = torch.empty(n_bytes, dtype=torch.uint8)
    if memory.data_ptr() % ALIGNMENT == 0:  # as torch allocates on most systems
        return memory
    memory = torch.empty(n_bytes + ALIGNMENT, dtype=torch.uint8)
    start = -memory.data_ptr() % ALIGNMENT
    return memory[start : start + n_bytes]


class _SharedMapping:
    """Cuts small buffers from one mapping after the other."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.rest: Tensor | None = None

    def take(self, n_bytes: int) -> Tensor:
        room = -(-n_bytes // ALIGNMENT) * ALIGNMENT
        with self.lock:
            if self.rest is None or self.rest.numel() < room:
                self.rest = _mapped(SHARED)
            taken, self.rest = self.rest[:n_bytes], self.rest[room:]
        return taken


_SHARED_MAPPING = _SharedMapping()
