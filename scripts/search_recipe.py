"""The search behind recipes/best-*bit.yaml and signround-*bit.yaml: what each part adds at 4, 3 and 2 bits, at the same bytes.

Every row is a recipe in groups of 64 with signed scales, every cell a real run and its evaluation on held-out text, perplexity /
KL to the original; the best of a column is set in bold. Prints Markdown:

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
LR = {4: 0.001, 3: 0.002, 2: 0.003}  # of distill: half and twice as much lose more


def tuned(bits: int, **settings: Any) -> Settings:
    return {"distill": {"iterations": 96, "lr": LR[bits], **settings}}


def candidates(bits: int) -> dict[str, list[Settings]]:
    """Heading -> steps."""
    grid = {"bits": bits, **GRID}
    learned, table = {"signround": grid}, {"bits": bits, "group_size": 64}
    return {
        "rtn": [{"rtn": {**grid, "clip": "mse"}}],
        "gptq": [{"gptq": {**grid, "clip": "mse"}}],
        "gptq, widths": [{"gptq": {**grid, **MIXED, "clip": "mse"}}],
        "gptq, distill": [{"gptq": {**grid, "clip": "mse"}}, tuned(bits)],
        "lut": [{"lut": table}],
        "lut, match: 1": [{"lut": {**table, "match": 1.0}}],
        "lut, match: 1, distill": [{"lut": {**table, "match": 1.0}}, tuned(bits)],
        "signround": [learned],
        "signround, start: rtn": [{"signround": {**grid, "start": "rtn"}}],
        "signround, unsigned scales": [{"signround": {**grid, "signed_scales": False}}],
        "signround, 1000 iterations": [{"signround": {**grid, "iterations": 1000}}],
        "cbq": [{"cbq": grid}],
        "rotate, signround": [{"rotate": {}}, learned],
        "signround, distill": [learned, tuned(bits)],
        "signround, distill: scales": [learned, tuned(bits, parameters="scales")],
        "signround, distill: norms": [learned, tuned(bits, parameters="norms")],
        "signround, widths": [{"signround": {**grid, **MIXED}}],
        "signround, widths, distill": [{"signround": {**grid, **MIXED}}, tuned(bits)],
    }


def main() -> None:
    made = parser(__doc__, {}, samples=128)
    made.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2], choices=(4, 3, 2))
    made.add_argument("--only", nargs="+", help="these rows [default: all]")
    asked: argparse.Namespace = made.parse_args()
    measure = Measure(asked)
    rows = asked.only or list(candidates(4))
    cells = {(row, bits): measure(*candidates(bits)[row])["cell"] for row in rows for bits in asked.bits}
    best = {bits: min(rows, key=lambda row: _divergence(cells[row, bits])) for bits in asked.bits}
    print("| steps | " + " | ".join(f"{bits} bits" for bits in asked.bits) + " |")
    print("|---|" + "---|" * len(asked.bits))
    for row in rows:
        shown = [f"**{cells[row, b]}**" if best[b] == row else cells[row, b] for b in asked.bits]
        print(f"| {row} | " + " | ".join(shown) + " |")
    print(f"\nThe original: perplexity {measure.original:.3f}.")


def _divergence(cell: str) -> float:
    return float(cell.rpartition("/")[2])


if __name__ == "__main__":
    main()
