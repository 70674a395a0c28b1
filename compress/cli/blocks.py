"""Error by block, as lines and as a table. Imports nothing slow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from compress.report.numbers import share

if TYPE_CHECKING:
    from rich.table import Table

NAMED = 3  # blocks in the line of the worst
SHOWN = 10  # rows of a table; of more blocks, the worst and the last
NO_ERROR = 1e-6  # relative: rounding of float32


def block_rows(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The line of the worst blocks. `found`: "hidden_states" of an evaluation."""
    if not found["blocks"]:
        return [("error by block", f"none: {found['reason']}")]
    rows = found["blocks"]
    if rows[-1]["relative_error"] < NO_ERROR:
        return [("error by block", "none: the hidden states are those of the original")]
    named = [f"{share(rows[i]['local_relative_error'])} by block {i}" for i in found["worst"][:NAMED]]
    most = named[0] if len(rows) == 1 else ", ".join(named)
    return [
        (
            "error by block",
            f"most alone: {most}; {share(rows[-1]['relative_error'])} added up behind the last of {len(rows)}",
        )
    ]


def block_table(found: Mapping[str, Any]) -> Table | None:
    """A row for each block; of many, for the worst and the last. None if there are no figures."""
    from compress.cli.show import table

    rows = found["blocks"]
    if not rows:
        return None
    chosen = range(len(rows))
    title = None
    if len(rows) > SHOWN:
        chosen = sorted({*found["worst"][: SHOWN - 1], len(rows) - 1})  # type: ignore[assignment]
        title = f"The {SHOWN - 1} worst of {len(rows)} blocks and the last; all with --json or --html"
    cells = [
        (
            str(rows[i]["block"]), share(rows[i]["local_relative_error"]), f"{rows[i]['local_cosine']:.6f}",
            share(rows[i]["relative_error"]), f"{rows[i]['cosine']:.6f}",
        )
        for i in chosen
    ]  # fmt: skip
    return table((">block", ">error alone", ">cosine alone", ">error added up", ">cosine added up"), cells, title)
