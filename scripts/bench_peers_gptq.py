"""GPTQ, 4 bits, groups of 128, beside llm-compressor and GPTQModel: CPU seconds, memory, divergence of the logits.

A random Llama (scripts/random_llama.py) is compressed by each tool in an environment of its own, from the same file,
with the same rows of tokens and the same number of threads. Every run is a process of its own and is measured whole,
from the start of the interpreter to the saved folder. Runs alternate (ours, theirs, ours, …) so that a busy machine is
busy for all, and every round has a model of its own. Divergence: mean KL of the logits to the original in float32, on
other tokens, by one scorer (scripts/peers/divergence.py); on random weights it varies by some percent from model to
model, and so do its ratios.

    python -m venv llmc && llmc/bin/pip install llmcompressor==0.14.0.1 torch==2.13.0
    python -m venv gptqm && gptqm/bin/pip install gptqmodel==7.6.0 torch==2.13.0 optimum==2.3.0
    python scripts/bench_peers_gptq.py --llm-compressor-python llmc/bin/python --gptqmodel-python gptqm/bin/python

Without the options of the other tools only ours is measured: as it comes, and with part of the activations on disk.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

from measure import Measurement, commit, machine, measure, threads_environment

HERE = Path(__file__).resolve().parent
TARGETS = {"cpu_s": 0.6, "peak_resident_bytes": 0.9, "kl": 1.03}  # of the better of the others
UNITS = {"cpu_s": (1, "CPU s", ".1f"), "wall_s": (1, "wall s", ".1f"), "peak_resident_bytes": (1e6, "peak RSS MB", ".0f"),
         "peak_anonymous_bytes": (1e6, "peak anonymous MB", ".0f"), "kl": (1, "KL", ".5f")}  # fmt: skip
Command = list[str | Path]


@dataclass
class Tool:
    """One tool: its command line, from the round's folder to its result, and what its runs took."""

    name: str
    command: Callable[[Path, Path], Command]
    ours: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    runs: list[Measurement] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    result: Path = Path()

    def figures(self) -> dict[str, float]:
        """Medians over the runs; of KL the mean, since every round has its own model."""
        keys = ("cpu_s", "wall_s", "peak_resident_bytes", "peak_anonymous_bytes")
        return {**{key: median(getattr(run, key) for run in self.runs) for key in keys}, "kl": mean(self.kl)}


def tools(options: argparse.Namespace) -> list[Tool]:
    """Ours, as it comes and with part of the activations on disk, then those whose interpreter was given."""

    def ours(*more: str) -> Callable[[Path, Path], Command]:
        start: Command = [sys.executable, HERE / "peers/compress_cli.py", "run", "--quiet", *more]
        return lambda work, out: [*start, "--recipe", work / "recipe.yaml", "--out", out]

    def peer(python: Path, script: str) -> Callable[[Path, Path], Command]:
        start: Command = [python, HERE / "peers" / script, "--damping", str(options.damping)]
        return lambda work, out: [*start, "--model", work / "model", "--rows", work / "rows.json", "--out", out]

    limited = ours("--activation-memory", options.activation_memory)
    found = [Tool("compress", ours(), ours=True)]
    found.append(Tool(f"compress --activation-memory {options.activation_memory}", limited, ours=True))
    if options.llm_compressor_python:
        found.append(Tool("llm-compressor", peer(options.llm_compressor_python, "llm_compressor_gptq.py")))
    if options.gptqmodel_python:
        workers = {"GPTQMODEL_CPU_WORKERS": "2"}  # it refuses to start on two cores otherwise
        found.append(Tool("GPTQModel", peer(options.gptqmodel_python, "gptqmodel_gptq.py"), environment=workers))
    return found


def prepare(work: Path, seed: int, options: argparse.Namespace) -> None:
    """The model of a round, our recipe, and the rows that everybody gets."""
    work.mkdir(parents=True, exist_ok=True)
    environment = threads_environment(options.threads)
    random: Command = [sys.executable, HERE / "random_llama.py", work / "model"]
    measure([*random, "--blocks", str(options.blocks), "--seed", str(seed)], work / "model.log", environment)
    step = {"bits": 4, "group_size": 128, "symmetric": True, "damping": options.damping, "order": "act"}
    recipe = {
        "model": str(work / "model"),
        "calibration": {"data": "shipped", "samples": options.samples, "length": options.length},
        "steps": [{"gptq": step}],
    }
    (work / "recipe.yaml").write_text(json.dumps(recipe, indent=2))  # JSON is YAML
    rows: Command = [sys.executable, HERE / "peers/token_rows.py", "--recipe", work / "recipe.yaml"]
    rows += ["--calibration", work / "rows.json", "--heldout", work / "heldout.json"]
    measure(rows, work / "rows.log", environment)


def run_once(tool: Tool, work: Path, options: argparse.Namespace) -> None:
    label = tool.name.replace(" ", "")
    tool.result = work / f"out-{label}"
    shutil.rmtree(tool.result, ignore_errors=True)
    environment = {**threads_environment(options.threads), **tool.environment}
    run = measure(tool.command(work, tool.result), work / f"{label}.log", environment)
    tool.runs.append(run)
    tool.settings = _our_settings(work, tool.result) if tool.ours else _tagged(run.output, "SETTINGS")
    score: Command = [sys.executable, HERE / "peers/divergence.py", "--model", work / "model"]
    score += ["--rows", work / "heldout.json", tool.result]
    scored = measure(score, work / "divergence.log", environment)
    tool.kl.append(_tagged(scored.output, "KL")[str(tool.result)])
    values = {
        "cpu_s": run.cpu_s,
        "wall_s": run.wall_s,
        "peak_resident_bytes": run.peak_resident_bytes,
        "kl": tool.kl[-1],
    }
    shown = ", ".join(f"{UNITS[k][1]} {v / UNITS[k][0]:{UNITS[k][2]}}" for k, v in values.items())
    print(f"{work.name} {tool.name}: {shown}  (load {run.load:.1f})", file=sys.stderr, flush=True)


def _tagged(output: Path, tag: str) -> dict[str, Any]:
    lines = [line for line in output.read_text(errors="replace").splitlines() if line.startswith(f"{tag} ")]
    return dict(json.loads(lines[-1].removeprefix(f"{tag} ")))


def _our_report(result: Path) -> dict[str, Any]:
    return dict(json.loads((result / "compress_report.json").read_text()))


def _our_settings(work: Path, result: Path) -> dict[str, Any]:
    recipe, versions = json.loads((work / "recipe.yaml").read_text()), _our_report(result)["work"]
    names = ("version of compress-llm", "version of torch")
    return {"steps": recipe["steps"], "batch": "2048 tokens (its default)", **{name: versions[name] for name in names}}


def table(found: list[Tool]) -> str:
    """Markdown: a row for each tool, then our ratios to the better of the others beside the targets."""
    lines = ["| tool | " + " | ".join(UNITS[k][1] for k in UNITS) + " |", "|--|" + "--:|" * len(UNITS)]
    for tool in found:
        figures = tool.figures()
        lines.append(
            f"| {tool.name} | " + " | ".join(f"{figures[k] / UNITS[k][0]:{UNITS[k][2]}}" for k in UNITS) + " |"
        )
    for name, ratios in ratios_to_better(found).items():
        lines.append(
            f"| **{name} / better of the others** | " + " | ".join(f"**{ratios[k]:.2f}**" for k in UNITS) + " |"
        )
    if any(not tool.ours for tool in found):
        lines.append("| target | " + " | ".join(f"{TARGETS[k]}" if k in TARGETS else "" for k in UNITS) + " |")
    return "\n".join(lines)


def ratios_to_better(found: list[Tool]) -> dict[str, dict[str, float]]:
    """Figures of ours over the lowest of the others', figure by figure."""
    others = [tool.figures() for tool in found if not tool.ours]
    if not others:
        return {}
    best = {key: min(other[key] for other in others) for key in UNITS}
    return {tool.name: {key: tool.figures()[key] / best[key] for key in UNITS} for tool in found if tool.ours}


def activities(result: Path) -> str:
    """Where the time of our last run went, by its own report."""
    report = _our_report(result)
    phases = {**{f"phase {k}": v for k, v in report["seconds"].items()}, **report["activities"]}
    return "\n".join(f"  {name:20s} {seconds:7.2f} s" for name, seconds in phases.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm-compressor-python", type=Path, help="interpreter of an environment with llm-compressor")
    parser.add_argument("--gptqmodel-python", type=Path, help="interpreter of an environment with GPTQModel")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each tool [default: 3]")
    parser.add_argument("--threads", type=int, default=2, help="[default: 2]")
    parser.add_argument("--blocks", type=int, default=8, help="[default: 8]")
    parser.add_argument("--samples", type=int, default=32, help="calibration rows [default: 32]")
    parser.add_argument("--length", type=int, default=512, help="tokens in a row [default: 512]")
    parser.add_argument("--damping", type=float, default=0.01, help="for all [default: 0.01]")
    parser.add_argument("--activation-memory", default="64MiB", help="for our second run of a round [default: 64MiB]")
    parser.add_argument("--work", type=Path, help="folder for models and results, kept; by default a temporary one")
    parser.add_argument("--json", type=Path, help="file for the figures of every run")
    options = parser.parse_args()
    for python in ("llm_compressor_python", "gptqmodel_python"):
        if getattr(options, python):
            setattr(options, python, getattr(options, python).absolute())  # runs start in other folders
    with tempfile.TemporaryDirectory(prefix="bench-peers-") as temporary:
        work = (options.work or Path(temporary)).absolute()
        found = tools(options)
        for number in range(options.rounds):
            prepare(work / f"round-{number + 1}", number, options)
            for tool in found:
                run_once(tool, work / f"round-{number + 1}", options)
        print(f"commit {commit()}; {machine()}; {options.rounds} runs each: medians, of KL means")
        for tool in found:
            print(f"{tool.name}: {json.dumps(tool.settings)}")
        print(table(found))
        print(f"Where the time of our last run as it comes went (wall):\n{activities(found[0].result)}")
        if options.json:
            content = [{**asdict(tool), "command": None, "figures": tool.figures()} for tool in found]
            everything = {"commit": commit(), "machine": machine(), "tools": content, "ratios": ratios_to_better(found)}
            options.json.write_text(json.dumps(everything, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
