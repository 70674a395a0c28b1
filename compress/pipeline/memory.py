"""What a run remembers of looking at the model, and how it shows that it looks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from compress.checkpoint.headers import read_header
from compress.checkpoint.reader import CheckpointReader
from compress.checkpoint.writer import from_tensor, replace_file, write_safetensors, writing
from compress.errors import CheckpointError
from compress.pipeline.output import OBSERVED

if TYPE_CHECKING:
    from compress.pipeline.progress import Progress


KEPT = "matrix"  # the name of the one tensor in a file


class Memory:
    """JSON values under keys, in a file that an interrupted run finds again."""

    def __init__(self, path: Path):
        self.path = path
        self.values: dict[str, Any] = {}
        if path.exists():
            for line in path.read_bytes().split(b"\n")[:-1]:
                try:
                    key, value = json.loads(line)
                except ValueError:
                    break
                self.values[key] = value
            lines = (json.dumps([key, value]) + "\n" for key, value in self.values.items())
            replace_file(path, lambda stream: stream.write("".join(lines).encode()))  # drops a torn last line

    def remember(self, key: str, make: Callable[[], Any]) -> Any:
        if key not in self.values:
            self.values[key] = json.loads(json.dumps(make()))  # the same, whether it was computed or read
            with writing(self.path), open(self.path, "ab") as stream:
                stream.write(json.dumps([key, self.values[key]]).encode() + b"\n")
                stream.flush()
        return self.values[key]


def kept_file(work: Path, step: int, name: str) -> Path:
    """Where a matrix lies that looking at the model for a step found."""
    return work / f"{OBSERVED}{step}.{name}.safetensors"


def read_kept(file: Path) -> Tensor:
    """A matrix that `keep` put there. Raises: CheckpointError if it is not whole."""
    with CheckpointReader(file.parent, read_header(file)) as reader:
        return reader.read(KEPT)


def keep(file: Path, make: Callable[[], Tensor]) -> Tensor:
    """`make()`, or what an interrupted run kept in `file`."""
    if file.exists():
        try:
            return read_kept(file)
        except CheckpointError:
            file.unlink()
    write_safetensors(file, {KEPT: from_tensor(make())})
    return read_kept(file)


@contextmanager
def tracked(progress: Progress, phase: str, total: int, unit: str) -> Iterator[Callable[[str], None]]:
    """Progress of something long: call what it gives after each of `total` units, with a detail to show."""
    progress.begin(phase, total, unit)
    try:
        yield lambda detail: progress.advance(1, detail)
    finally:
        progress.end()
