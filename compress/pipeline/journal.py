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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from compress.checkpoint.writer import replace_file, writing
from compress.errors import CheckpointError, RecipeError

WORK_FOLDER = ".compress"
JOURNAL = "journal.jsonl"


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

    def add(self, entry: BlockEntry) -> None:
        """Note a block as finished. Its shard must be on disk already."""
        self.entries.append(entry)
        with writing(self.path), open(self.path, "ab") as stream:
            stream.write(json.dumps(asdict(entry), sort_keys=True).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())


def open_journal(folder: Path, header: dict[str, Any]) -> Journal:
    """The journal of `folder`, new or continued.

    Args:
        header: identifies the work; a journal with another header is not continued.

    Raises: RecipeError if the folder was begun with other settings, saying which differ and what to do.
    """
    work = folder / WORK_FOLDER
    path = work / JOURNAL
    with writing(work):
        work.mkdir(parents=True, exist_ok=True)
    if path.exists():
        lines = _whole_lines(path)
        if lines:
            _refuse_other_work(folder, lines[0], header)
            journal = Journal(folder, header, [BlockEntry(**line) for line in lines[1:]])
            _rewrite(journal)  # drops a torn last line, so that the next one does not continue it
            return journal
    journal = Journal(folder, header, [])
    _rewrite(journal)
    return journal


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def _rewrite(journal: Journal) -> None:
    lines = [journal.header, *(asdict(entry) for entry in journal.entries)]
    text = "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines)
    replace_file(journal.path, lambda stream: stream.write(text.encode()))


def _refuse_other_work(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    different = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
    if different:
        raise RecipeError(
            f"{folder}: holds an unfinished run with another {', '.join(different)}; continue that one with its own recipe, "
            f"choose another --out, or discard it with --overwrite"
        )


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process. Raises: CheckpointError if another run holds it."""
    work = folder / WORK_FOLDER
    with writing(work):
        work.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(work / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{folder}: another run is working on it; wait for it or choose another --out") from None
        yield
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Checksum of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while piece := stream.read(2**24):
            digest.update(piece)
    return digest.hexdigest()
