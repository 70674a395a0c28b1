"""What of a run is finished, so that an interrupted one goes on instead of starting again.

The journal lies in the output folder while the run lasts: a header line (what is being done: recipe, source, versions),
then one line for each finished block, written after the block's shard is safely on disk. A torn last line is a block that
was not finished. The folder is locked while a run works on it; the lock goes with the process, however it ends.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from compress.checkpoint.writer import replace_file, writing
from compress.errors import CheckpointError, RecipeError
from compress.pipeline.output import WORK_FOLDER, discard

JOURNAL = "journal.jsonl"
LOCK = "lock"
DEVICE, DTYPE = "device", "dtype of the arithmetic"  # keys of the header


@dataclass(frozen=True)
class BlockEntry:
    """A finished block: its shard with size and checksum, and what the report will say of its layers."""

    stage: int
    block: int
    file: str
    nbytes: int
    sha256: str
    layers: dict[str, Any] = field(default_factory=dict)


class Journal:
    """The journal of one output folder. Create by `open_journal`."""

    def __init__(self, folder: Path, header: dict[str, Any], entries: list[BlockEntry]):
        self.folder = folder
        self.header = header
        self.entries = entries

    @property
    def path(self) -> Path:
        return self.folder / WORK_FOLDER / JOURNAL

    def finished(self, stage: int) -> dict[int, BlockEntry]:
        """Finished blocks of a stage, by number."""
        return {entry.block: entry for entry in self.entries if entry.stage == stage}

    def trusted(self, stage: int, parts: Iterable[int], note: Callable[[str], None]) -> dict[int, BlockEntry]:
        """The finished ones among `parts` whose shards are what the journal says, up to the first that is not."""
        finished = self.finished(stage)
        trusted: dict[int, BlockEntry] = {}
        for part in parts:
            entry = finished.get(part)
            if entry is None:
                break
            file = self.folder / entry.file
            if not file.is_file() or file.stat().st_size != entry.nbytes or sha256_of(file) != entry.sha256:
                note(f"{file}: not as the journal knows it; compressing again from there")
                break
            trusted[part] = entry
        return trusted

    def add(self, entry: BlockEntry) -> None:
        """Note a block as finished. Its shard must be on disk already."""
        self.entries.append(entry)
        with writing(self.path), open(self.path, "ab") as stream:
            stream.write(json.dumps(asdict(entry), sort_keys=True).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())


def open_journal(folder: Path, header: dict[str, Any]) -> Journal:
    """The journal of `folder`, new or continued. What was begun there without finishing a block is discarded.

    Args:
        header: identifies the work; a journal with another header is not continued.

    Raises: RecipeError if blocks were finished with other settings, saying which differ and what to do.
    """
    work = folder / WORK_FOLDER
    with writing(work):
        work.mkdir(parents=True, exist_ok=True)
    found, entries = _read(work / JOURNAL)
    if entries:
        _refuse_other_work(folder, found, header)
    else:
        discard(folder, keep_observed=found == header)
    journal = Journal(folder, header, entries)
    _rewrite(journal)  # drops a torn last line, so that the next one does not continue it
    return journal


def _read(path: Path) -> tuple[dict[str, Any], list[BlockEntry]]:
    """Header and whole entries; what follows a line that is not whole is not believed."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return {}, []
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}; start again with --overwrite") from None
    header: dict[str, Any] = {}
    entries = []
    for number, line in enumerate(lines):
        try:
            content = json.loads(line)
            if number == 0:
                header = dict(content)
            else:
                entries.append(BlockEntry(**content))
        except (ValueError, TypeError):
            break
    return header, entries


def _rewrite(journal: Journal) -> None:
    lines = [journal.header, *(asdict(entry) for entry in journal.entries)]
    text = "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines)
    replace_file(journal.path, lambda stream: stream.write(text.encode()))


def _refuse_other_work(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    different = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
    if different and set(different) <= {DEVICE, DTYPE} <= found.keys():
        raise RecipeError(
            f"{folder}: holds an unfinished run on {found[DEVICE]} in {found[DTYPE]}, which would come out otherwise on "
            f"{wanted[DEVICE]} in {wanted[DTYPE]}; use --device {found[DEVICE]}, choose another --out, or discard it with "
            f"--overwrite"
        )
    if different:
        raise RecipeError(
            f"{folder}: holds an unfinished run with another {', '.join(different)}; continue that one with its own recipe, "
            f"choose another --out, or discard it with --overwrite"
        )


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process. Raises: CheckpointError if another run holds it."""
    descriptor = _lock(folder)
    try:
        yield
    finally:
        os.close(descriptor)


def check_free(folder: Path) -> None:
    """Raises: CheckpointError if another run holds `folder`. Changes nothing there."""
    try:
        descriptor = os.open(folder / WORK_FOLDER / LOCK, os.O_RDONLY)
    except OSError:
        return
    try:
        _flock(descriptor, fcntl.LOCK_SH, folder)
    finally:
        os.close(descriptor)


def _lock(folder: Path) -> int:
    work = folder / WORK_FOLDER
    while True:
        with writing(work):
            work.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(work / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _flock(descriptor, fcntl.LOCK_EX, folder)
            if _same_file(descriptor, work / LOCK):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the run that held it finished and took the file away: lock the new one


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _flock(descriptor: int, kind: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CheckpointError(f"{folder}: another run is working on it; wait for it or choose another --out") from None
    except OSError as error:
        raise CheckpointError(
            f"{folder}: cannot be locked: {error.strerror}; choose an --out on another file system"
        ) from None


def sha256_of(path: Path) -> str:
    """Checksum of a file, read in pieces."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as stream:
            while piece := stream.read(2**24):
                digest.update(piece)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read back: {error.strerror}; choose another --out") from None
    return digest.hexdigest()
