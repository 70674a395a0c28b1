"""Quality at equal bytes: our best recipes beside auto-round, hqq, K-quants, llm-compressor's and GPTQModel's GPTQ.

Every tool gets the same rows of tokens and the same model and rounds the linears of its blocks, in groups of 64 where that can be
chosen; every result is measured by `compress.evaluate` on the same held-out text. "bits" is of the linears, everything stored for
them counted; K-quants cannot be made at the others' sizes. "ratio" is our KL over theirs. Each run is a process of its own; CPU
seconds and peak memory are of all of it, from the start of the interpreter to the saved folder. Beside the recipes a row has
`signround` as auto-round does it, from the nearest values and with as many iterations: its time and memory are those to compare.

    python -m venv ar && ar/bin/pip install auto-round==0.16.1 hqq==0.2.8.post1 torch==2.13.0
    python scripts/bench_quality.py --auto-round-python ar/bin/python --hqq-python ar/bin/python --work FOLDER
    python scripts/bench_quality.py ... --ggml libggml-quants.so     # see scripts/peers/ggml_rounding.py
    python scripts/bench_quality.py ... --iterations 200 1000        # auto-round's default and its `best`

Results stay in the folder of --work: a run that was stopped goes on where it was. --only names the rows to make.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measure import commit, machine, measure, threads_environment

import compress
from compress.calibration.data import load_tokenizer, load_tokens
from compress.evaluation.evaluate import evaluate
from compress.recipe import Evaluation, Recipe

HERE = Path(__file__).resolve().parent
RECIPES = HERE.parent / "recipes"
OURS = {"compress": "best", "compress, block by block": "signround"}  # recipes: NAME-4bit and so on
KINDS = {4: "q4_K", 3: "q3_K", 2: "q2_K"}
GROUP = 64
TARGET = 0.8  # of the best of the others


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default="shipped", help="a folder [default: the model that ships]")
    made.add_argument(
        "--dtype",
        default="auto",
        help="of our scales and tables: float16 for a model in float32, to have the bytes of the others",
    )
    made.add_argument("--calibration", default="shipped", help="text to calibrate on")
    made.add_argument("--heldout", default="shipped", help="text to measure on")
    made.add_argument("--samples", type=int, default=128)
    made.add_argument("--length", type=int, default=256)
    made.add_argument("--max-tokens", type=int, default=32768)
    made.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2], choices=(4, 3, 2))
    made.add_argument("--iterations", type=int, nargs="+", default=[200], help="of auto-round")
    made.add_argument("--auto-round-python", type=Path)
    made.add_argument("--hqq-python", type=Path)
    made.add_argument("--llm-compressor-python", type=Path)
    made.add_argument("--gptqmodel-python", type=Path)
    made.add_argument("--ggml", type=Path, help="ggml's quantizing code as a shared library")
    made.add_argument("--only", nargs="+", help="rows to make and to show, by name [default: all]")
    made.add_argument("--amp", action="store_true", help="auto-round's products in bfloat16, its default")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--work", type=Path, required=True, help="folder for rows and results")
    asked = made.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    asked.work = asked.work.absolute()
    for name in ("model", "calibration", "heldout"):  # each run has a working folder of its own
        given = getattr(asked, name)
        setattr(asked, name, str(Path(given).absolute()) if Path(given).exists() else given)
    rows_named = (*OURS, like(asked), *tools(asked))
    if unknown := set(asked.only or ()) - set(rows_named):
        made.error(f"--only: no row is called {', '.join(sorted(unknown))}; there are: {'; '.join(rows_named)}")
    model = compress.plan(recipe_of(asked, 4)).source.fetch(print)
    rows = asked.work / "rows.json"
    tokens = load_tokens(recipe_of(asked, 4).calibration, load_tokenizer(model))
    rows.write_text(json.dumps([row.tolist() for row in tokens.rows]))
    print(f"commit {commit()}; {machine()}; {len(tokens.rows)} rows of {asked.length} tokens")
    print("| bits | tool | bits per weight | perplexity | KL | our KL / its | CPU s | peak MB |")
    print("|--:|---|--:|--:|--:|--:|--:|--:|")
    for bits in asked.bits:
        names = [name for name in rows_named if asked.only is None or name in asked.only]
        found = {name: result_of(asked, name, bits, model, rows) for name in names}
        ours = found.get("compress")
        for name, figures in found.items():
            ratio = "" if ours is None or name.startswith("compress") else f"{ours['kl'] / figures['kl']:.2f}"
            print(
                f"| {bits} | {name} | {figures['bits']:.2f} | {figures['perplexity']:.2f} | {figures['kl']:.5f} | {ratio} "
                f"| {figures['cpu_s']:.0f} | {figures['peak'] / 1e6:.0f} |",
                flush=True,
            )
        others = [figures["kl"] for name, figures in found.items() if not name.startswith("compress")]
        if others and ours is not None:
            worst = ours["kl"] / min(others)
            said = "met" if worst <= TARGET else "not met"
            print(f"{bits} bits: {worst:.2f} of the best of the others, {TARGET} wanted: {said}", file=sys.stderr)


def like(asked: argparse.Namespace) -> str:
    """The row of signround from the nearest values, with as many iterations as auto-round: for the time and the memory."""
    return f"compress, signround as auto-round does it, {asked.iterations[0]} iterations"


def tools(asked: argparse.Namespace) -> Iterator[str]:
    if asked.auto_round_python:
        products = ", bfloat16" if asked.amp else ""
        yield from (f"auto-round, {iterations} iterations{products}" for iterations in asked.iterations)
    if asked.hqq_python:
        yield "hqq"
    if asked.ggml:
        yield "K-quants"
    if asked.llm_compressor_python:
        yield "llm-compressor, gptq"
    if asked.gptqmodel_python:
        yield "GPTQModel, gptq"


def result_of(asked: argparse.Namespace, name: str, bits: int, model: Path, rows: Path) -> dict[str, Any]:
    """What a tool made of the model, measured; the same once."""
    label = "".join(c if c.isalnum() else "-" for c in f"{name}-{bits}")
    out, known = asked.work / label, asked.work / f"{label}.json"
    if known.exists():
        return dict(json.loads(known.read_text()))
    run = measure(
        command(asked, name, bits, model, rows, out), asked.work / f"{label}.log", threads_environment(asked.threads)
    )
    settings = Evaluation(data=(asked.heldout,), length=asked.length, max_tokens=asked.max_tokens)
    found = evaluate(str(out), reference=str(model), settings=settings)
    figures = {
        "bits": bits_of(name, bits, run.output, out),
        "perplexity": found["model"]["perplexity"],
        "kl": found["fidelity"]["kl_mean"],
        "cpu_s": run.cpu_s,
        "peak": run.peak_resident_bytes,
    }
    known.write_text(json.dumps(figures))
    return figures


def command(asked: argparse.Namespace, name: str, bits: int, model: Path, rows: Path, out: Path) -> list[str | Path]:
    peers = HERE / "peers"
    to: list[str | Path] = ["--model", model, "--rows", rows, "--out", out]
    grid: list[str | Path] = ["--bits", str(bits), "--group-size", str(GROUP)]
    if name.startswith("compress"):
        file = asked.work / f"recipe-{OURS.get(name, 'like')}-{bits}.yaml"
        file.write_text(recipe_of(asked, bits, OURS.get(name)).to_yaml())
        return [sys.executable, peers / "compress_cli.py", "run", "--quiet", "--recipe", file, "--out", out]
    if name.startswith("auto-round"):
        iterations = name.split()[1]
        script = peers / "auto_round_rounding.py"
        amp = ["--amp"] if asked.amp else []
        return [asked.auto_round_python.absolute(), script, *to, *grid, "--iterations", iterations, *amp]
    if name == "hqq":
        return [asked.hqq_python.absolute(), peers / "hqq_rounding.py", *to, *grid]
    if name == "K-quants":
        script, library = peers / "ggml_rounding.py", asked.ggml.absolute()
        return [sys.executable, script, *to, "--kind", KINDS[bits], "--library", library]
    if name.startswith("llm-compressor"):
        return [asked.llm_compressor_python.absolute(), peers / "llm_compressor_gptq.py", *to, *grid, "--dense"]
    return [asked.gptqmodel_python.absolute(), peers / "gptqmodel_gptq.py", *to, *grid]


def bits_of(name: str, bits: int, output: Path, out: Path) -> float:
    """Bits per weight of the linears: codes, and what each tool stores beside them for a group."""
    if name.startswith("compress"):
        return float(json.loads((out / "compress_report.json").read_text())["bits_per_weight"])
    if name == "K-quants":
        tagged = [x for x in output.read_text(errors="replace").splitlines() if x.startswith("SETTINGS ")]
        return float(json.loads(tagged[-1].removeprefix("SETTINGS "))["bits_per_weight"])
    zero_and_scale = 32 if name == "hqq" else 16
    return bits + zero_and_scale / GROUP


def recipe_of(asked: argparse.Namespace, bits: int, name: str | None = "best") -> Recipe:
    """The recipe that ships, or (None) that of `like`, on this model and these texts, without an evaluation of its own."""
    content = Recipe.load(RECIPES / f"{name or 'signround'}-{bits}bit.yaml").to_dict()
    if name is None:
        settings = {"bits": bits, "group_size": GROUP, "signed_scales": True, "start": "rtn", "half": True}
        content["steps"] = [{"signround": {**settings, "iterations": asked.iterations[0]}}]
    content |= {
        "model": {"path": asked.model, "dtype": asked.dtype},
        "calibration": {
            "data": asked.calibration, "samples": asked.samples, "length": asked.length, "batch_size": 16,
        },
        "evaluation": False,
    }  # fmt: skip
    return Recipe.from_dict(content)


if __name__ == "__main__":
    main()
