"""Activations of all calibration batches: in memory up to a cap, on disk behind it.

Two things live here between computations: the hidden states at a block's border (`HiddenStates`), and whatever a
forward that was stopped in the middle still holds (`Spill`). Where they live never changes a bit of the result.
"""

from __future__ import annotations

import ctypes
import errno
import os
import tempfile
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from compress.errors import CheckpointError
from compress.linalg.finite import all_finite


class ScratchFile:
    """An unlinked temporary file of slots: what it holds is gone with the process, whatever ends it."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._descriptor: int | None = None
        self._end = 0

    def allocate(self, nbytes: int) -> int:
        """The offset of a new slot."""
        offset, self._end = self._end, self._end + nbytes
        return offset

    def write(self, offset: int, data: memoryview) -> None:
        try:
            if self._descriptor is None:
                self._descriptor, name = tempfile.mkstemp(prefix=".activations-", dir=self._folder)
                os.unlink(name)
            while data:
                n = os.pwrite(self._descriptor, data, offset)
                data, offset = data[n:], offset + n
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise CheckpointError(
                f"{self._folder}: activations cannot be written: {'the disk is full' if full else error.strerror}; free "
                f"space, use fewer calibration.samples, or raise --activation-memory"
            ) from None

    def read(self, offset: int, data: memoryview) -> None:
        assert self._descriptor is not None
        while data:
            n = os.preadv(self._descriptor, [data], offset)
            assert n > 0
            data, offset = data[n:], offset + n

    def forget(self) -> None:
        """Begin anew: what was written is no longer wanted, the room it took is used again."""
        self._end = 0

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, which must outlive them. (Through numpy, its storage could not be resized.)"""
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    if tensor.numel() == 0:
        return memoryview(b"")
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


class Allowance:
    """How many bytes of activations may lie in memory, and how many do. One for all that live at a time."""

    def __init__(self, cap_bytes: int):
        self.cap_bytes, self.held = cap_bytes, 0

    def take(self, nbytes: int) -> bool:
        """Whether there is room; if so it is taken."""
        fits = self.held + nbytes <= self.cap_bytes
        self.held += nbytes if fits else 0
        return fits

    def give_back(self, nbytes: int) -> None:
        self.held -= nbytes


class ReadOnly:
    """Hidden states that a pass reads and does not overwrite: nobody wants its outputs."""

    def __init__(self, hidden: HiddenStates):
        self._hidden = hidden
        self.in_memory, self.allowance = hidden.in_memory, hidden.allowance

    def __len__(self) -> int:
        return len(self._hidden)

    def __getitem__(self, batch: int) -> Tensor:
        return self._hidden[batch]

    def __setitem__(self, batch: int, hidden: Tensor) -> None:
        return


class HiddenStates:
    """One tensor per batch. The batches that fit into the allowance stay in memory; the others go to disk."""

    def __init__(self, shapes: list[tuple[int, ...]], dtype: torch.dtype, allowance: Allowance, folder: Path):
        self.shapes, self.dtype, self.allowance = list(shapes), dtype, allowance
        sizes = [torch.Size(shape).numel() * dtype.itemsize for shape in shapes]
        self.in_memory = [allowance.take(size) for size in sizes]
        self._taken = sum(size for size, here in zip(sizes, self.in_memory, strict=True) if here)
        self._held: list[Tensor | None] = [None] * len(shapes)
        self._file = ScratchFile(folder)
        self._slots: dict[int, int] = {}
        self.finite = True  # whether everything that was ever put here was

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, batch: int) -> Tensor:
        held = self._held[batch]
        if held is not None:
            return held
        tensor = torch.empty(self.shapes[batch], dtype=self.dtype)
        self._file.read(self._slots[batch], raw(tensor))
        return tensor

    def __setitem__(self, batch: int, hidden: Tensor) -> None:
        assert hidden.shape[:-1] == self.shapes[batch][:-1] and hidden.dtype == self.dtype
        hidden = hidden.cpu().contiguous()
        if hidden.shape != self.shapes[batch]:  # the stream's width changes
            if hidden.shape[-1] > self.shapes[batch][-1]:
                self._slots.pop(batch, None)
            self.shapes[batch] = tuple(hidden.shape)
        self.finite = self.finite and all_finite(hidden)
        if self.in_memory[batch]:
            self._held[batch] = hidden
            return
        if batch not in self._slots:
            self._slots[batch] = self._file.allocate(hidden.nbytes)
        self._file.write(self._slots[batch], raw(hidden))

    def copied(self, folder: Path) -> HiddenStates:
        """The same once more, under the same allowance."""
        other = HiddenStates(self.shapes, self.dtype, self.allowance, folder)
        for batch in range(len(self)):
            other[batch] = self[batch]
        return other

    def drop(self, batch: int) -> None:
        """Forget a batch that is held in memory (its slot on disk is reused when it is set again)."""
        self._held[batch] = None

    def close(self) -> None:
        self._held = [None] * len(self.shapes)
        self.allowance.give_back(self._taken)
        self._taken = 0
        self._file.close()


def embedded(
    embed: Callable[[Tensor], Tensor], batches: Sequence[Tensor], allowance: Allowance, folder: Path
) -> HiddenStates:
    """What enters block 0, for batches of token ids [rows, length].

    Args:
        embed: token ids -> hidden states [rows, length, width].
        folder: for what the allowance has no room for.
    """
    first = embed(batches[0])
    hidden = HiddenStates([(*ids.shape, first.shape[-1]) for ids in batches], first.dtype, allowance, folder)
    hidden[0] = first
    for batch, ids in enumerate(batches[1:], 1):
        hidden[batch] = embed(ids)
    return hidden


class Spill:
    """Empties what a stopped forward still holds and the allowance has no room for, and fills it before it goes on.

    Only tensors that were seen by `watch` are touched, and of those only storages that nothing outside the forward shares
    (`keep`). What is on an accelerator goes to CPU memory while the allowance has room; everything else goes to disk.
    """

    def __init__(self, allowance: Allowance, folder: Path):
        self._allowance = allowance
        self._watched: list[weakref.ref[Tensor]] = []
        self._kept: set[int] = set()
        self._file = ScratchFile(folder)
        self._saved: dict[int, _Saved] = {}  # by identity of the storage
        self._allowed: dict[int, int] = {}  # bytes taken from the allowance, by identity of the storage

    def keep(self, tensor: Tensor) -> None:
        """Leave this tensor alone: it is shared with other forwards."""
        self._kept.add(_identity(tensor))

    def watch(self, tensor: Tensor) -> None:
        self._watched.append(weakref.ref(tensor))

    def empty(self) -> None:
        """Move the storages of watched tensors that are still alive away, as far as they must be. What `peek` brought back
        is just dropped."""
        alive = [tensor for reference in self._watched if (tensor := reference()) is not None]
        self._watched = [weakref.ref(tensor) for tensor in alive]
        for tensor in alive:
            storage, identity = tensor.untyped_storage(), _identity(tensor)
            on_cpu = storage.device.type == "cpu"
            if identity in self._kept or storage.nbytes() == 0 or (on_cpu and identity in self._allowed):
                continue
            if identity not in self._saved:
                allowed = self._allowance.take(storage.nbytes())
                if allowed:
                    self._allowed[identity] = storage.nbytes()
                    if on_cpu:
                        continue
                self._saved[identity] = self._save(storage, to_disk=not allowed)
            storage.resize_(0)

    def peek(self, tensor: Tensor) -> None:
        """Bring one tensor back to be read, not to be changed, until the next `empty` or `fill`."""
        saved = self._saved.get(_identity(tensor))
        if saved is not None:
            self._restore(saved)

    def fill(self) -> None:
        """Bring everything back that `empty` moved."""
        for saved in self._saved.values():
            self._restore(saved)
        self._saved.clear()
        self._file.forget()
        self._give_back()

    def close(self) -> None:
        """The forward has ended."""
        self._saved.clear()
        self._file.close()
        self._give_back()

    def _give_back(self) -> None:
        self._allowance.give_back(sum(self._allowed.values()))
        self._allowed.clear()

    def _save(self, storage: torch.UntypedStorage, to_disk: bool) -> _Saved:
        data = _bytes_of(storage)
        if not to_disk:
            return _Saved(storage, storage.nbytes(), data.to("cpu", copy=True))
        data = data.cpu()
        offset = self._file.allocate(data.nbytes)
        self._file.write(offset, raw(data))
        return _Saved(storage, data.nbytes, offset)

    def _restore(self, saved: _Saved) -> None:
        if saved.storage.nbytes():
            return
        saved.storage.resize_(saved.nbytes)
        data = _bytes_of(saved.storage)
        if isinstance(saved.place, Tensor):
            data.copy_(saved.place)
            return
        buffer = data if data.device.type == "cpu" else torch.empty(saved.nbytes, dtype=torch.uint8)
        self._file.read(saved.place, raw(buffer))
        if buffer is not data:
            data.copy_(buffer)


@dataclass(frozen=True)
class _Saved:
    """A storage of `nbytes`, and where its bytes are: an offset in the file, or a copy in CPU memory."""

    storage: torch.UntypedStorage
    nbytes: int
    place: int | Tensor


def _identity(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    """The storage as a uint8 tensor, which must not outlive its next `resize_`."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # type: ignore[call-overload]
