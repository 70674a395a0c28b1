"""How a long run tells what it is doing. The command line shows it; a library user sees nothing unless they ask."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives what happens. Every method may be called from the run's thread only."""

    def begin(self, phase: str, total: int, unit: str) -> None:
        """A phase starts; `total` steps of `unit` follow."""

    def advance(self, steps: int = 1, detail: str = "") -> None:
        """`steps` more are done; `detail` says what is going on."""

    def end(self) -> None:
        """The phase is over."""

    def note(self, message: str) -> None:
        """Something the user must be told."""


class Silent:
    """Shows nothing, keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def begin(self, phase: str, total: int, unit: str) -> None: ...

    def advance(self, steps: int = 1, detail: str = "") -> None: ...

    def end(self) -> None: ...

    def note(self, message: str) -> None:
        self.notes.append(message)
