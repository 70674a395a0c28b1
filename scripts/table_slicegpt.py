"""The tables of docs/methods/slicegpt.md: what slicing loses, beside low rank at equal bytes of the whole model.

Each row is a real run (`compress.run`) and its evaluation on held-out text. Low rank is `svd` (whitened) of the linears of the
blocks, with the keep_ratio at which the whole model has the bytes of the sliced one. Prints Markdown:

    python scripts/table_slicegpt.py                # the model that ships
    python scripts/table_slicegpt.py --model FOLDER --calibration FILE --heldout FILE
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import commit
from tables import parser

import compress
from compress.pipeline.plan import plan
from compress.recipe import Recipe

SPARSITIES = (0.1, 0.2, 0.25, 0.3)


@dataclass(frozen=True)
class Row:
    """What a run came to."""

    perplexity: float
    original: float
    kl: float
    file_bytes: int
    share: float  # of the bytes of all tensors

    def cells(self) -> str:
        return f"{self.perplexity:.2f} | {self.kl:.4f} | {self.file_bytes / 1e6:.2f} MB | {self.share:.1%}"


def main() -> None:
    names = ("model", "calibration", "heldout", "length", "samples", "max-tokens")
    arguments = parser(__doc__, {}, *names, samples=128, max_tokens=16384)
    arguments.add_argument("--sparsities", type=float, nargs="+", default=SPARSITIES)
    asked = arguments.parse_args()
    original = 0.0
    print(f"commit {commit()}")
    print("| sparsity | width | method | perplexity | KL | weights on disk | of the original's bytes |")
    print("|--:|--:|---|--:|--:|--:|--:|")
    for sparsity in asked.sparsities:
        steps = [{"slicegpt": {"sparsity": sparsity}}]
        width = plan(recipe_of(asked, steps)).architecture.structure.width
        sliced = measure(asked, steps)
        original = sliced.original
        print(f"| {sparsity:.0%} | {width} | slicegpt | {sliced.cells()} |", flush=True)
        ratio = equal_ratio(asked, sliced.share)
        if ratio is None:
            print(f"| {sparsity:.0%} | | low rank | no smaller | | | |", flush=True)
            continue
        low_rank = measure(asked, [{"svd": {"keep_ratio": ratio}}])
        print(f"| {sparsity:.0%} | | low rank, `keep_ratio: {ratio:.3f}` | {low_rank.cells()} |", flush=True)
    for name, settings in {
        "slicegpt, `slice_head`": {"sparsity": 0.25, "slice_head": True},
        "slicegpt, `keep_ratio: 0.8`": {"keep_ratio": 0.8},
    }.items():
        steps = [{"slicegpt": settings}]
        width = plan(recipe_of(asked, steps)).architecture.structure.width
        print(f"| | {width} | {name} | {measure(asked, steps).cells()} |", flush=True)
    print(f"\nThe original: perplexity {original:.3f}.")


def recipe_of(asked: argparse.Namespace, steps: list[dict[str, Any]]) -> Recipe:
    rows = {"samples": asked.samples, "length": asked.length, "batch_size": max(1, 4096 // asked.length)}
    return Recipe.from_dict(
        {
            "model": asked.model,
            "calibration": {"data": asked.calibration, **rows},
            "steps": steps,
            "evaluation": {"data": asked.heldout, "length": asked.length, "max_tokens": asked.max_tokens},
        }
    )


def measure(asked: argparse.Namespace, steps: list[dict[str, Any]]) -> Row:
    """Run the steps and evaluate the result."""
    with tempfile.TemporaryDirectory() as folder:
        report = compress.run(recipe_of(asked, steps), Path(folder) / "out").report
    found = report["evaluation"]
    row = Row(
        found["model"]["perplexity"], found["reference"]["perplexity"], found["fidelity"]["kl_mean"],
        report["bytes_on_disk_weights"], report["bytes_total_after"] / report["bytes_total_before"],
    )  # fmt: skip
    print(f"{steps}: {row}", file=sys.stderr, flush=True)
    return row


def equal_ratio(asked: argparse.Namespace, share: float) -> float | None:
    """The largest keep_ratio, to a thousandth, at which low rank takes no more of the model's bytes; None if none does."""

    def too_large(thousandths: int) -> bool:
        planned = plan(recipe_of(asked, [{"svd": {"keep_ratio": thousandths / 1000}}]))
        return planned.bytes_total_after > share * planned.bytes_total_before

    fitting = bisect_right(range(1, 1000), False, key=too_large)
    return fitting / 1000 if fitting else None


if __name__ == "__main__":
    main()
