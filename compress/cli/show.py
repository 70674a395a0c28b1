"""How the command line writes things: sizes, times, tables, JSON. Results go to stdout, everything else to stderr.

Cells are plain text: names such as `model.layers.[0-5]` would otherwise be read as rich's markup.
"""

from __future__ import annotations

import json
import math
import signal
import sys
from collections.abc import Iterable, Sequence
from typing import IO, Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from compress.cli.signals import Ended
from compress.report.numbers import digits as digits
from compress.report.numbers import human_bytes as human_bytes
from compress.report.numbers import human_time as human_time
from compress.report.numbers import percent as percent

PIPE_WIDTH = 200  # columns of a table that goes to a file or another program: nothing may be cut
FEW = 10  # notes that are printed one by one


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise Ended(signal.SIGPIPE)


def console(stream: IO[str] | None = None) -> Console:
    """A console on `stream` (stdout) that keeps to NO_COLOR, and writes no control codes into pipes."""
    stream = stream or sys.stdout
    width = None if stream.isatty() else PIPE_WIDTH
    return _Console(file=stream, width=width, highlight=False, markup=False, emoji=False, soft_wrap=False)


def show(*renderables: RenderableType, stream: IO[str] | None = None) -> None:
    """Tables, on stdout unless `stream` is another. Where no terminal is, lines end with their last character."""
    screen = console(stream)
    if screen.is_terminal:
        screen.print(*renderables, sep="\n")
        return
    with screen.capture() as captured:
        screen.print(*renderables, sep="\n")
    lines = captured.get().splitlines()
    _write("\n".join(line.rstrip() for line in lines), stream or sys.stdout)


def out(text: str) -> None:
    """A line of the result."""
    _write(text, sys.stdout)


def note(text: str) -> None:
    """A line for the user beside the result."""
    _write(text, sys.stderr)


def write(text: str) -> None:
    """A piece of the result that is still being made."""
    _write(text, sys.stdout, end="")


def _write(text: str, stream: IO[str], end: str = "\n") -> None:
    try:
        print(text, file=stream, flush=True, end=end)
    except BrokenPipeError:  # `compress … | head`: whoever reads has enough
        raise Ended(signal.SIGPIPE) from None


def print_json(content: Any) -> None:
    """The result for programs: one JSON document. What is no number in JSON (NaN, infinity) becomes null."""
    out(json.dumps(_finite(content), indent=2, ensure_ascii=False, default=str))


def _finite(content: Any) -> Any:
    if isinstance(content, float) and not math.isfinite(content):
        return None
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return content


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None) -> Table:
    """A table without frame. A column whose name begins with ">" is aligned to the right."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0), title_style="bold")
    for name in columns:
        right = name.startswith(">")
        made.add_column(
            Text(name.removeprefix(">")), justify="right" if right else "left", no_wrap=right, overflow="fold"
        )
    for row in rows:
        made.add_row(*(Text(str(cell)) for cell in row))
    return made


def pairs(rows: Iterable[tuple[str, str]]) -> Table:
    """Two columns without a header: what, and its value."""
    made = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    for key, value in rows:
        made.add_row(Text(key), Text(value))
    return made


def once_each(messages: Iterable[str]) -> list[str]:
    """Messages without repetitions, in order; of many, the first ones and how many more there are."""
    distinct = list(dict.fromkeys(messages))
    return (
        distinct
        if len(distinct) <= FEW
        else [*distinct[: FEW - 1], f"… and {len(distinct) - FEW + 1} more, in the report"]
    )
