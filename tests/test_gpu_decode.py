"""scripts/bench_decode_gpu.py without a GPU: its steps choose the tokens of `decode`, its report holds what it says."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
SIZES = ["--prompt", "5", "--new", "6"]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("bench_decode_gpu")


def test_steps_choose_the_tokens_that_decode_chooses(bench: ModuleType):
    from transformers import AutoConfig

    from compress.runtime.decode import chooser, decode

    config = AutoConfig.for_model("llama", **bench.SHAPES["tiny"], max_position_embeddings=32)
    cell = bench.measured(config, "fp32", torch.device("cpu"), 5, 20)
    torch.manual_seed(0)  # the same model
    model = bench.built(config, "fp32")
    prompt = torch.randint(config.vocab_size, (1, 5), generator=torch.Generator().manual_seed(1))
    assert cell["tokens"] == decode(model, prompt, 21, chooser(model, 0))[0, 5:].tolist()
    assert len(set(cell["tokens"])) > 2  # it is no model that always says the same


def test_the_report_holds_all_ways(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["", "--device", "cpu", "--model", "tiny", *SIZES, "--json", str(file)])
    assert bench.main() == 0
    report = json.loads(file.read_text())
    assert [way["way"] for way in report["ways"]] == ["bf16", "w4"]
    dense, packed = (way["weight_bytes"] for way in report["ways"])
    assert packed < 0.6 * dense
    assert "on a GPU: not looked at" in capsys.readouterr().out


def test_verdicts(bench: ModuleType):
    def cell(way: str, rate: float, same: bool = True) -> dict[str, object]:
        return {"way": way, "tokens_per_s": rate, "graph": True, "same_tokens_as_without": same}

    assert bench.verdict("8b", [cell("bf16", 100), cell("w4", 260)]).startswith("met: w4 decodes 2.60 x bf16")
    assert bench.verdict("8b", [cell("bf16", 100), cell("w4", 240)]).startswith("missed")
    assert bench.verdict("8b", [cell("bf16", 100), cell("w4", 260, same=False)]).startswith("failed: w4")
    assert "not looked at" in bench.verdict("1b", [cell("bf16", 100), cell("w4", 260)])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "argv", [""])
    assert bench.main() == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "no NVIDIA GPU" in said
