"""The tables of docs/methods/cur.md: what columns and rows lose, beside the whitened truncation of the same bytes.

Each cell is a real run (`compress.run`) and its evaluation on held-out text, on the model that ships. Prints Markdown:

    python scripts/table_cur.py                     # all tables
    python scripts/table_cur.py ratios blocks       # some of them
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tables import parser, show

import compress
from compress.recipe import Recipe

RATIOS = (0.95, 0.9, 0.8)
LAYERS = ["*.q_proj", "*.k_proj", "*.gate_proj"]  # the paper's
DEIM, HEALED = {"selection": "deim"}, {"heal": 1.0}
WAYS: dict[str, dict[str, Any]] = {  # heading -> settings
    "`deim`, the paper's matrix and fit": {**DEIM, "matrix": "wanda", "fit": "weight"},
    "`deim`": DEIM,
    "as it comes": {},
    "`heal: 1`": HEALED,
}
BLOCKS = (1, 2, 3, 4)
ROUNDED: dict[str, list[dict[str, Any]]] = {
    "gptq, 4 bits": [],
    "cur 0.8, `heal: 1`": [{"cur": {"keep_ratio": 0.8, **HEALED}}],
    "cur 0.8, `heal: 1`, then gptq, 4 bits": [{"cur": {"keep_ratio": 0.8, **HEALED}}],
    "cur 0.8, `heal: 1`, then rtn, 8 bits": [{"cur": {"keep_ratio": 0.8, **HEALED}}],
}
GPTQ, RTN = {"gptq": {"bits": 4, "group_size": 32, "clip": "mse"}}, {"rtn": {"bits": 8, "group_size": 32}}


def main() -> None:
    tables = {"ratios": ratios, "blocks": blocks, "rounded": rounded}
    asked = parser(__doc__, tables, "samples", "max-tokens").parse_args()
    show(tables, asked.tables, Measure(asked.samples, asked.max_tokens))


class Measure:
    """Runs steps on q, k and gate of the model that ships, and says what they lost; the same steps once."""

    def __init__(self, samples: int, max_tokens: int):
        self.samples, self.max_tokens, self.original = samples, max_tokens, 0.0
        self._done: dict[str, tuple[str, int]] = {}

    def __call__(self, *steps: dict[str, Any]) -> tuple[str, int]:
        """("perplexity / KL", bytes of all weights) of the result."""
        key = repr(steps)
        if key not in self._done:
            self._done[key] = self._run([{**step, "layers": LAYERS} for step in steps])
            print(f"{key}: {self._done[key]}", file=sys.stderr, flush=True)
        return self._done[key]

    def _run(self, steps: list[dict[str, Any]]) -> tuple[str, int]:
        recipe = Recipe.from_dict(
            {
                "model": "shipped",
                "calibration": {"data": "shipped", "samples": self.samples, "length": 256, "batch_size": 16},
                "steps": steps,
                "evaluation": {"data": "shipped", "max_tokens": self.max_tokens},
            }
        )
        with tempfile.TemporaryDirectory() as folder:
            result = compress.run(recipe, Path(folder) / "out")
        found = result.report["evaluation"]
        self.original = found["reference"]["perplexity"]
        perplexity, divergence = found["model"]["perplexity"], found["fidelity"]["kl_mean"]
        return f"{perplexity:.2f} / {divergence:.4f}", result.plan.bytes_total_after


def ratios(measure: Measure) -> Iterator[str]:
    """Way by ratio, all blocks; perplexity / KL."""
    yield "| keep_ratio | file | " + " | ".join(WAYS) + " | svd, whitened | svd, `refit: 0.5` |"
    yield "|---" * (4 + len(WAYS)) + "|"
    for ratio in RATIOS:
        cells = [measure({"cur": {"keep_ratio": ratio, **settings}})[0] for settings in WAYS.values()]
        cells += [measure({"svd": {"keep_ratio": ratio, **own}})[0] for own in ({}, {"refit": 0.5})]
        size = measure({"cur": {"keep_ratio": ratio}})[1]
        yield f"| {ratio} | {size / 1e6:.2f} MB | " + " | ".join(cells) + " |"


def blocks(measure: Measure) -> Iterator[str]:
    """A few blocks at 0.8, chosen by angular distance; perplexity / KL."""
    yield "| n_blocks | file | `deim` | as it comes | `heal: 1` |"
    yield "|---|---|---|---|---|"
    for n_blocks in BLOCKS:
        found = [measure({"cur": {"n_blocks": n_blocks, **own}}) for own in (DEIM, {}, HEALED)]
        yield f"| {n_blocks} | {found[0][1] / 1e6:.2f} MB | " + " | ".join(cell for cell, _ in found) + " |"


def rounded(measure: Measure) -> Iterator[str]:
    """Followed by rounding; perplexity / KL."""
    yield "| steps | file | perplexity / KL |"
    yield "|---|---|---|"
    for name, steps in ROUNDED.items():
        more = [GPTQ] if "gptq" in name else [RTN] if "rtn" in name else []
        cell, size = measure(*steps, *more)
        yield f"| {name} | {size / 1e6:.2f} MB | {cell} |"


if __name__ == "__main__":
    main()
