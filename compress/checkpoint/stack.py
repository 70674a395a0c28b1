"""The stack of a checkpoint: the levels of its modules behind the first, in the order in which they are worth loading.

The files of the index hold everything that is needed, level 0 of the stacked modules included, and are a model by themselves.
`stack-00001-of-00003.safetensors`, … hold the rest: entry after entry, one level of one module each, its tensors one behind
the other. Whoever has room for n entries reads the first n; `stack.json` says where they lie:

    {"format_version": 1, "order": "proxy", "modules": ["model.layers.0.mlp.up_proj", …],
     "files": [{"name": "stack-00001-of-00003.safetensors", "nbytes": 67108864,
                "entries": [[module, level, offset, nbytes, crc32], …]}, …],
     "checksum": <SHA-256 of all that stands before>}

Nothing of it is believed: it is held to config.json, to the sizes of the files and to their headers, before anything is
allocated; and each entry to its checksum when it is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint.budget import Budget, shown
from compress.checkpoint.headers import TensorInfo, parse_header, read_json
from compress.errors import CheckpointError
from compress.modules.spec import DTYPE_BYTES, ModuleSpec

if TYPE_CHECKING:
    from torch import Tensor

STACK = "stack.json"
VERSION = 1
MAX_ENTRIES = 10_000_000
MAX_BUFFERS = 1000  # of one read; the system's limit is 1024
READ_BYTES = 16 * 2**20  # at a time: while the next are read, the checksum of these is taken


@dataclass(frozen=True)
class Entry:
    """Level `level` of `module`, in file number `file`."""

    module: str
    level: int
    file: int
    offset: int
    nbytes: int
    crc: int


@dataclass(frozen=True)
class StackFile:
    """A file of the stack, as the table knows it."""

    name: str
    nbytes: int


@dataclass(frozen=True)
class Seen:
    """What a file was when the stack was opened. Another one in its place has other numbers."""

    nbytes: int
    inode: int
    modified_ns: int


class StackTable:
    """The stack of one folder. Made by `open_stack`.

    Attributes:
        entries: all of them, in stack order.
        available: how many of the first ones lie whole in the folder.
        base_bytes: of all tensors that are not in the stack.
        specs: the stacked modules, with all their levels.
    """

    def __init__(
        self,
        folder: Path,
        files: Sequence[StackFile],
        entries: Sequence[Entry],
        specs: Mapping[str, ModuleSpec],
        base_bytes: int,
        order: str,
    ):
        self.folder, self.files, self.entries = folder, tuple(files), tuple(entries)
        self.specs, self.base_bytes, self.order = dict(specs), base_bytes, order
        self._bytes = [0, *accumulate(entry.nbytes for entry in self.entries)]
        self._seen = {number: seen for number in range(len(files)) if (seen := _seen(folder / files[number].name))}
        self.available = self._n_whole()

    # ---- sizes

    @property
    def minimum(self) -> int:
        """Bytes of the smallest model: every module at its first level."""
        return self.base_bytes

    @property
    def maximum(self) -> int:
        """Bytes of the whole stack's model."""
        return self.nbytes(len(self.entries))

    @property
    def n_weights(self) -> int:
        """Weights of the stacked modules."""
        return sum(spec.in_features * spec.out_features for spec in self.specs.values())

    def nbytes(self, n: int) -> int:
        """Bytes of all tensors of the model of the first `n` entries."""
        return self.base_bytes + self._bytes[n]

    def bits(self, n: int) -> float:
        """Bits per weight of the stacked modules with the first `n` entries."""
        first = sum(spec.first(1).nbytes("F32") for spec in self.specs.values())
        return 8 * (first + self._bytes[n]) / max(self.n_weights, 1)

    def prefix_for(self, budget: Budget | None) -> int:
        """The largest number of entries that fit, among those that are there; None: all of them.

        Raises: CheckpointError if not even the smallest model fits, saying how large it is.
        """
        return min(self.fits(budget), self.available)

    def fits(self, budget: Budget | None) -> int:
        """`prefix_for`, were all files there."""
        if budget is None:
            return len(self.entries)
        if budget.nbytes is not None:
            room = budget.nbytes - self.base_bytes
        else:
            assert budget.bits is not None
            room = int((budget.bits - self.bits(0)) * self.n_weights / 8 + 1e-6)
        if room < 0:
            raise CheckpointError(
                f"{self.folder}: memory_budget={budget.text} is too little: the smallest model that it holds takes "
                f"{self.minimum:,} bytes ({shown(self.minimum)}), {self.bits(0):.3f} bits per weight; give it that, or more"
            )
        return bisect_right(self._bytes, room) - 1

    def levels(self, n: int) -> dict[str, int]:
        """How many levels each stacked module has with the first `n` entries."""
        levels = dict.fromkeys(self.specs, 1)
        for entry in self.entries[:n]:
            levels[entry.module] = entry.level + 1
        return levels

    # ---- what is there

    def _n_whole(self) -> int:
        for number, entry in enumerate(self.entries):
            seen = self._seen.get(entry.file)
            if seen is None or entry.offset + entry.nbytes > seen.nbytes:
                return number
        return len(self.entries)

    @property
    def loss(self) -> str | None:
        """What of the stack is missing, in a sentence; None if nothing is."""
        if self.available == len(self.entries):
            return None
        file = self.files[self.entries[self.available].file].name
        number = self.entries[self.available].file
        fate = "is missing" if number not in self._seen else "is cut"
        lost = len(self.entries) - self.available
        return (
            f"{self.folder}: {file} {fate}: {lost:,} of {len(self.entries):,} stacked blocks are lost, "
            f"{self.maximum - self.nbytes(self.available):,} of {self.maximum:,} bytes; what is there loads, at "
            f"{self.bits(self.available):.3f} of {self.bits(len(self.entries)):.3f} bits per weight"
        )

    def files_for(self, n: int) -> list[str]:
        """Names of the files that hold the first `n` entries."""
        return [file.name for file in self.files[: self.entries[n - 1].file + 1]] if n else []

    def infos(self, n: int) -> dict[str, TensorInfo]:
        """Where the tensors of the first `n` entries lie."""
        found = {}
        for entry in self.entries[:n]:
            offset = entry.offset
            for suffix, (dtype, shape) in self.specs[entry.module].level(entry.level, "F16").items():
                name, nbytes = f"{entry.module}.{suffix}", prod(shape) * DTYPE_BYTES[dtype]
                found[name] = TensorInfo(name, dtype, shape, self.folder / self.files[entry.file].name, offset, nbytes)
                offset += nbytes
        return found

    # ---- reading

    def read(self, first: int, last: int, *, check: bool = True) -> Iterator[tuple[Entry, dict[str, Tensor]]]:
        """Entries `first` to `last` (less one) with their tensors, by suffix; in order, by long contiguous reads.

        Args:
            check: hold each entry to its checksum; it is taken while the next ones are read.

        Raises: CheckpointError naming the file if it is not the one that was there when the stack was opened, or what it
            holds is not what was written.
        """
        assert 0 <= first <= last <= len(self.entries), (first, last)
        if last > self.available:
            raise CheckpointError(self.loss or "")
        self._announce(first, last)
        with ThreadPoolExecutor(1) as pool:
            before: tuple[list[Entry], list[dict[str, Tensor]], Future[None]] | None = None
            for group in self._groups(first, last):
                tensors = self._read_group(group)
                if before is not None:
                    yield from _settled(*before)
                before = group, tensors, pool.submit(self._check, group, tensors if check else [])
            if before is not None:
                yield from _settled(*before)

    def _announce(self, first: int, last: int) -> None:
        """Let the system begin to fetch what will be read: its own readahead is short."""
        if not hasattr(os, "posix_fadvise"):
            return
        extents: dict[int, tuple[int, int]] = {}
        for entry in self.entries[first:last]:
            begin = extents.get(entry.file, (entry.offset, 0))[0]
            extents[entry.file] = begin, entry.offset + entry.nbytes
        for number, (begin, end) in extents.items():
            with suppress(OSError):  # whoever reads will say so
                descriptor = os.open(self.folder / self.files[number].name, os.O_RDONLY)
                try:
                    os.posix_fadvise(descriptor, begin, end - begin, os.POSIX_FADV_WILLNEED)
                finally:
                    os.close(descriptor)

    def _groups(self, first: int, last: int) -> Iterator[list[Entry]]:
        """Entries that lie one behind the other in one file, as many as one read takes."""
        group: list[Entry] = []
        n_buffers = nbytes = 0
        for entry in self.entries[first:last]:
            n = len(self.specs[entry.module].level(entry.level, "F16"))
            ends = group and group[-1].offset + group[-1].nbytes
            if group and (
                entry.file != group[-1].file
                or entry.offset != ends
                or n_buffers + n > MAX_BUFFERS
                or nbytes + entry.nbytes > READ_BYTES
            ):
                yield group
                group, n_buffers, nbytes = [], 0, 0
            group.append(entry)
            n_buffers, nbytes = n_buffers + n, nbytes + entry.nbytes
        if group:
            yield group

    def _read_group(self, group: list[Entry]) -> list[dict[str, Tensor]]:
        import torch

        from compress.checkpoint.reader import TORCH_DTYPES

        found: list[dict[str, Tensor]] = []
        buffers: list[memoryview] = []
        for entry in group:
            level = self.specs[entry.module].level(entry.level, "F16")
            tensors = {
                suffix: torch.empty(shape, dtype=TORCH_DTYPES[dtype]) for suffix, (dtype, shape) in level.items()
            }
            found.append(tensors)
            buffers += [
                memoryview(t.view(-1).view(torch.uint8).numpy()) for t in tensors.values()
            ]  # no copies in between
        self._fill(group[0].file, group[0].offset, buffers)
        return found

    def _fill(self, number: int, offset: int, buffers: list[memoryview]) -> None:
        file = self.folder / self.files[number].name
        try:
            descriptor = os.open(file, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be opened: {error.strerror}; load the model again") from None
        try:
            self._check_same(file, number, os.fstat(descriptor))
            while buffers:
                n = os.preadv(descriptor, buffers, offset)
                if n == 0:
                    raise CheckpointError(f"{file}: ends inside the stack; the file was cut: fetch it again")
                offset += n
                while buffers and n >= len(buffers[0]):
                    n -= len(buffers.pop(0))
                if n:
                    buffers[0] = buffers[0][n:]
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read: {error.strerror}; check the disk") from None
        finally:
            os.close(descriptor)

    def _check_same(self, file: Path, number: int, status: os.stat_result) -> None:
        if Seen(status.st_size, status.st_ino, status.st_mtime_ns) != self._seen.get(number):
            raise CheckpointError(
                f"{file}: was replaced or changed since the model was loaded, and would not fit to what it has; load the "
                f"model again"
            )

    def _check(self, group: list[Entry], read: list[dict[str, Tensor]]) -> None:
        import torch

        for entry, tensors in zip(group, read, strict=False):
            crc = 0
            for tensor in tensors.values():
                crc = zlib.crc32(memoryview(tensor.view(-1).view(torch.uint8).numpy()), crc)
            if crc != entry.crc:
                raise CheckpointError(
                    f"{self.folder / self.files[entry.file].name}: level {entry.level} of {entry.module} is not what was "
                    f"written (its checksum differs from that in {STACK}); the file is damaged or of another run: fetch it again"
                )


def _settled(
    group: list[Entry], tensors: list[dict[str, Tensor]], checked: Future[None]
) -> Iterator[tuple[Entry, dict[str, Tensor]]]:
    checked.result()
    yield from zip(group, tensors, strict=True)


def _seen(file: Path) -> Seen | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return Seen(status.st_size, status.st_ino, status.st_mtime_ns)


def table_json(
    modules: Sequence[str], files: Sequence[tuple[StackFile, Sequence[Entry]]], order: str
) -> dict[str, Any]:
    """The contents of `stack.json`."""
    numbers = {name: number for number, name in enumerate(modules)}
    listed = [
        {
            "name": file.name,
            "nbytes": file.nbytes,
            "entries": [[numbers[e.module], e.level, e.offset, e.nbytes, e.crc] for e in entries],
        }
        for file, entries in files
    ]
    content = {"format_version": VERSION, "order": order, "modules": list(modules), "files": listed}
    return {**content, "checksum": _checksum(content)}


def _checksum(content: Mapping[str, Any]) -> str:
    kept = {key: value for key, value in content.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def open_stack(folder: Path, specs: Mapping[str, ModuleSpec], base_bytes: int = 0) -> StackTable | None:
    """The stack of `folder`; None if it has none.

    Args:
        specs: the modules that config.json describes, with all their levels.
        base_bytes: of all tensors in the files of the index.

    Raises: CheckpointError naming the file that is no table, or not that of these modules, or is not what the table says.
    """
    file = folder / STACK
    if not file.is_file():
        return None
    table = parse_table(folder, read_json(file), specs, base_bytes)
    for number in table._seen:
        _check_header(table, number)
    return table


def stack_of(folder: Path, infos: Mapping[str, TensorInfo], budget: Budget | None = None) -> StackTable | None:
    """The stack of `folder`, `infos` being the tensors of its index; None if it has none.

    Raises: CheckpointError as `open_stack`, or, with a `budget`, if there is no stack.
    """
    if (folder / STACK).is_file():
        from compress.checkpoint.description import modules_of

        specs = modules_of(read_json(folder / "config.json"))
        return open_stack(folder, specs, sum(info.nbytes for info in infos.values()))
    if budget is not None:
        raise no_stack(folder)
    return None


def no_stack(name: object) -> CheckpointError:
    """What to say where a budget is given for a checkpoint that is no stack."""
    return CheckpointError(
        f"{name}: is no stack, so memory_budget chooses nothing; leave it out, or compress the model with bitstack"
    )


def parse_table(
    folder: Path, content: Mapping[str, Any], specs: Mapping[str, ModuleSpec], base_bytes: int
) -> StackTable:
    """The table that `content` of a `stack.json` describes. Raises: CheckpointError as `open_stack`."""
    file = folder / STACK
    version = content.get("format_version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise CheckpointError(
            f"{file}: format_version {version!r:.40} is not known here; upgrade with: pip install -U compress-llm"
        )
    if content.get("checksum") != _checksum(content):
        raise CheckpointError(f"{file}: its checksum does not fit its contents; the file is damaged: fetch it again")
    stacked = {name: spec for name, spec in specs.items() if spec.n_levels > 1}
    modules, listed = content.get("modules"), content.get("files")
    if not isinstance(modules, list) or not isinstance(listed, list) or not set(map(str, modules)) <= stacked.keys():
        raise CheckpointError(
            f"{file}: names other modules than config.json describes as stacked; the two are not of one model: fetch both again"
        )
    files: list[StackFile] = []
    entries: list[Entry] = []
    levels = dict.fromkeys(modules, 1)
    for number, described in enumerate(listed):
        files.append(_stack_file(file, described, number, len(listed)))
        end = None
        for fields in described["entries"]:
            entry = _entry(file, fields, modules, number)
            spec = stacked[entry.module]
            expected = spec.level_bytes(entry.level, "F16") if entry.level < spec.n_levels else -1
            follows = end is None or entry.offset == end
            if entry.level != levels[entry.module] or entry.nbytes != expected or not follows:
                raise CheckpointError(
                    f"{file}: level {entry.level} of {entry.module} at byte {entry.offset:,} cannot be; fetch it again"
                )
            levels[entry.module] += 1
            end = entry.offset + entry.nbytes
            entries.append(entry)
        if end is not None and end > files[-1].nbytes:
            raise CheckpointError(f"{file}: entries lie behind the end of {files[-1].name}; fetch it again")
        if len(entries) > MAX_ENTRIES:
            raise CheckpointError(f"{file}: more than {MAX_ENTRIES:,} entries, which no model has")
    missing = next((name for name in modules if levels[name] != stacked[name].n_levels), None)
    if missing is not None:
        raise CheckpointError(
            f"{file}: has {levels[missing]} levels of {missing}, config.json describes {stacked[missing].n_levels}; the two "
            f"are not of one model: fetch both again"
        )
    stacked = {name: stacked[name] for name in modules}
    return StackTable(folder, files, entries, stacked, base_bytes, str(content.get("order")))


def stack_name(number: int, total: int) -> str:
    return f"stack-{number + 1:05d}-of-{total:05d}.safetensors"


def _stack_file(file: Path, described: Any, number: int, total: int) -> StackFile:
    right = isinstance(described, dict) and isinstance(described.get("entries"), list)
    name, nbytes = (described.get("name"), described.get("nbytes")) if right else (None, None)
    if name != stack_name(number, total) or type(nbytes) is not int or nbytes < 0:
        raise CheckpointError(f"{file}: file {number} is described as {described!r:.100}; fetch it again")
    return StackFile(name, nbytes)


def _entry(file: Path, fields: Any, modules: Sequence[str], number: int) -> Entry:
    whole = isinstance(fields, list) and len(fields) == 5 and all(type(x) is int and x >= 0 for x in fields)
    if not whole or fields[0] >= len(modules):
        raise CheckpointError(f"{file}: {fields!r:.100} is no entry; fetch it again")
    return Entry(modules[fields[0]], fields[1], number, *fields[2:])


def _check_header(table: StackTable, number: int) -> None:
    """The header of a file that is there says the same as the table. Of a cut one, it may still be whole."""
    described, file = table.files[number], table.folder / table.files[number].name
    try:
        with open(file, "rb") as stream:
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > described.nbytes:
                start, length = b"", 0
            data = start + stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}; check the disk") from None
    if len(data) < 8 + length or not data:
        return  # cut inside its header: no entry of it is whole
    if table._seen[number].nbytes > described.nbytes:
        raise CheckpointError(
            f"{file}: {table._seen[number].nbytes:,} bytes, {STACK} says {described.nbytes:,}; it is of another run: fetch "
            f"both again"
        )
    infos = parse_header(data, file, described.nbytes)
    mine = [entry for entry in table.entries if entry.file == number]
    expected: dict[str, TensorInfo] = {}
    for entry in mine:
        offset = entry.offset
        for suffix, (dtype, shape) in table.specs[entry.module].level(entry.level, "F16").items():
            name, nbytes = f"{entry.module}.{suffix}", prod(shape) * DTYPE_BYTES[dtype]
            expected[name] = TensorInfo(name, dtype, shape, file, offset, nbytes)
            offset += nbytes
    if infos != expected:
        wrong = next((name for name in {**expected, **infos} if infos.get(name) != expected.get(name)), "")
        raise CheckpointError(
            f"{file}: its header and {STACK} do not agree on {wrong}; they are not of one run: fetch both again"
        )
