"""The curve of docs/methods/bitstack.md: perplexity and KL of one stack at any size, beside gptq at 2, 3 and 4 bits.

One run makes the stack; it is measured at sizes from its minimum to 8 bits per weight. Prints Markdown, and writes the points as
JSON and the curve as SVG beside it:

    python scripts/table_bitstack.py --out out/bitstack
    python scripts/table_bitstack.py orders --cache FILE --out out/bitstack    # orders; goes on where it was stopped
    python scripts/table_bitstack.py --model FOLDER --calibration FILE --heldout FILE --out out/bitstack-stories
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tables import Measure, Settings, parser, show

import compress
from compress.recipe import Evaluation

SIZES = (1.75, 2, 2.25, 2.5, 2.75, 3, 3.5, 4, 5, 6, 7, 8)  # bits per weight, behind the minimum
COARSE = (1.75, 2, 2.5, 3, 4, 5)
ORDERS: dict[str, Settings] = {
    "proxy": {},
    "levels": {"order": "levels"},
    "without data": {"scaling": False},
}
GPTQ = {"clip": "mse", "order": "gar"}


class Curves(Measure):
    """Also stacks, which are kept in a folder and measured at many sizes."""

    def stack(self, settings: Settings) -> Path:
        """The folder of a stack, made once."""
        asked = self.asked
        name = "-".join([f"{key}_{value}" for key, value in settings.items()]) or "usual"
        folder = asked.out / "stacks" / name
        own = {"rank": asked.rank, "blocks": asked.blocks, "rows": 8, **settings}
        recipe = self._recipe([{"bitstack": own}]).model_copy(update={"evaluation": None})
        compress.run(recipe, folder)
        return folder

    def at(self, settings: Settings, bits: float | None) -> dict[str, Any]:
        """Perplexity, KL, and bytes of a stack at `bits` per weight; None: the smallest."""
        asked = self.asked
        key = json.dumps(
            [asked.model, asked.samples, asked.length, asked.max_tokens, asked.rank, asked.blocks, settings, bits]
        )
        if key not in self._known:
            folder = self.stack(settings)
            stack = compress.plan(compress.recipe.Recipe.load(folder / "recipe.yaml")).to_dict()["stack"]
            budget = stack["minimum"] if bits is None else f"{bits}bits"
            evaluation = Evaluation(data=(asked.heldout,), length=asked.length, max_tokens=asked.max_tokens)
            found = compress.evaluate(folder, reference=asked.model, settings=evaluation, memory_budget=budget)
            self._known[key] = {
                "perplexity": found["model"]["perplexity"],
                "kl": found["fidelity"]["kl_mean"],
                "total": found["size"]["model"]["bytes_tensors"],
                "original": found["reference"]["perplexity"],
            }
            self._known[key]["bits"] = 8 * (self._known[key]["total"] - self.others) / self.n_weights
            print(f"{key}: {self._known[key]}", file=sys.stderr, flush=True)
            if asked.cache:
                asked.cache.write_text(json.dumps(self._known, indent=0))
        return self._known[key]


def main() -> None:
    tables = {"curve": curve, "orders": orders}
    arguments = parser(__doc__, tables, max_tokens=3072, samples=32)
    arguments.add_argument(
        "--rank", type=int, default=4, help="of the blocks [default: 4, for widths of some hundreds]"
    )
    arguments.add_argument("--blocks", type=int, default=7, help="of each layer")
    arguments.add_argument("--group-size", type=int, default=64, help="of gptq")
    arguments.add_argument(
        "--out", type=Path, default=Path("out/bitstack"), help="folder of the stacks, the JSON, the SVG"
    )
    asked: argparse.Namespace = arguments.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    show(tables, asked.tables, Curves(asked))


def curve(measure: Curves) -> Iterator[str]:
    """One stack from its minimum to 8 bits per weight, and gptq."""
    asked = measure.asked
    points = [{"method": "bitstack", **measure.at({}, bits)} for bits in (None, *SIZES)]
    for bits in (2, 3, 4):
        found = measure({"gptq": {"bits": bits, "group_size": asked.group_size, **GPTQ}})
        perplexity, divergence = map(float, found["cell"].split(" / "))
        own = {"perplexity": perplexity, "kl": divergence, "total": found["total"], "bits": found["bits"]}
        points.append({"method": f"gptq, {bits} bits", **own})
    yield "| | bits per weight | all tensors | perplexity | KL |"
    yield "|---" * 5 + "|"
    for point in sorted(points, key=lambda point: point["bits"]):
        size = f"{point['bits']:.3f} | {point['total'] / 1e6:.2f} MB"
        shown = f"{point['perplexity']:.{2 if point['perplexity'] < 1000 else 0}f}"
        yield f"| {point['method']} | {size} | {shown} | {point['kl']:.4f} |"
    (asked.out / "curve.json").write_text(json.dumps(points, indent=1))
    (asked.out / "curve.svg").write_text(drawn(points, measure.original))
    yield f"\nwrote {asked.out / 'curve.json'} and {asked.out / 'curve.svg'}"


def orders(measure: Curves) -> Iterator[str]:
    """Perplexity of stacks that differ in the order of their blocks."""
    yield "| order | " + " | ".join(f"{bits} bits" for bits in COARSE) + " |"
    yield "|---" * (len(COARSE) + 1) + "|"
    for name, settings in ORDERS.items():
        cells = [measure.at(settings, bits)["perplexity"] for bits in COARSE]
        yield f"| {name} | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |"


def drawn(points: list[dict[str, Any]], original: float) -> str:
    """Perplexity against bits per weight, both axes as in the table, as an SVG."""
    width, height, left, bottom = 640, 400, 60, 350
    top = max(point["perplexity"] for point in points)
    low, high = math.log(original * 0.9), math.log(min(top, original * 40))
    x_high = max(point["bits"] for point in points) * 1.03

    def place(bits: float, perplexity: float) -> tuple[float, float]:
        share = (min(math.log(perplexity), high) - low) / (high - low)
        return left + (width - left - 20) * (bits - 1) / (x_high - 1), bottom - (bottom - 20) * share

    stack = sorted((p["bits"], p["perplexity"]) for p in points if p["method"] == "bitstack")
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in stack))
    parts = [f'<polyline points="{line}" fill="none" stroke="#2563eb" stroke-width="2"/>']
    parts += [
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="#2563eb"/>' for x, y in (place(*point) for point in stack)
    ]
    for point in (p for p in points if p["method"] != "bitstack"):
        x, y = place(point["bits"], point["perplexity"])
        parts.append(f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" fill="#dc2626"/>')
        parts.append(f'<text x="{x + 7:.1f}" y="{y + 4:.1f}">{point["method"]}</text>')
    _, y = place(1, original)
    parts.append(f'<line x1="{left}" x2="{width - 20}" y1="{y:.1f}" y2="{y:.1f}" stroke="#888" stroke-dasharray="4"/>')
    for bits in range(1, int(x_high) + 1):
        x, _ = place(bits, original)
        parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{bits}</text>')
    for factor in (1, 2, 4, 10, 40):
        if math.log(original * factor) <= high:
            _, y = place(1, original * factor)
            parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{original * factor:.0f}</text>')
    parts.append(f'<text x="{width / 2}" y="{height - 8}" text-anchor="middle">bits per weight of the linears</text>')
    parts.append(f'<text x="{left}" y="12">perplexity; dashed: the original, blue: one stack at many sizes</text>')
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">\n'
        f'<rect width="{width}" height="{height}" fill="white"/>\n{body}\n</svg>\n'
    )


if __name__ == "__main__":
    main()
