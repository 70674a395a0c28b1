"""The tables of docs/methods/cospadi.md: dictionaries beside truncated SVD at equal bytes, alone and followed by 4 bits.

Each cell is a real run (`compress.run`) and its evaluation on held-out text. Prints Markdown:

    python scripts/table_cospadi.py                        # all tables, on the model that ships
    python scripts/table_cospadi.py ratios rounded         # some of them
    python scripts/table_cospadi.py --cache FILE           # goes on where it was stopped
    python scripts/table_cospadi.py --model FOLDER --calibration FILE --heldout FILE
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import compress
from compress.recipe import Recipe

Settings = dict[str, Any]
RATIOS = (0.95, 0.9, 0.8, 0.7)
METHODS: dict[str, Settings] = {  # heading -> step, keep_ratio to come
    "svd": {"svd": {}},
    "svd, `refit: 0.5`": {"svd": {"refit": 0.5}},
    "svd, `loss`, `refit: 0.5`": {"svd": {"allocation": "loss", "refit": 0.5}},
    "cospadi": {"cospadi": {}},
    "cospadi, `share: 2`": {"cospadi": {"share": 2}},
}
ROUNDED = ("svd, `refit: 0.5`", "svd, `loss`, `refit: 0.5`", "cospadi", "cospadi, `share: 2`")
GPTQ = {"gptq": {"bits": 4, "group_size": 32, "clip": "mse"}}
VARIANTS: dict[str, Settings] = {  # heading -> settings beside keep_ratio
    "defaults": {},
    "`share: 3`": {"share": 3},
    "`share: 6`": {"share": 6},
    "`engine: ksvd`": {"engine": "ksvd", "rounds": 10},
    "`engine: ksvd`, `start: columns`": {"engine": "ksvd", "rounds": 10, "start": "columns"},
    "`rho: 1.5`": {"rho": 1.5},
    "`rho: 3`": {"rho": 3.0},
    "`damping: 0.000001`": {"damping": 1e-6},
    "`rounds: 5`": {"rounds": 5},
    "`refit: false`": {"refit": False},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", help="ratios, rounded, variants [default: all]")
    parser.add_argument("--model", default="shipped", help="a folder or Hub id [default: the one that ships]")
    parser.add_argument("--calibration", default="shipped", help="text to calibrate on")
    parser.add_argument("--heldout", default="shipped", help="text to measure on")
    parser.add_argument("--samples", type=int, default=32, help="rows of 256 calibration tokens")
    parser.add_argument("--max-tokens", type=int, default=8192, help="of the held-out text")
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS, help="of the bytes that the linears take")
    parser.add_argument("--cache", type=Path, help="JSON file of cells that are known, and that grows")
    parser.add_argument("--known", action="store_true", help="print what is known, run nothing")
    asked = parser.parse_args()
    tables = {"ratios": ratios, "rounded": rounded, "variants": variants}
    measure = Measure(asked)
    for name in asked.tables or tables:
        for line in list(tables[name](measure)):
            print(line, flush=True)
        print()
    print(f"The original: perplexity {measure.original:.3f}.")


class Measure:
    """Runs steps on the model and says what they lost; the same steps once."""

    def __init__(self, asked: argparse.Namespace):
        self.asked = asked
        plan = compress.plan(self._recipe([{"rtn": {"bits": 8, "group_size": -1}}]))
        self._n_weights, self._others = plan.n_weights, plan.bytes_total_after - plan.bytes_after
        self._known: dict[str, Any] = (
            json.loads(asked.cache.read_text()) if asked.cache and asked.cache.exists() else {}
        )

    @property
    def original(self) -> float:
        return next((cell["original"] for cell in self._known.values()), float("nan"))

    def __call__(self, *steps: Settings) -> dict[str, Any] | None:
        """Perplexity, KL, bits per weight of all linears, bytes of all tensors; None where it is not known and not to be run."""
        asked = self.asked
        key = json.dumps([asked.model, asked.samples, asked.max_tokens, steps])
        if key not in self._known and not asked.known:
            self._known[key] = self._run(list(steps))
            print(f"{key}: {self._known[key]}", file=sys.stderr, flush=True)
            if asked.cache:
                held = json.loads(asked.cache.read_text()) if asked.cache.exists() else {}
                asked.cache.write_text(json.dumps(held | self._known, indent=0))
        found = self._known.get(key)
        return found and {**found, "bits": 8 * (found["bytes"] - self._others) / self._n_weights}

    def _recipe(self, steps: list[Settings]) -> Recipe:
        asked = self.asked
        return Recipe.from_dict(
            {
                "model": asked.model,
                "calibration": {"data": asked.calibration, "samples": asked.samples, "length": 256, "batch_size": 8},
                "steps": steps,
                "evaluation": {"data": asked.heldout, "length": 256, "max_tokens": asked.max_tokens},
            }
        )

    def _run(self, steps: list[Settings]) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            result = compress.run(self._recipe(steps), Path(folder) / "out")
        found = result.report["evaluation"]
        return {
            "perplexity": found["model"]["perplexity"],
            "kl": found["fidelity"]["kl_mean"],
            "original": found["reference"]["perplexity"],
            "bytes": result.plan.bytes_total_after,
            "seconds": sum(result.report["seconds"].values()),
        }


def cell(found: dict[str, Any] | None) -> str:
    return "–" if found is None else f"{found['perplexity']:.2f} / {found['kl']:.4f}"


def with_ratio(step: Settings, ratio: float) -> Settings:
    ((method, settings),) = step.items()
    return {method: {"keep_ratio": ratio, **settings}}


def ratios(measure: Measure) -> Iterator[str]:
    """Ratio by method; perplexity / KL."""
    yield "| keep_ratio | " + " | ".join(METHODS) + " |"
    yield "|---" * (1 + len(METHODS)) + "|"
    for ratio in measure.asked.ratios:
        found = [measure(with_ratio(step, ratio)) for step in METHODS.values()]
        yield f"| {ratio:g} | " + " | ".join(map(cell, found)) + " |"


def rounded(measure: Measure) -> Iterator[str]:
    """Each followed by 4 bits, by what it takes, beside rounding alone."""
    yield "| then gptq, 4 bits, groups of 32 | bits per weight | perplexity / KL |"
    yield "|---" * 3 + "|"
    rows: dict[str, list[Settings]] = {
        f"gptq alone, {bits} bits": [{"gptq": {**GPTQ["gptq"], "bits": bits}}] for bits in (4, 3)
    }
    for ratio in measure.asked.ratios:
        for heading in ROUNDED:
            rows[f"{heading}, {ratio:g}"] = [with_ratio(METHODS[heading], ratio), GPTQ]
    found = {heading: own for heading, steps in rows.items() if (own := measure(*steps)) is not None}
    for heading, own in sorted(found.items(), key=lambda item: -item[1]["bits"]):
        yield f"| {heading} | {own['bits']:.3f} | {cell(own)} |"


def variants(measure: Measure) -> Iterator[str]:
    """Settings of cospadi at 0.8."""
    yield "| at 0.8 | bits per weight | perplexity / KL |"
    yield "|---" * 3 + "|"
    for heading, settings in VARIANTS.items():
        own = measure({"cospadi": {"keep_ratio": 0.8, **settings}})
        if own is not None:
            yield f"| {heading} | {own['bits']:.3f} | {cell(own)} |"


if __name__ == "__main__":
    main()
