"""The tables of docs/methods: what rounding and GPTQ lose on the model that ships, at every width and group size.

Each cell is a real run (`compress.run`) and its evaluation on the held-out text that ships. Prints Markdown:

    python scripts/table_gptq.py              # all tables, about 70 runs
    python scripts/table_gptq.py orders       # one of them
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

WIDTHS = {8: (-1, 128), 4: (-1, 128, 64, 32), 3: (-1, 128, 64, 32), 2: (-1, 128, 64, 32)}  # bits: group sizes
METHODS: dict[str, dict[str, dict[str, Any]]] = {  # heading -> step
    "rtn": {"rtn": {}},
    "gptq": {"gptq": {}},
    "gptq, `clip: mse`": {"gptq": {"clip": "mse"}},
}
ORDERS: dict[str, dict[str, Any]] = {  # heading -> settings of gptq
    "`order: none`": {"order": "none"},
    "`order: gar`": {"order": "gar"},
    "`order: act` (default)": {"order": "act"},
    "`order: none, static_groups: false` (the paper)": {"order": "none", "static_groups": False},
    "`order: gar, static_groups: false`": {"order": "gar", "static_groups": False},
    "`order: act, gptaq: 0.25`": {"order": "act", "gptaq": 0.25},
}
GRIDS: dict[str, dict[str, Any]] = {  # heading -> settings of rtn and gptq
    "symmetric": {},
    "asymmetric": {"symmetric": False},
    "symmetric, `clip: mse`": {"clip": "mse"},
    "asymmetric, `clip: mse`": {"symmetric": False, "clip": "mse"},
}


def main() -> None:
    tables = {"widths": widths, "orders": orders, "grids": grids}
    asked = parser(__doc__, tables, "samples", "max-tokens", samples=128, max_tokens=None).parse_args()
    show(tables, asked.tables, Measure(asked.samples, asked.max_tokens))


class Measure:
    """Runs a step on the shipped model and says what it lost; every step once."""

    def __init__(self, samples: int, max_tokens: int | None):
        self.samples, self.max_tokens = samples, max_tokens
        self.original: float | None = None
        self._done: dict[str, tuple[str, float]] = {}

    def __call__(self, method: str, **settings: Any) -> tuple[str, float]:
        """("perplexity / KL", bits per weight) of the result."""
        key = repr((method, sorted(settings.items())))
        if key not in self._done:
            self._done[key] = self._run({method: settings})
            print(f"{key}: {self._done[key]}", file=sys.stderr, flush=True)
        return self._done[key]

    def _run(self, step: dict[str, Any]) -> tuple[str, float]:
        evaluation: dict[str, Any] = {"data": "shipped"}
        if self.max_tokens is not None:
            evaluation["max_tokens"] = self.max_tokens
        recipe = Recipe.from_dict(
            {
                "model": "shipped",
                "calibration": {"data": "shipped", "samples": self.samples, "length": 256, "batch_size": 16},
                "steps": [step],
                "evaluation": evaluation,
            }
        )
        with tempfile.TemporaryDirectory() as folder:
            report = compress.run(recipe, Path(folder) / "out").report
        found = report["evaluation"]
        self.original = found["reference"]["perplexity"]
        perplexity, divergence = found["model"]["perplexity"], found["fidelity"]["kl_mean"]
        digits = 2 if perplexity < 1000 else 0
        return f"{perplexity:.{digits}f} / {divergence:.4f}", report["bits_per_weight"]


def widths(measure: Measure) -> Iterator[str]:
    """Bits by group size by method; perplexity / KL."""
    yield "| bits | group | bits per weight | " + " | ".join(METHODS) + " |"
    yield "|---" * (3 + len(METHODS)) + "|"
    for bits, groups in WIDTHS.items():
        for group in groups:
            cells, weight = [], 0.0
            for step in METHODS.values():
                (method, settings), *_ = step.items()
                cell, weight = measure(method, bits=bits, group_size=group, **settings)
                cells.append(cell)
            yield f"| {bits} | {'row' if group == -1 else group} | {weight:.3f} | " + " | ".join(cells) + " |"


def orders(measure: Measure) -> Iterator[str]:
    """Order and kind of grid by bits, groups of 64; perplexity / KL."""
    yield "| gptq, groups of 64 | 4 bits | 3 bits | 2 bits |"
    yield "|---|---|---|---|"
    for name, settings in ORDERS.items():
        cells = [measure("gptq", bits=bits, group_size=64, **settings)[0] for bits in (4, 3, 2)]
        yield f"| {name} | " + " | ".join(cells) + " |"


def grids(measure: Measure) -> Iterator[str]:
    """Kinds of grid by method and bits, groups of 64; perplexity / KL."""
    yield "| groups of 64 | rtn, 4 bits | rtn, 3 bits | rtn, 2 bits | gptq, 4 bits | gptq, 3 bits | gptq, 2 bits |"
    yield "|---|---|---|---|---|---|---|"
    for name, settings in GRIDS.items():
        cells = [measure(m, bits=bits, group_size=64, **settings)[0] for m in ("rtn", "gptq") for bits in (4, 3, 2)]
        yield f"| {name} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
