"""Figures of a report as pieces of HTML that say where in the JSON they stand, by a JSON pointer (RFC 6901):
`<span data-json="/evaluation/fidelity/kl_mean">`.

A figure of the page is one of the JSON, or the quotient of two (`data-per` points to the second).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from compress.report.numbers import count, digits, human_bytes, human_time, rate, share, small
from compress.report.plots import Plot

FORMS: dict[str, Callable[[float], str]] = {
    "bytes": human_bytes, "time": human_time, "share": share, "small": small, "count": count, "rate": rate,
    "digits": digits, "number": lambda value: f"{value:.4g}", "score": lambda value: f"{value:.4f}",
    "signed": lambda value: f"{value:+.4f}", "bits": lambda value: f"{value:.3f}", "perplexity": lambda value: f"{value:.3f}",
    "ratio": lambda value: f"{value:.2f}", "cosine": lambda value: f"{value:.6f}",
}  # fmt: skip
MISSING = "–"


class Figures:
    """The figures of one report."""

    def __init__(self, report: Mapping[str, Any]):
        self.report = report

    def get(self, path: str) -> Any:
        """What stands at "a/b/3/c"; None if nothing does. A name that may hold a slash goes through `token`."""
        found: Any = self.report
        for part in path.split("/"):
            part = part.replace("~1", "/").replace("~0", "~")
            if isinstance(found, Mapping):
                found = found.get(part)
            elif (
                isinstance(found, Sequence) and not isinstance(found, str) and part.isdigit() and int(part) < len(found)
            ):
                found = found[int(part)]
            else:
                return None
        return found

    def has(self, path: str) -> bool:
        return self.get(path) not in (None, {}, [])

    def __call__(self, path: str, form: str) -> str:
        """The figure at `path` in one of `FORMS`."""
        value = self.get(path)
        if not isinstance(value, int | float) or isinstance(value, bool):
            return MISSING
        shown = FORMS[form](value) if math.isfinite(value) else "∞" if value > 0 else "not a number"
        return f'<span class="n" data-json="/{escape(path)}" data-value="{value}">{escape(shown)}</span>'

    def ratio(self, part: str, whole: str, form: str = "share") -> str:
        """One figure as a share of another."""
        above, below = self.get(part), self.get(whole)
        if not isinstance(above, int | float) or not isinstance(below, int | float) or not below:
            return MISSING
        value, where = above / below, f'data-json="/{escape(part)}" data-per="/{escape(whole)}"'
        return f'<span class="n" {where} data-value="{value}">{escape(FORMS[form](value))}</span>'

    def text(self, path: str) -> str:
        """Words, not a figure."""
        value = self.get(path)
        return MISSING if value in (None, "") else escape(str(value))


class Sheet:
    """A report, and what the sections of its page ask about it. `at`: where the measurements stand in the JSON."""

    def __init__(self, report: Mapping[str, Any]):
        self.report = report
        self.f = Figures(report)
        self.is_run = report.get("kind") == "run"
        self.at = "evaluation/" if self.is_run else ""


def number(value: Any) -> float | None:
    """`value`, if it is a number."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def plot(drawn: Plot) -> str:
    """A plot in both its sizes, of which the style sheet shows one."""
    return f'<div class="plot"><div class="wide">{drawn.wide}</div><div class="narrow">{drawn.narrow}</div></div>'


def token(name: str) -> str:
    """A name as a part of a path."""
    return name.replace("~", "~0").replace("/", "~1")


def table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], sortable: bool = False, strong: Collection[int] = ()
) -> str:
    """A table that scrolls sideways where it must. A column whose name begins with ">" is of figures; cells are HTML; the
    rows in `strong` are marked."""
    classes = [' class="n"' if name.startswith(">") else "" for name in columns]
    names = [escape(name.removeprefix(">")) for name in columns]
    if sortable:
        names = [f'<button type="button">{name}</button>' for name in names]
    head = "".join(f'<th scope="col"{kind}>{name}</th>' for name, kind in zip(names, classes, strict=True))
    body = []
    for place, row in enumerate(rows):
        cells = "".join(f"<td{kind}>{cell}</td>" for cell, kind in zip(row, classes, strict=True))
        body.append(f'<tr class="strong">{cells}</tr>' if place in strong else f"<tr>{cells}</tr>")
    opening = '<table class="sortable">' if sortable else "<table>"
    inside = "\n".join(body)
    return f'<div class="scroll">{opening}<thead><tr>{head}</tr></thead><tbody>\n{inside}\n</tbody></table></div>'


def pairs(rows: Iterable[tuple[str, str]]) -> str:
    """A list of what and its value. Values are HTML."""
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{value}</dd>" for name, value in rows) + "</dl>"
