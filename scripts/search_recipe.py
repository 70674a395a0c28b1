"""The search behind the recipes best-*bit, cbq-4bit and signround-*bit: what each part adds at 4, 3 and 2 bits, at equal bytes.

Every row is a recipe in groups of 64 with signed scales, every cell a real run and its evaluation on held-out text, perplexity /
KL to the original; the best of a column is set in bold. Widths around 2 bits, and tables of more than 4, are not there. Prints
Markdown:

    python scripts/search_recipe.py --cache FILE          # goes on where it was stopped
    python scripts/search_recipe.py --model FOLDER --calibration FILE --heldout FILE --samples 512 --max-tokens 32768
    python scripts/search_recipe.py --only "signround, distill" --bits 3
"""

from __future__ import annotations

import argparse
from typing import Any

from tables import Measure, parser

Settings = dict[str, Any]
GRID: Settings = {"group_size": 64, "signed_scales": True}
MIXED: Settings = {"widths": [2, 3, 4, 5, 6, 8], "together": False}
TABLES: Settings = {"widths": [2, 3, 4], "together": False}
LR = {4: 0.001, 3: 0.002, 2: 0.003}  # of distill: half and twice as much lose more


def tuned(bits: int, **settings: Any) -> Settings:
    return {"distill": {"iterations": 96, "lr": LR[bits], **settings}}


def candidates(bits: int) -> dict[str, list[Settings]]:
    """Heading -> steps."""
    grid = {"bits": bits, **GRID}
    learned = {**grid, "half": True}
    windows = {**learned, "homologous": False}
    long = {**windows, "iterations": 500}
    signround, table = {"signround": learned}, {"bits": bits, "group_size": 64, "match": 1.0}
    rows: dict[str, list[Settings]] = {
        "rtn": [{"rtn": {**grid, "clip": "mse"}}],
        "gptq": [{"gptq": {**grid, "clip": "mse"}}],
        "gptq, distill": [{"gptq": {**grid, "clip": "mse"}}, tuned(bits)],
        "lut": [{"lut": {**table, "match": 0.0}}],
        "lut, match: 1": [{"lut": table}],
        "lut, match: 1, distill": [{"lut": table}, tuned(bits)],
        "signround": [signround],
        "signround, float32": [{"signround": grid}],
        "signround, start: rtn": [{"signround": {**learned, "start": "rtn"}}],
        "signround, unsigned scales": [{"signround": {**learned, "signed_scales": False}}],
        "signround, 1000 iterations": [{"signround": {**learned, "iterations": 1000}}],
        "cbq": [{"cbq": learned}],
        "cbq, homologous: false": [{"cbq": windows}],
        "cbq, homologous: false, 500 iterations, distill": [{"cbq": long}, tuned(bits)],
        "rotate, signround": [{"rotate": {}}, signround],
        "signround, distill": [signround, tuned(bits)],
        "signround, distill: scales": [signround, tuned(bits, parameters="scales")],
        "signround, distill: norms": [signround, tuned(bits, parameters="norms")],
    }
    if bits == 3:
        rows |= {
            "lut, match: 1, widths": [{"lut": {**table, **TABLES}}],
            "lut, match: 1, widths, distill": [{"lut": {**table, **TABLES}}, tuned(bits)],
        }
    if bits > 2:
        rows |= {
            "gptq, widths": [{"gptq": {**grid, **MIXED, "clip": "mse"}}],
            "signround, widths": [{"signround": {**learned, **MIXED}}],
            "signround, widths, distill": [{"signround": {**learned, **MIXED}}, tuned(bits)],
            "signround, 1000 iterations, widths, distill": [
                {"signround": {**learned, **MIXED, "iterations": 1000}},
                tuned(bits),
            ],
            "cbq, homologous: false, 500 iterations, widths, distill": [{"cbq": {**long, **MIXED}}, tuned(bits)],
        }
    return rows


def headings() -> list[str]:
    """Of all rows, kin together."""
    found = list(dict.fromkeys(row for bits in (4, 3, 2) for row in candidates(bits)))
    first = [row.split(",")[0] for row in found]
    return sorted(found, key=lambda row: first.index(row.split(",")[0]))


def main() -> None:
    made = parser(__doc__, {}, samples=128)
    made.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2], choices=(4, 3, 2))
    made.add_argument("--only", nargs="+", help="these rows [default: all]")
    asked: argparse.Namespace = made.parse_args()
    offered = {bits: candidates(bits) for bits in asked.bits}
    known = headings()
    if unknown := set(asked.only or ()) - set(known):
        made.error(f"--only: no row is called {', '.join(sorted(unknown))}; there are: {'; '.join(known)}")
    measure = Measure(asked)
    cells = {
        (row, bits): measure(*offered[bits][row])["cell"]
        for row in asked.only or known
        for bits in asked.bits
        if row in offered[bits]
    }
    best = {
        bits: min((c for c in cells if c[1] == bits), key=lambda c: _divergence(cells[c]), default=None)
        for bits in offered
    }
    print("| steps | " + " | ".join(f"{bits} bits" for bits in asked.bits) + " |")
    print("|---|" + "---|" * len(asked.bits))
    for row in asked.only or known:
        shown = [cells.get((row, bits), "–") for bits in asked.bits]
        shown = [
            f"**{cell}**" if best[bits] == (row, bits) else cell for cell, bits in zip(shown, asked.bits, strict=True)
        ]
        print(f"| {row} | " + " | ".join(shown) + " |")
    print(f"\nThe original: perplexity {measure.original:.3f}.")


def _divergence(cell: str) -> float:
    return float(cell.rpartition("/")[2])


if __name__ == "__main__":
    main()
