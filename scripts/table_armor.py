"""The tables of docs/methods/armor.md: 2:4 with and without wrappers, on the model that ships.

Each row is a real run (`compress.run`) and its evaluation on held-out text. Prints Markdown:

    python scripts/table_armor.py                     # all tables
    python scripts/table_armor.py iterations rounded  # some of them
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

SCORES = ("magnitude", "wanda", "nowag", "sparsegpt")
BLOCKS = (8, 16, 32)
ITERATIONS = (0, 100, 300)
GPTQ = {"gptq": {"bits": 4, "group_size": 64, "clip": "mse", "order": "gar"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", help="blocks, iterations, rounded [default: all]")
    parser.add_argument("--iterations", type=int, default=300, help="of blocks and rounded")
    parser.add_argument("--model", default="shipped", help="a folder or Hub id [default: the one that ships]")
    parser.add_argument("--samples", type=int, default=32, help="rows of 256 calibration tokens")
    parser.add_argument("--max-tokens", type=int, default=8192, help="of the held-out text")
    asked = parser.parse_args()
    tables = {"blocks": blocks, "iterations": iterations, "rounded": rounded}
    measure = Measure(asked.model, asked.samples, asked.max_tokens, asked.iterations)
    for name in asked.tables or tables:
        for line in tables[name](measure):
            print(line, flush=True)
        print(flush=True)
    print(f"The original: perplexity {measure.original:.3f}.")


class Measure:
    """Runs steps on the model, and says what they lost; the same steps once."""

    def __init__(self, model: str, samples: int, max_tokens: int, n_iters: int):
        self.model, self.samples, self.max_tokens, self.n_iters = model, samples, max_tokens, n_iters
        self.original = 0.0
        self._done: dict[str, str] = {}

    def __call__(self, *steps: dict[str, Any]) -> str:
        """Cells: bits per weight of the replaced layers, proxy loss over that of NoWag-P, perplexity, KL."""
        key = repr(steps)
        if key not in self._done:
            self._done[key] = self._run(list(steps))
            print(f"{key}: {self._done[key]}", file=sys.stderr, flush=True)
        return self._done[key]

    def _run(self, steps: list[dict[str, Any]]) -> str:
        recipe = Recipe.from_dict(
            {
                "model": self.model,
                "calibration": {"data": "shipped", "samples": self.samples, "length": 256, "batch_size": 16},
                "steps": steps,
                "evaluation": {"data": "shipped", "max_tokens": self.max_tokens},
            }
        )
        with tempfile.TemporaryDirectory() as folder:
            result = compress.run(recipe, Path(folder) / "out")
        found, layers = result.report["evaluation"], result.report["layers"]
        self.original = found["reference"]["perplexity"]
        perplexity, divergence = found["model"]["perplexity"], found["fidelity"]["kl_mean"]
        planned = [result.plan.layers[layer["name"]] for layer in layers]
        weights = sum(layer.out_features * layer.in_features for layer in planned)
        bits = 8 * sum(layer["bytes_after"] for layer in layers) / weights
        figures = [layer["figures"] for layer in layers if "proxy_loss" in layer["figures"]]
        ratio = sum(f["proxy_loss"] / f["proxy_loss_start"] for f in figures) / len(figures) if figures else None
        return f"{bits:.2f} | {'–' if ratio is None else f'{ratio:.3f}'} | {perplexity:.2f} | {divergence:.4f}"


HEAD = "bits per weight | loss / NoWag-P's | perplexity | KL |"


def blocks(measure: Measure) -> Iterator[str]:
    """Scores of prune, then armor with blocks of several sizes."""
    yield f"| | {HEAD}"
    yield "|---" * 5 + "|"
    for score in SCORES:
        yield f"| prune, {score} | {measure({'prune': {'score': score}})} |"
    for size in BLOCKS:
        yield f"| armor, blocks of {size} | {measure({'armor': {'block_size': size, 'n_iters': measure.n_iters}})} |"


def iterations(measure: Measure) -> Iterator[str]:
    """Both steps, several numbers of iterations, blocks of 16."""
    yield f"| iterations | step | {HEAD}"
    yield "|---" * 6 + "|"
    for step in ("adam", "sequential"):
        for n_iters in ITERATIONS[0 if step == "adam" else 1 :]:
            found = measure({"armor": {"block_size": 16, "n_iters": n_iters, "step": step}})
            yield f"| {n_iters} | {step} | {found} |"


def rounded(measure: Measure) -> Iterator[str]:
    """Each followed by 4 bits."""
    yield f"| then gptq, 4 bits | {HEAD}"
    yield "|---" * 5 + "|"
    for score in ("nowag", "sparsegpt"):
        yield f"| prune, {score} | {measure({'prune': {'score': score}}, GPTQ)} |"
    yield f"| armor, blocks of 16 | {measure({'armor': {'block_size': 16, 'n_iters': measure.n_iters}}, GPTQ)} |"


if __name__ == "__main__":
    main()
