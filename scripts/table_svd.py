"""The tables of docs/low-rank.md: what low rank loses, by method, by how ranks are allocated, and with rounding behind.

Each cell is a real run (`compress.run`) and its evaluation on held-out text. Prints Markdown:

    python scripts/table_svd.py                            # all tables, on the model that ships
    python scripts/table_svd.py methods allocations        # some of them
    python scripts/table_svd.py --cache FILE               # goes on where it was stopped
    python scripts/table_svd.py --model FOLDER --dtype bfloat16 --calibration FILE --heldout FILE --ratios 0.95 0.9 0.85 0.8
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import compress
from compress.recipe import Recipe

Settings = dict[str, Any]
RATIOS = (0.95, 0.9, 0.8, 0.7, 0.6)
BEST = {"allocation": "loss", "refit": 0.5}
METHODS: dict[str, Settings] = {  # heading -> step, keep_ratio to come; ranks are uniform
    "`plain`": {"svd": {"objective": "plain"}},
    "`scaled` (ASVD)": {"svd": {"objective": "scaled"}},
    "`awsvd` (LoRAP)": {"svd": {"objective": "awsvd"}},
    "`whitened` (SVD-LLM)": {"svd": {}},
    "`whitened`, `refit: 0.5`": {"svd": {"refit": 0.5}},
    "`cur`, `heal: 1`": {"cur": {"heal": 1.0}},
    "`dobi_svd`, 8 bits": {"dobi_svd": {"steps": 0}},
}
ALLOCATIONS: dict[str, Settings] = {  # heading -> step, keep_ratio to come; whitened
    "`uniform`": {"svd": {}},
    "`heavy_tail`": {"svd": {"allocation": "heavy_tail"}},
    "`energy`": {"svd": {"allocation": "energy"}},
    "`effective_rank`": {"svd": {"allocation": "effective_rank"}},
    "`lorap`": {"svd": {"allocation": "lorap"}},
    "`loss`": {"svd": {"allocation": "loss"}},
    "`loss`, `refit: 0.5`": {"svd": BEST},
}
LEARNED = {"allocation": "learned", "steps": 32, "learning_rate": 0.01}
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
GPTQ = {"group_size": 32, "clip": "mse"}
BITS = (4, 3, 2)
ROUNDED_RATIOS = (0.9, 0.8, 0.7778, 0.5556)  # of the bytes of 4 bits; the last two: those of 3 and of 2 bits
ROUNDED: dict[str, Settings] = {
    "svd, `uniform`": {"svd": {"refit": 0.5}},
    "svd, `loss`": {"svd": BEST},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", help="methods, allocations, learned, refit, rounded [default: all]")
    parser.add_argument("--model", default="shipped", help="a folder [default: the model that ships]")
    parser.add_argument("--dtype", default="auto", help="of the result's floats [default: as the model's]")
    parser.add_argument("--calibration", default="shipped", help="text to calibrate on")
    parser.add_argument("--heldout", default="shipped", help="text to measure on")
    parser.add_argument("--length", type=int, default=256, help="tokens per row")
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS, help="of the bytes that the linears take")
    parser.add_argument("--samples", type=int, default=64, help="rows of calibration tokens")
    parser.add_argument("--max-tokens", type=int, default=8192, help="of the held-out text")
    parser.add_argument("--cache", type=Path, help="JSON file of cells that are known, and that grows")
    asked = parser.parse_args()
    tables = {"methods": methods, "allocations": allocations, "learned": learned, "refit": refit, "rounded": rounded}
    measure = Measure(asked)
    for name in asked.tables or tables:
        for line in tables[name](measure):
            print(line, flush=True)
        print()
    print(f"The original: perplexity {measure.original:.3f}.")


class Measure:
    """Runs steps on the model and says what they lost; the same steps once."""

    def __init__(self, asked: argparse.Namespace):
        self.asked = asked
        plan = compress.plan(self._recipe([{"rtn": {"bits": 8, "group_size": -1}}]))
        self.n_weights, self.others = plan.n_weights, plan.bytes_total_after - plan.bytes_after
        known = json.loads(asked.cache.read_text()) if asked.cache and asked.cache.exists() else {}
        self._known: dict[str, Any] = known

    @property
    def original(self) -> float:
        return next(iter(self._known.values()))["original"]

    def __call__(self, *steps: Settings) -> dict[str, Any]:
        """`cell`: perplexity / KL; `total`: bytes of all tensors; `bits`: per weight of the linears of the blocks."""
        asked = self.asked
        key = json.dumps([asked.model, asked.samples, asked.length, asked.max_tokens, steps])
        if key not in self._known:
            self._known[key] = self._run(list(steps))
            print(f"{key}: {self._known[key]}", file=sys.stderr, flush=True)
            if asked.cache:
                asked.cache.write_text(json.dumps(self._known, indent=0))
        return self._known[key]

    def _recipe(self, steps: list[Settings]) -> Recipe:
        asked = self.asked
        rows = {"samples": asked.samples, "length": asked.length, "batch_size": max(1, 2048 // asked.length)}
        return Recipe.from_dict(
            {
                "model": {"path": asked.model, "dtype": asked.dtype},
                "calibration": {"data": asked.calibration, **rows},
                "steps": steps,
                "evaluation": {"data": asked.heldout, "length": asked.length, "max_tokens": asked.max_tokens},
            }
        )

    def _run(self, steps: list[Settings]) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            result = compress.run(self._recipe(steps), Path(folder) / "out")
        found, total = result.report["evaluation"], result.plan.bytes_total_after
        perplexity, divergence = found["model"]["perplexity"], found["fidelity"]["kl_mean"]
        return {
            "cell": f"{perplexity:.{2 if perplexity < 1000 else 0}f} / {divergence:.4f}",
            "total": total,
            "bits": 8 * (total - self.others) / self.n_weights,
            "original": found["reference"]["perplexity"],
            "seconds": result.report["seconds"],
            "peak_bytes": [result.report.get("peak_bytes"), result.report.get("predicted_peak_bytes")],
        }


def with_ratio(step: Settings, ratio: float) -> Settings:
    ((method, settings),) = step.items()
    return {method: {"keep_ratio": ratio, **settings}}


def by_ratio(measure: Measure, columns: Mapping[str, Settings]) -> Iterator[str]:
    """Ratio by column; perplexity / KL. The size is that of the first column's result, others differ by less than a rank."""
    yield "| keep_ratio | all files | " + " | ".join(columns) + " |"
    yield "|---" * (2 + len(columns)) + "|"
    for ratio in measure.asked.ratios:
        found = [measure(with_ratio(step, ratio)) for step in columns.values()]
        cells = " | ".join(own["cell"] for own in found)
        yield f"| {ratio:g} | {found[0]['total'] / 1e6:.2f} MB | {cells} |"


def methods(measure: Measure) -> Iterator[str]:
    yield from by_ratio(measure, METHODS)


def allocations(measure: Measure) -> Iterator[str]:
    yield from by_ratio(measure, ALLOCATIONS)


def learned(measure: Measure) -> Iterator[str]:
    """Learned ranks, at 0.8 alone: learning takes longer than all else."""
    found = measure({"svd": {"keep_ratio": 0.8, **LEARNED}})
    yield f"`learned`, {LEARNED['steps']} steps, at 0.8: {found['cell']}, {sum(found['seconds'].values()):.0f} s."


def refit(measure: Measure) -> Iterator[str]:
    """Strengths of refit at 0.8; perplexity / KL."""
    yield "| `refit` | " + " | ".join(f"{strength:g}" for strength in STRENGTHS) + " |"
    yield "|---" * (1 + len(STRENGTHS)) + "|"
    for allocation in ("uniform", "loss"):
        settings = [{"keep_ratio": 0.8, "allocation": allocation, "refit": strength} for strength in STRENGTHS]
        yield f"| `{allocation}` | " + " | ".join(measure({"svd": own})["cell"] for own in settings) + " |"


def rounded(measure: Measure) -> Iterator[str]:
    """Truncation followed by 4 bits, beside rounding alone; perplexity / KL."""
    yield "| steps | bits per weight | all files | perplexity / KL |"
    yield "|---|---|---|---|"
    rows: dict[str, list[Settings]] = {f"gptq, {bits} bits": [{"gptq": {"bits": bits, **GPTQ}}] for bits in BITS}
    for ratio in ROUNDED_RATIOS:
        for heading, step in ROUNDED.items():
            rows[f"{heading}, {ratio:g}, gptq 4 bits"] = [with_ratio(step, ratio), {"gptq": {"bits": 4, **GPTQ}}]
    found = {heading: measure(*steps) for heading, steps in rows.items()}
    for heading, own in sorted(found.items(), key=lambda item: -item[1]["bits"]):
        yield f"| {heading} | {own['bits']:.3f} | {own['total'] / 1e6:.2f} MB | {own['cell']} |"


if __name__ == "__main__":
    main()
