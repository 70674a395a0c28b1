"""What a run remembers of looking at the model, and how it shows that it looks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint.writer import replace_file, writing

if TYPE_CHECKING:
    from compress.pipeline.progress import Progress


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


@contextmanager
def tracked(progress: Progress, phase: str, total: int, unit: str) -> Iterator[Callable[[str], None]]:
    """Progress of something long: call what it gives after each of `total` units, with a detail to show."""
    progress.begin(phase, total, unit)
    try:
        yield lambda detail: progress.advance(1, detail)
    finally:
        progress.end()
