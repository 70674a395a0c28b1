"""The section of the page about steps that rewrote the whole model, and what they saw in its blocks."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from compress.report import plots
from compress.report.figures import MISSING, Sheet, plot, table

NAMES = {"perplexity": "loss of the calibration rows without the block, nats per token"}


def rewrites(sheet: Sheet) -> str:
    """What was done first, and the scores by which blocks were chosen."""
    f, parts = sheet.f, []
    for i, step in enumerate(f.get("rewrites") or ()):
        at = f"rewrites/{i}"
        parts.append(f"<p><code>{f.text(f'{at}/method')}</code>: {f.text(f'{at}/note')}.</p>")
        if f.has(f"{at}/figures/rounds"):
            parts.append(_scores(sheet, f"{at}/figures", step["figures"]))
    return f"<h2>Rewritten first</h2>{''.join(parts)}" if parts else ""


def _scores(sheet: Sheet, at: str, figures: Mapping[str, Any]) -> str:
    """Blocks of the original by their scores: those of the first look as bars, all of them as a table."""
    f, rounds, gone = sheet.f, figures["rounds"], set(figures["blocks"])
    name = NAMES.get(str(figures["score"]), str(figures["score"]).replace("_", " "))
    drawn = plots.block_scores(rounds[0]["scores"], gone, name, rounds[0].get("loss"))
    before = (
        f" With all blocks there it is {f(f'{at}/rounds/0/loss', 'score')}." if f.has(f"{at}/rounds/0/loss") else ""
    )
    columns = [">block", *(f">look {number + 1}" if len(rounds) > 1 else ">score" for number in range(len(rounds)))]
    rows = [
        (str(block), *(_cell(sheet, f"{at}/rounds/{number}/scores/{block}") for number in range(len(rounds))))
        for block in range(len(rounds[0]["scores"]))
    ]
    made = table(columns, rows, sortable=True, strong=sorted(gone))
    return (
        f'{plot(drawn)}<p class="sub">{escape(name[0].upper() + name[1:])}, by block of the original.{before}</p>'
        f"<details><summary>All scores</summary>{made}</details>"
    )


def _cell(sheet: Sheet, path: str) -> str:
    return MISSING if sheet.f.get(path) is None else sheet.f(path, "number")
