"""The tables of docs/methods/dobi_svd.md: ranks learned or uniform, stored in 16 bits or remapped, beside whitened SVD.

Each cell is a real run (`compress.run`) on the model that ships and its evaluation on held-out text. Prints Markdown:

    python scripts/table_dobi_svd.py                    # all tables
    python scripts/table_dobi_svd.py storage            # one of them
    python scripts/table_dobi_svd.py learned --steps 48
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tables import parser, show

import compress
from compress.pipeline.progress import Silent
from compress.recipe import Recipe

RATIOS = (0.9, 0.8, 0.6, 0.4)
STORAGE: dict[str, dict[str, Any]] = {  # heading -> step, with keep_ratio to come
    "`svd`, whitened": {"svd": {}},
    "`remap: false`, uniform ranks": {"dobi_svd": {"remap": False, "steps": 0}},
    "`remap: true`, uniform ranks": {"dobi_svd": {"steps": 0}},
}
LEARNED: dict[str, dict[str, Any]] = {  # heading -> settings
    "uniform": {"steps": 0},
    "learned": {},
    "learned, `budget_weight: 200` (the paper)": {"budget_weight": 200.0},
}


def main() -> None:
    tables = {"storage": storage, "learned": learned}
    arguments = parser(__doc__, tables, "samples", "max-tokens")
    arguments.add_argument("--steps", type=int, default=32, help="of learning")
    arguments.add_argument("--ratios", type=float, nargs="+", help="of learning [default: 0.6]", default=[0.6])
    arguments.add_argument(
        "--remap", type=int, nargs="+", choices=(0, 1), help="of learning [default: 0 1]", default=[0, 1]
    )
    arguments.add_argument("--learning-rate", type=float, default=0.01)
    asked = arguments.parse_args()
    show(tables, asked.tables, asked)


def run(asked: argparse.Namespace, step: dict[str, Any]) -> dict[str, Any]:
    """The report of one step."""
    recipe = Recipe.from_dict(
        {
            "model": "shipped",
            "calibration": {"data": "shipped", "samples": asked.samples, "length": 256, "batch_size": 8},
            "steps": [step],
            "evaluation": {"data": "shipped", "max_tokens": asked.max_tokens},
        }
    )
    progress = Silent()
    with tempfile.TemporaryDirectory() as folder:
        report = compress.run(recipe, Path(folder) / "out", progress=progress).report
    report["notes"] = [note for note in progress.notes if "ranks" in note]
    ratio = report["bytes_after"] / report["bytes_before"]
    seconds, notes = report["seconds"], report["notes"]
    print(f"{step}: {ratio:.4f} of the bytes, {cell(report)}, {seconds}, {notes}", file=sys.stderr, flush=True)
    peak = report.get("peak_bytes"), report.get("predicted_peak_bytes")
    print(f"peak {peak}", file=sys.stderr, flush=True)
    return report


def cell(report: dict[str, Any]) -> str:
    found = report["evaluation"]
    return f"{found['model']['perplexity']:.2f} / {found['fidelity']['kl_mean']:.4f}"


def storage(asked: argparse.Namespace) -> Iterator[str]:
    """Storage by ratio, ranks uniform; perplexity / KL."""
    yield "| keep_ratio | " + " | ".join(STORAGE) + " |"
    yield "|---" * (1 + len(STORAGE)) + "|"
    reference = 0.0
    for ratio in RATIOS:
        cells = []
        for step in STORAGE.values():
            ((method, settings),) = step.items()
            report = run(asked, {method: {**settings, "keep_ratio": ratio}})
            reference = report["evaluation"]["reference"]["perplexity"]
            cells.append(cell(report))
        yield f"| {ratio:g} | " + " | ".join(cells) + " |"
    yield f"\nThe original: perplexity {reference:.2f}."


def learned(asked: argparse.Namespace) -> Iterator[str]:
    """How ranks are chosen, with and without remap; perplexity / KL."""
    yield "| keep_ratio | `remap` | " + " | ".join(LEARNED) + " |"
    yield "|---" * (2 + len(LEARNED)) + "|"
    for ratio in asked.ratios:
        for remap in asked.remap:
            cells = []
            for settings in LEARNED.values():
                common = {"keep_ratio": ratio, "remap": bool(remap)}
                training = {"steps": asked.steps, "learning_rate": asked.learning_rate}
                cells.append(cell(run(asked, {"dobi_svd": {**common, **training, **settings}})))
            yield f"| {ratio:g} | `{str(bool(remap)).lower()}` | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
