"""Each export format under the loaders of others: the largest difference of a logit to ours, weights bit for bit.

Six models are compressed and exported to every format that holds them. Each folder is loaded by those who read its
format, in bfloat16, and its logits are compared with those of `compress.load`. GPTQModel is also asked for the weights as it
decodes them. What the export itself changed is seen with our loader alone: source and export, in float32.

    python -m venv gptqm && gptqm/bin/pip install gptqmodel==7.6.0 torch==2.13.0 optimum==2.3.0
    python scripts/bench_export.py --gptqmodel-python gptqm/bin/python --stories ../shared/models/stories3M

Without --gptqmodel-python only transformers is asked; without --stories that model is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import commit, machine
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package beside this script, installed or not

from random_llama import Shape, random_llama

import compress
from compress.errors import RecipeError
from compress.modules.quantized import QuantizedLinear
from compress.recipe import Recipe

HERE = Path(__file__).resolve().parent
FORMATS = ("gptq", "awq", "compressed-tensors", "dense")
DTYPE = "bfloat16"
ROWS, LENGTH = 2, 64


@dataclass(frozen=True)
class Loader:
    """Somebody else's loader: its interpreter, the script that runs in it, what it reads, and GPTQModel's kernel."""

    name: str
    python: Path
    script: str
    formats: tuple[str, ...]
    backend: str = ""


@dataclass
class Cell:
    """One folder under one loader."""

    difference: float | None = None
    largest: float = 0.0  # logit
    equal_layers: int | None = None
    layers: int = 0
    said: str = ""
    kernels: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.difference is None:
            return self.said
        weights = "" if self.equal_layers is None else f", weights {self.equal_layers}/{self.layers}"
        return f"{self.difference:.3g}{weights}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--gptqmodel-python", type=Path, help="interpreter of an environment with gptqmodel and optimum"
    )
    parser.add_argument("--stories", type=Path, help="folder of stories3M, which does not come with the repository")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        table, versions = bench(Path(work), options.gptqmodel_python, options.stories)
    for line in shown(table):
        print(line)
    print(f"\n{machine()}; commit {commit()}\n" + "\n".join(f"{name}: {found}" for name, found in versions.items()))
    if options.json:
        cells = {m: {f"{f}, {loader}": vars(c) for (f, loader), c in row.items()} for m, row in table.items()}
        options.json.write_text(json.dumps({"cells": cells, "versions": versions}, indent=2) + "\n")


def bench(
    work: Path, gptqmodel: Path | None, stories: Path | None
) -> tuple[dict[str, dict[tuple[str, str], Cell]], dict[str, Any]]:
    loaders = [Loader("transformers", Path(sys.executable), "transformers_logits.py", ("compressed-tensors", "dense"))]
    if gptqmodel is not None:
        loaders.append(Loader("GPTQModel, torch kernel", gptqmodel, "gptqmodel_logits.py", ("gptq", "awq"), "TORCH"))
        loaders.append(Loader("GPTQModel, its choice", gptqmodel, "gptqmodel_logits.py", ("gptq", "awq"), "AUTO"))
        loaders.append(Loader("transformers + optimum", gptqmodel, "transformers_logits.py", ("gptq", "awq")))
    sources = dict(models(work, stories))
    table: dict[str, dict[tuple[str, str], Cell]] = {name: {} for name in sources}
    for name, source in sources.items():
        for format_ in FORMATS:
            held = export(source, format_)
            said = "" if held else "not held"
            table[name][format_, "ours"] = changed(source, format_) if held else Cell(said=said)
            for loader in loaders:
                if format_ in loader.formats:
                    table[name][format_, loader.name] = Cell(said=said)
    versions = {}
    for loader in loaders:
        versions[loader.name] = ask(work, loader, sources, table)
    return table, versions


def models(work: Path, stories: Path | None) -> Iterable[tuple[str, Path]]:
    """Name and folder of each model, compressed."""
    four = {"bits": 4, "group_size": 64}
    yield "shipped", run(work, "shipped", "shipped", four)
    if stories is not None:
        yield "stories3M (float32)", run(work, "stories3M", str(stories), four)
    random_llama(work / "gqa", Shape(hidden=256, mlp=640, blocks=4, heads=8, kv_heads=2, vocabulary=2048, tied=True))
    yield "random, GQA, tied head", run(work, "gqa-4", str(work / "gqa"), four)
    yield "Qwen2, biases", run(work, "qwen2-4", str(qwen2(work / "qwen2", work / "gqa")), four)
    yield "shipped, 3 bits", run(work, "three", "shipped", {**four, "bits": 3})
    yield "shipped, asymmetric", run(work, "asymmetric", "shipped", {**four, "symmetric": False})


def qwen2(folder: Path, tokenizer: Path) -> Path:
    """A random Qwen2 in bfloat16 with biases that are not zero."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen2", vocab_size=2048, hidden_size=256, intermediate_size=640, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def run(work: Path, name: str, model: str, settings: dict[str, Any]) -> Path:
    recipe = Recipe.from_dict(
        {
            "model": model,
            "calibration": {"data": "shipped", "samples": 16, "length": 128},
            "steps": [{"gptq": settings}],
            "evaluation": False,
        }
    )
    compress.run(recipe, work / f"c-{name}")
    return work / f"c-{name}"


def export(source: Path, format_: str) -> bool:
    """Whether the format holds the model."""
    try:
        compress.export(source, format_)
    except RecipeError:
        return False
    return True


def ask(
    work: Path, loader: Loader, sources: dict[str, Path], table: dict[str, dict[tuple[str, str], Cell]]
) -> dict[str, str]:
    """Let a loader load all it reads, in one process; fill its cells. Returns: versions."""
    jobs: list[dict[str, Any]] = []
    cells: list[Cell] = []
    for name, source in sources.items():
        for (format_, loader_name), cell in table[name].items():
            if loader_name == loader.name and not cell.said:
                job: dict[str, Any] = {
                    "folder": f"{source}-{format_}",
                    "rows": rows(source),
                    "out": f"{source}-{format_}-{loader.script}.safetensors",
                    "dtype": DTYPE,
                }
                if loader.backend:
                    job["backend"] = f"{format_.upper()}_TORCH" if loader.backend == "TORCH" else loader.backend
                elif format_ == "compressed-tensors":
                    job["dequantize"] = "asymmetric" in name  # without it stock transformers refuses the zero points
                jobs.append(job)
                cells.append(cell)
    (work / "jobs.json").write_text(json.dumps(jobs))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [loader.python, HERE / "peers" / loader.script, "--jobs", work / "jobs.json"],
        cwd=work, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    answers = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    if len(answers) != len(jobs):
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
    for job, answer, cell in zip(jobs, answers, cells, strict=True):
        if "error" in answer:
            cell.said = answer["error"]
        else:
            cell.kernels = tuple(answer["kernels"])
            compare(Path(job["folder"]), Path(job["out"]), cell)
    return json.loads(next(line[9:] for line in done.stdout.splitlines() if line.startswith("VERSIONS ")))


def rows(source: Path) -> list[list[int]]:
    vocabulary = json.loads((source / "config.json").read_text())["vocab_size"]
    return torch.randint(0, vocabulary, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0)).tolist()


def changed(source: Path, format_: str) -> Cell:
    """The export beside the source, both under our loader, in float32."""
    left, right = (
        logits(compress.load(folder, dtype="float32"), source) for folder in (source, Path(f"{source}-{format_}"))
    )
    return Cell((left - right).abs().max().item(), left.abs().max().item())


@torch.no_grad()
def logits(model: Any, folder: Path) -> torch.Tensor:
    return model(torch.tensor(rows(folder))).logits.float()


def compare(folder: Path, file: Path, cell: Cell) -> None:
    """Their logits and weights beside ours."""
    model = compress.load(folder, dtype=DTYPE)
    ours = logits(model, folder)
    found = load_file(file)
    cell.difference = (found["logits"] - ours).abs().max().item()
    cell.largest = ours.abs().max().item()
    weights = {name.removeprefix("weight."): weight for name, weight in found.items() if name != "logits"}
    if weights:
        modules = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
        cell.layers = len(modules)
        cell.equal_layers = sum(torch.equal(weights[n], m.dense()) for n, m in modules.items() if n in weights)


def shown(table: dict[str, dict[tuple[str, str], Cell]]) -> Iterable[str]:
    """As a table in Markdown."""
    columns = list(dict.fromkeys(key for row in table.values() for key in row))
    yield f"| model | largest logit | {' | '.join(f'{format_}: {loader}' for format_, loader in columns)} |"
    yield "|" + "---|" * (len(columns) + 2)
    for name, row in table.items():
        largest = max((cell.largest for cell in row.values()), default=0.0)
        yield f"| {name} | {largest:.3g} | {' | '.join(str(row.get(column, '')) for column in columns)} |"


if __name__ == "__main__":
    main()
