"""What the scripts table_*.py share: their arguments, and runs of steps that are measured once and remembered."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import compress
from compress.recipe import Recipe

Settings = dict[str, Any]
Table = Callable[[Any], Iterator[str]]

ARGUMENTS: dict[str, dict[str, Any]] = {
    "--model": {"default": "shipped", "help": "a folder [default: the model that ships]"},
    "--dtype": {"default": "auto", "help": "of the result's floats [default: as the model's]"},
    "--calibration": {"default": "shipped", "help": "text to calibrate on"},
    "--heldout": {"default": "shipped", "help": "text to measure on"},
    "--length": {"type": int, "default": 256, "help": "tokens per row"},
    "--samples": {"type": int, "default": 64, "help": "rows of calibration tokens"},
    "--max-tokens": {"type": int, "default": 8192, "help": "of the held-out text"},
    "--cache": {"type": Path, "help": "JSON file of cells that are known, and that grows"},
}


def parser(text: str | None, tables: Mapping[str, Table], *names: str, **defaults: Any) -> argparse.ArgumentParser:
    """A parser of the arguments that table scripts have in common.

    Args:
        text: what the script is for, its docstring.
        tables: those that the script knows, by name; none: it has one only.
        names: of ARGUMENTS, without dashes in front; all of them by default.
        defaults: other than there, by the name of the attribute.
    """
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    if tables:
        made.add_argument("tables", nargs="*", help=f"{', '.join(tables)} [default: all]")
    for flag, settings in ARGUMENTS.items():
        if not names or flag.removeprefix("--") in names:
            made.add_argument(flag, **settings)
    made.set_defaults(**defaults)
    return made


def show(tables: Mapping[str, Table], wanted: list[str], measure: Any) -> None:
    """Print the wanted tables, or all, and the perplexity of the original, if `measure` has learned of it."""
    for name in wanted or tables:
        for line in tables[name](measure):
            print(line, flush=True)
        print(flush=True)
    original = getattr(measure, "original", None)
    if original:
        print(f"The original: perplexity {original:.3f}.")


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
        """`cell`: perplexity / KL; `total`: bytes of all tensors; `bits`: per weight of the linears of the blocks; `proxy`: where
        a method reports a `proxy_loss`, the mean of its ratio to that at the start."""
        asked = self.asked
        settings = (
            getattr(asked, name.removeprefix("--").replace("-", "_"), None) for name in ARGUMENTS if name != "--cache"
        )
        key = json.dumps([*settings, steps])
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
        figures = [layer["figures"] for layer in result.report["layers"]]
        ratios = [f["proxy_loss"] / f["proxy_loss_start"] for f in figures if f.get("proxy_loss_start")]
        return {
            "cell": f"{perplexity:.{2 if perplexity < 1000 else 0}f} / {divergence:.4f}",
            "total": total,
            "bits": 8 * (total - self.others) / self.n_weights,
            "proxy": sum(ratios) / len(ratios) if ratios else None,
            "original": found["reference"]["perplexity"],
            "seconds": result.report["seconds"],
            "peak_bytes": [result.report.get("peak_bytes"), result.report.get("predicted_peak_bytes")],
        }
