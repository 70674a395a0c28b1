"""The tables of docs/methods/rotate.md: what rounding loses after rotations, random and learned.

Each cell is a real run (`compress.run`) and its evaluation on held-out text. Prints Markdown:

    python scripts/table_rotate.py                     # all tables, on the model that ships
    python scripts/table_rotate.py bits --bits 3       # one of them
    python scripts/table_rotate.py --model FOLDER --calibration FILE --heldout FILE
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
from compress.recipe import Recipe

CANDIDATES = 5
RANDOM: dict[str, dict[str, Any]] = {  # heading -> settings of one random rotation
    "R1 and R2, Hadamard": {},
    "R1 alone": {"r2": "none"},
    "R2 alone": {"r1": "none"},
    "R1 and R2, orthogonal": {"r1": "orthogonal", "r2": "orthogonal"},
    "R1 in blocks of 64": {"block_size": 64},
    "R1, R2 and online, MLP": {"online": ["mlp"]},
    "R1, R2 and online, MLP and attention": {"online": ["mlp", "attention"]},
}


def main() -> None:
    tables = {"bits": bits, "learned": learned, "kinds": kinds}
    arguments = parser(__doc__, tables, "model", "calibration", "heldout", "length", "samples", "max-tokens")
    arguments.add_argument("--group-size", type=int, default=64)
    arguments.add_argument("--learn", type=int, default=64, help="steps of learning")
    arguments.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    asked = arguments.parse_args()
    show(tables, asked.tables, Measure(asked))


class Measure:
    """Runs steps on the model and says what they lost; the same steps once."""

    def __init__(self, asked: argparse.Namespace):
        self.asked = asked
        self.original: float | None = None
        self._done: dict[str, tuple[str, dict[str, Any]]] = {}

    def __call__(self, *steps: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """("perplexity / KL", figures of the rotation) of the result."""
        key = repr(steps)
        if key not in self._done:
            self._done[key] = self._run(list(steps))
            print(f"{key}: {self._done[key]}", file=sys.stderr, flush=True)
        return self._done[key]

    def _run(self, steps: list[dict[str, Any]]) -> tuple[str, dict[str, Any]]:
        asked = self.asked
        rows = {"samples": asked.samples, "length": asked.length, "batch_size": max(1, 2048 // asked.length)}
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
        figures = report["rewrites"][0]["figures"] if report["rewrites"] else {}
        return f"{perplexity:.{digits}f} / {divergence:.4f}", figures


def rounding(method: str, asked: argparse.Namespace, n_bits: int) -> dict[str, Any]:
    return {method: {"bits": n_bits, "group_size": asked.group_size}}


def looking(asked: argparse.Namespace, n_bits: int) -> dict[str, Any]:
    return {"bits": n_bits, "group_size": asked.group_size, "candidates": CANDIDATES}


def bits(measure: Measure) -> Iterator[str]:
    """rtn and gptq: as it is, after a random rotation, after a learned one; perplexity / KL."""
    asked = measure.asked
    yield "| steps | " + " | ".join(f"{n} bits" for n in asked.bits) + " |"
    yield "|---" * (1 + len(asked.bits)) + "|"
    for method in ("rtn", "gptq"):
        before: dict[str, list[list[dict[str, Any]]]] = {
            f"`{method}`": [[] for _ in asked.bits],
            f"`rotate` → `{method}`": [[{"rotate": {}}] for _ in asked.bits],
            f"learned `rotate` → `{method}`": [
                [{"rotate": {**looking(asked, n), "learn": asked.learn}}] for n in asked.bits
            ],
        }
        for heading, steps in before.items():
            cells = [measure(*s, rounding(method, asked, n))[0] for s, n in zip(steps, asked.bits, strict=True)]
            yield f"| {heading} | " + " | ".join(cells) + " |"


def learned(measure: Measure) -> Iterator[str]:
    """The loss that is trained: of the random candidates and of the learned rotation."""
    asked = measure.asked
    yield f"| bits | best of {CANDIDATES} random | worst | learned |"
    yield "|---|---|---|---|"
    for n in asked.bits:
        settings = {**looking(asked, n), "learn": asked.learn}
        figures = measure({"rotate": settings}, rounding("rtn", asked, n))[1]
        losses = figures["losses"]
        yield f"| {n} | {min(losses):.4f} | {max(losses):.4f} | {figures['loss_learned']:.4f} |"


def kinds(measure: Measure) -> Iterator[str]:
    """Which rotation does what; perplexity / KL after gptq."""
    asked = measure.asked
    yield "| before `gptq` | " + " | ".join(f"{n} bits" for n in asked.bits) + " |"
    yield "|---" * (1 + len(asked.bits)) + "|"
    for heading, settings in RANDOM.items():
        cells = [measure({"rotate": settings}, rounding("gptq", asked, n))[0] for n in asked.bits]
        yield f"| {heading} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
