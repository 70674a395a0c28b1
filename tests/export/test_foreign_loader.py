"""GPTQModel's own loader reads what we export, and decodes the same weights; transformers does so with compressed-tensors.

GPTQModel lives in an environment of its own: its interpreter is named by COMPRESS_GPTQMODEL_PYTHON.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import compress
from compress.modules.quantized import QuantizedLinear
from tests.export.conftest import IDS, Made, logits

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "peers" / "gptqmodel_logits.py"
PYTHON = "COMPRESS_GPTQMODEL_PYTHON"
WIDTHS = ("llama2", "llama3", "llama8", "asymmetric3", "asymmetric2", "asymmetric8", "mixed")  # that AWQ does not hold
PLAIN = ("llama4", "asymmetric4", "rows", "skipped", "head", "qwen3", "gemma2", "qwen3_moe_all")
# Logits are equal bit for bit; where there are biases, GPTQModel rounds before it adds them.
EXACT = [*(("gptq", name) for name in (*PLAIN, *WIDTHS)), *(("awq", name) for name in PLAIN)]
BIASED = ("biases_tied", "head_untied", "qwen2", "opt")
ROUNDED = [("gptq", name) for name in (*BIASED, "gpt2", "gpt2_no_prefix")] + [("awq", name) for name in BIASED]
UNREAD = [("gptq", "mixtral"), ("gptq", "phi3")]  # which our warning says; it refuses them itself
Answers = dict[tuple[str, str], tuple[dict[str, Any], Path]]


@pytest.fixture(scope="module")
def answers(made: Callable[[str], Made], tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """All folders in one process: importing GPTQModel takes longer than everything else."""
    python = os.environ.get(PYTHON)
    if not python:
        pytest.skip(f"needs an interpreter with gptqmodel in {PYTHON}")
    work = tmp_path_factory.mktemp("gptqmodel")
    pairs = [*EXACT, *ROUNDED, *UNREAD]
    jobs = [
        {
            "folder": str(made(name).export(format_)),
            "rows": IDS.tolist(),
            "out": str(work / f"{format_}-{name}.safetensors"),
            "dtype": "bfloat16",
            "backend": f"{format_.upper()}_TORCH",
        }
        for format_, name in pairs
    ]
    (work / "jobs.json").write_text(json.dumps(jobs))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run(
        [python, str(SCRIPT), "--jobs", str(work / "jobs.json")],
        cwd=work, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    said = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    assert len(said) == len(jobs), done.stdout[-2000:] + done.stderr[-2000:]
    return {pair: (answer, Path(job["out"])) for pair, answer, job in zip(pairs, said, jobs, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize(("format_", "name"), [*EXACT, *ROUNDED])
def test_gptqmodel_decodes_the_same_weights_and_computes_the_same_logits(
    answers: Answers, made: Callable[[str], Made], format_: str, name: str
):
    answer, file = answers[format_, name]
    assert "error" not in answer, answer["error"]
    found = load_file(file)
    ours = compress.load(made(name).path)
    modules = {n: module for n, module in ours.named_modules() if isinstance(module, QuantizedLinear)}
    assert {key.removeprefix("weight.") for key in found} - {"logits"} == modules.keys()
    for layer, module in modules.items():
        assert torch.equal(found[f"weight.{layer}"], module.dense()), layer
    expected = logits(made(name).path).float()
    if (format_, name) in EXACT:
        assert torch.equal(found["logits"], expected)
    else:  # a few roundings to bfloat16, of 8 bits, on the way through three blocks
        assert (found["logits"] - expected).abs().max() <= 2**-6 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize(("format_", "name"), UNREAD)
def test_gptqmodel_does_not_load_what_the_warning_names(
    answers: Answers, made: Callable[[str], Made], format_: str, name: str, tmp_path: Path
):
    assert "Missing required quantized weights" in answers[format_, name][0]["error"]
    warnings = compress.export(made(name).path, format_, tmp_path / "again")["warnings"]
    assert any("does not load this family" in warning for warning in warnings)


@pytest.mark.parametrize("name", ["llama4", "llama3", "rows", "head_untied", "qwen2", "mixtral"])
def test_transformers_loads_compressed_tensors(stock, made: Callable[[str], Made], name: str):
    source = made(name)
    job = {"do": "compare", "twin": source.folder.twin, "dequantize": False}
    again = source.root / f"{name}-again"  # from GPTQ, so that nothing is copied as it was
    if not again.exists():
        compress.export(source.export("gptq"), "compressed-tensors", again)
    for folder in (source.export("compressed-tensors"), again):
        (answer,) = stock({**job, "folder": folder})
        assert answer == {"error": None, "logits": 0.0, "weights": []}


def test_transformers_loads_dense(stock, made: Callable[[str], Made]):
    for name in ("head_untied", "gpt2", "mixtral"):
        job = {
            "do": "compare",
            "folder": made(name).export("dense"),
            "twin": made(name).folder.twin,
            "dequantize": False,
        }
        (answer,) = stock(job)
        assert answer == {"error": None, "logits": 0.0, "weights": []}


@pytest.mark.parametrize(("format_", "wanted"), [("gptq", "optimum"), ("awq", "gptqmodel")])
def test_transformers_alone_does_not_load_gptq_or_awq(stock, made: Callable[[str], Made], format_: str, wanted: str):
    job = {"do": "load", "folder": made("llama4").export(format_), "class": "AutoModelForCausalLM"}
    (answer,) = stock(job)
    assert f"pip install {wanted}" in answer["error"]
