"""The tables of docs/methods/svd.md: what truncation loses, by objective, refit and what comes after.

Each cell is a real run (`compress.run`) and its evaluation on held-out text. Prints Markdown:

    python scripts/table_svd.py                     # all tables, on the model that ships
    python scripts/table_svd.py objectives refit    # some of them
    python scripts/table_svd.py --model FOLDER --calibration FILE --heldout FILE --length 512
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import compress
from compress.recipe import Recipe

RATIOS = (0.95, 0.9, 0.8, 0.7, 0.6)
OBJECTIVES: dict[str, dict[str, Any]] = {  # heading -> settings
    "`plain`": {"objective": "plain"},
    "`scaled` (ASVD)": {"objective": "scaled"},
    "`awsvd` (LoRAP)": {"objective": "awsvd"},
    "`whitened` (SVD-LLM)": {},
    "`whitened`, `refit: 0.5`": {"refit": 0.5},
}
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
GPTQ = {"group_size": 32, "clip": "mse"}
ROUNDED: dict[str, list[dict[str, Any]]] = {  # heading -> steps
    "gptq, 4 bits": [{"gptq": {"bits": 4, **GPTQ}}],
    "svd 0.9, gptq 4 bits": [{"svd": {"keep_ratio": 0.9, "refit": 0.5}}, {"gptq": {"bits": 4, **GPTQ}}],
    "svd 0.8, gptq 4 bits": [{"svd": {"keep_ratio": 0.8, "refit": 0.5}}, {"gptq": {"bits": 4, **GPTQ}}],
    "gptq, 3 bits": [{"gptq": {"bits": 3, **GPTQ}}],
    "svd 0.9, rtn 8 bits": [{"svd": {"keep_ratio": 0.9, "refit": 0.5}}, {"rtn": {"bits": 8, "group_size": 32}}],
    "svd 0.6, rtn 8 bits": [{"svd": {"keep_ratio": 0.6, "refit": 0.5}}, {"rtn": {"bits": 8, "group_size": 32}}],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", help="objectives, refit, rounded [default: all]")
    parser.add_argument("--model", default="shipped", help="a folder [default: the model that ships]")
    parser.add_argument("--calibration", default="shipped", help="text to calibrate on")
    parser.add_argument("--heldout", default="shipped", help="text to measure on")
    parser.add_argument("--length", type=int, default=256, help="tokens per row")
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS, help="of table objectives")
    parser.add_argument("--samples", type=int, default=64, help="rows of calibration tokens")
    parser.add_argument("--max-tokens", type=int, default=8192, help="of the held-out text")
    asked = parser.parse_args()
    tables = {"objectives": objectives, "refit": refit, "rounded": rounded}
    measure = Measure(asked)
    for name in asked.tables or tables:
        for line in tables[name](measure):
            print(line, flush=True)
        print()
    if measure.original is not None:
        print(f"The original: perplexity {measure.original:.3f}.")


class Measure:
    """Runs steps on the model and says what they lost; the same steps once."""

    def __init__(self, asked: argparse.Namespace):
        self.asked = asked
        self.original: float | None = None
        self._done: dict[str, tuple[str, float]] = {}

    def __call__(self, *steps: dict[str, Any]) -> tuple[str, float]:
        """("perplexity / KL", bits per weight) of the result."""
        key = repr(steps)
        if key not in self._done:
            self._done[key] = self._run(list(steps))
            print(f"{key}: {self._done[key]}", file=sys.stderr, flush=True)
        return self._done[key]

    def _run(self, steps: list[dict[str, Any]]) -> tuple[str, float]:
        asked = self.asked
        rows = {"samples": asked.samples, "length": asked.length, "batch_size": max(1, 4096 // asked.length)}
        recipe = Recipe.from_dict(
            {
                "model": asked.model,
                "calibration": {"data": asked.calibration, **rows},
                "steps": steps,
                "evaluation": {"data": asked.heldout, "length": asked.length, "max_tokens": asked.max_tokens},
            }
        )
        with tempfile.TemporaryDirectory() as folder:
            report = compress.run(recipe, Path(folder) / "out").report
        found = report["evaluation"]
        self.original = found["reference"]["perplexity"]
        perplexity, divergence = found["model"]["perplexity"], found["fidelity"]["kl_mean"]
        digits = 2 if perplexity < 1000 else 0
        return f"{perplexity:.{digits}f} / {divergence:.4f}", report["bits_per_weight"]


def objectives(measure: Measure) -> Iterator[str]:
    """Objective by ratio; perplexity / KL."""
    yield "| keep_ratio | " + " | ".join(OBJECTIVES) + " |"
    yield "|---" * (1 + len(OBJECTIVES)) + "|"
    for ratio in measure.asked.ratios:
        cells = [measure({"svd": {"keep_ratio": ratio, **settings}})[0] for settings in OBJECTIVES.values()]
        yield f"| {ratio:g} | " + " | ".join(cells) + " |"


def refit(measure: Measure) -> Iterator[str]:
    """Strengths of refit at 0.8; perplexity / KL."""
    yield "| `refit` | perplexity / KL |"
    yield "|---|---|"
    for strength in STRENGTHS:
        settings = {"refit": strength} if strength else {}
        yield f"| {strength:g} | {measure({'svd': {'keep_ratio': 0.8, **settings}})[0]} |"


def rounded(measure: Measure) -> Iterator[str]:
    """Truncation followed by rounding, beside rounding alone; perplexity / KL."""
    yield "| steps | bits per weight | perplexity / KL |"
    yield "|---|---|---|"
    for heading, steps in ROUNDED.items():
        cell, bits = measure(*steps)
        yield f"| {heading} | {bits:.3f} | {cell} |"


if __name__ == "__main__":
    main()
