"""The tables of docs/methods/drop_blocks.md: what is lost with one and two blocks, by how they were chosen, beside the best.

Each row is a real run (`compress.run`) and its evaluation. "Best" tries every choice of that many blocks on the text that
it is measured on, so no score can know better. Prints Markdown:

    python scripts/table_drop_blocks.py                                  # the model that ships
    python scripts/table_drop_blocks.py --model DIR --calibration FILE --heldout FILE
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

from tables import parser

import compress
from compress.recipe import Recipe

WAYS: dict[str, dict[str, Any]] = {  # heading -> settings; of six blocks, the paper's 4 + 2 would leave none to choose
    "perplexity": {},
    "perplexity, iterative": {"selection": "iterative"},
    "taylor": {"score": "taylor", "protect": [0, 0]},
    "taylor, iterative": {"score": "taylor", "protect": [0, 0], "selection": "iterative"},
    "taylor, first and last kept": {"score": "taylor", "protect": [1, 1]},
    "magnitude": {"score": "magnitude", "protect": [0, 0]},
    "magnitude, first and last kept": {"score": "magnitude", "protect": [1, 1]},
    "angular distance": {"score": "angular_distance"},
    "angular distance, iterative": {"score": "angular_distance", "selection": "iterative"},
    "angular distance, contiguous": {"score": "angular_distance", "selection": "contiguous"},
}


def main() -> None:
    arguments = parser(__doc__, {}, "model", "calibration", "heldout", "max-tokens", max_tokens=16384)
    arguments.add_argument("--rows", type=int, default=32, help="calibration rows of 256 tokens that are looked at")
    arguments.add_argument("--drop", type=int, nargs="*", default=[1, 2])
    measure = Measure(arguments.parse_args())
    for n_drop in measure.asked.drop:
        for line in table(measure, n_drop):
            print(line, flush=True)
        print()
    print(f"The original: perplexity {measure.original:.3f}, {measure.bytes_before / 1e6:.2f} MB.")


class Measure:
    """Runs drop_blocks with some settings, and says what it came to; the same blocks are evaluated once."""

    def __init__(self, asked: argparse.Namespace):
        self.asked, self.original, self.bytes_before = asked, 0.0, 0
        self._by_blocks: dict[tuple[int, ...], dict[str, Any]] = {}

    def __call__(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Blocks, perplexity, KL, bytes of the weight files."""
        report = self._run(settings, evaluate=False)
        return self.of(tuple(report["rewrites"][0]["figures"]["blocks"]))

    def of(self, blocks: tuple[int, ...]) -> dict[str, Any]:
        """What it costs to leave these blocks out."""
        if blocks not in self._by_blocks:
            report = self._run({"blocks": list(blocks)}, evaluate=True)
            evaluation = report["evaluation"]
            self.original, self.bytes_before = evaluation["reference"]["perplexity"], report["bytes_total_before"]
            self._by_blocks[blocks] = {
                "blocks": blocks, "perplexity": evaluation["model"]["perplexity"],
                "kl": evaluation["fidelity"]["kl_mean"], "bytes": report["bytes_on_disk_weights"],
            }  # fmt: skip
        return self._by_blocks[blocks]

    def _run(self, settings: dict[str, Any], evaluate: bool) -> dict[str, Any]:
        calibration = {"data": self.asked.calibration, "samples": self.asked.rows, "length": 256, "batch_size": 8}
        evaluation = {"data": self.asked.heldout, "length": 256, "max_tokens": self.asked.max_tokens}
        recipe = Recipe.from_dict(
            {
                "model": self.asked.model,
                "calibration": calibration,
                "steps": [{"drop_blocks": settings}],
                "evaluation": evaluation if evaluate else False,
            }
        )
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            report = compress.run(recipe, Path(folder) / "out").report
        print(f"{settings}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        return report


def table(measure: Measure, n_drop: int) -> Iterator[str]:
    """One row for each way to choose, then the best choice there is, and the one in the middle."""
    yield f"| {n_drop} of the blocks go | which | perplexity | KL | weights on disk |"
    yield "|---|---|--:|--:|--:|"
    for name, settings in WAYS.items():
        again = settings.get("selection") in ("iterative", "contiguous")
        if n_drop == 1 and again:
            continue
        yield _row(name, measure({"n_drop": n_drop, "rows": measure.asked.rows, **settings}))
    everything = [measure.of(blocks) for blocks in combinations(range(_n_blocks(measure)), n_drop)]
    everything.sort(key=lambda found: found["perplexity"])
    yield _row(f"best of all {len(everything)}", everything[0])
    yield _row("median of all", everything[len(everything) // 2])


def _row(name: str, found: dict[str, Any]) -> str:
    blocks = ", ".join(map(str, found["blocks"]))
    sizes = f"{found['perplexity']:.2f} | {found['kl']:.3f} | {found['bytes'] / 1e6:.2f} MB"
    return f"| {name} | {blocks} | {sizes} |"


def _n_blocks(measure: Measure) -> int:
    from compress.checkpoint.source import find_source
    from compress.models.families import architecture_of

    return architecture_of(find_source(measure.asked.model, None).config).n_blocks


if __name__ == "__main__":
    main()
