"""Progress on stderr: bars with the time that remains and memory on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.progress import BarColumn, Progress, Task, TextColumn
from rich.text import Text

from compress.cli.show import console, human_bytes, human_time, note, once_each
from compress.pipeline.meter import anonymous_bytes

LINE_SECONDS = 10.0  # between two plain lines
RECENT = 4  # steps whose mean duration predicts the rest; a resumed run's first ones are quicker


class Pace:
    """How long the rest will take, from the last few steps."""

    def __init__(self, total: int):
        self.total, self.done = total, 0
        self.start = self.last = time.monotonic()
        self.durations: list[float] = []

    def advance(self, steps: int) -> None:
        if steps == 0:
            return
        now = time.monotonic()
        self.durations = [*self.durations, *[(now - self.last) / steps] * min(steps, RECENT)][-RECENT:]
        self.done, self.last = self.done + steps, now

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.start

    @property
    def remaining(self) -> float | None:
        """Seconds; None before the first step is done."""
        if not self.durations:
            return None
        rest = (self.total - self.done) * sum(self.durations) / len(self.durations)
        return max(rest - (time.monotonic() - self.last), 0.0)


class Display:
    """What the pipeline reports (`compress.pipeline.progress.Progress`), shown. Use as a context manager.

    Notes are shown at once and kept in `notes`, so that they can be repeated when the run is over.
    """

    def __init__(self, quiet: bool = False):
        self.notes: list[str] = []
        self.quiet = quiet
        self._live = not quiet and sys.stderr.isatty()
        self._bar: Progress | None = None
        self._pace = Pace(0)
        self._phase = self._unit = ""
        self._peak = 0
        self._line_at = 0.0

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def begin(self, phase: str, total: int, unit: str) -> None:
        self.stop()
        self._phase, self._unit, self._pace = phase, unit, Pace(total)
        if self._live:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False), BarColumn(16), _Status(self),
                console=console(sys.stderr), refresh_per_second=4, transient=True,
            )  # fmt: skip
            self._bar.add_task(phase, total=total)
            self._bar.start()
        elif not self.quiet:
            note(f"{phase}: {total} {unit}{plural(total)}")
            self._line_at = time.monotonic()

    def advance(self, steps: int = 1, detail: str = "") -> None:
        self._pace.advance(steps)
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0], steps)
        elif not self.quiet and time.monotonic() - self._line_at >= LINE_SECONDS:
            note(f"{self._phase}: {self.status()}{detail and f', {detail}'}")
            self._line_at = time.monotonic()

    def end(self) -> None:
        self.stop()
        if not self.quiet:
            done = f"{self.count()} in " if self._pace.done else ""
            note(f"{self._phase}: {done}{human_time(self._pace.elapsed)}, {self.memory()}")

    def note(self, message: str) -> None:
        self.notes.append(message)
        if self.quiet:
            return
        if self._bar is not None:
            self._bar.console.print(Text(f"note: {message}"), soft_wrap=True)
        else:
            note(f"note: {message}")

    def count(self) -> str:
        return f"{self._pace.done}/{self._pace.total} {self._unit}{plural(self._pace.total)}"

    def memory(self) -> str:
        now = anonymous_bytes()
        self._peak = max(self._peak, now)
        return f"{human_bytes(now)} of memory, peak {human_bytes(self._peak)}"

    def status(self) -> str:
        """ "3/6 blocks, 42 s, 40 s left, 324 MiB of memory, peak 331 MiB" """
        remaining = self._pace.remaining
        left = None if remaining is None else f"{human_time(remaining)} left"
        return ", ".join(filter(None, [self.count(), human_time(self._pace.elapsed), left, self.memory()]))

    def repeat_notes(self) -> None:
        """The notes once more, at the end, where they are read."""
        if not self.quiet:
            for message in once_each(self.notes):
                note(f"note: {message}")

    def stop(self) -> None:
        """Take the bar off the screen."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def plural(n: int) -> str:
    return "" if n == 1 else "s"


class _Status(TextColumn):
    """Everything behind the bar, in one column: it changes as time passes, not only with each step."""

    def __init__(self, display: Display):
        super().__init__("")
        self.display = display

    def render(self, task: Task) -> Text:
        return Text(self.display.status())
