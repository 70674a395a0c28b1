"""The benchmark scripts work, at sizes that say nothing about speed; what they say about memory is held to a bound."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
SMALL = ["--hidden", "128", "--mlp", "256", "--heads", "4", "--kv-heads", "2", "--vocabulary", "512"]
PER_BLOCK = 2**20  # bytes of anonymous memory that a block may leave behind; its float32 weights here are 0.6 MiB
NOISE = 16 * 2**20  # by which two equal runs may differ


def script(*arguments: object) -> str:
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=SCRIPTS)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "name",
    sorted(path.name for pattern in ("bench_*.py", "table_*.py", "random_llama.py") for path in SCRIPTS.glob(pattern)),
)
def test_scripts_say_what_they_do(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run as a program is, in this process, where torch is imported already."""
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    monkeypatch.syspath_prepend(SCRIPTS)
    before = set(sys.modules)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPTS / name), run_name="__main__")
    for module in set(sys.modules) - before:  # what scripts import from each other is theirs alone
        if str(getattr(sys.modules[module], "__file__", "")).startswith(str(SCRIPTS)):
            del sys.modules[module]
    assert ended.value.code in (0, None)
    assert "usage" in capsys.readouterr().out


def test_a_random_llama_is_the_same_in_any_shards(tmp_path: Path):
    script(SCRIPTS / "random_llama.py", tmp_path / "one", *SMALL, "--blocks", 2)
    script(SCRIPTS / "random_llama.py", tmp_path / "many", *SMALL, "--blocks", 3, "--shard-mb", 1)
    one = load_file(tmp_path / "one" / "model.safetensors")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())["weight_map"]
    many = {
        name: tensor for file in set(index.values()) for name, tensor in load_file(tmp_path / "many" / file).items()
    }
    assert len(set(index.values())) > 1
    assert index.keys() == many.keys()
    assert one.keys() == {name for name in many if ".layers.2." not in name}  # and in a deeper model
    assert all(torch.equal(tensor, many[name]) for name, tensor in one.items())


def test_a_random_llama_loads(tmp_path: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    script(SCRIPTS / "random_llama.py", tmp_path, *SMALL, "--blocks", 1, "--tied")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    ids = tokenizer("It was a dark night.", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == "It was a dark night."
    assert torch.isfinite(model(ids).logits).all()
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.float().std().item() == pytest.approx(0.02, rel=0.02)  # 32768 draws: 0.4 %


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is sampled from /proc")
def test_memory_does_not_grow_with_depth(tmp_path: Path):
    shallow, deep = 4, 24
    sizes = ["--hidden", 128, "--mlp", 256, "--samples", 4, "--length", 64, "--threads", 1]
    script(SCRIPTS / "bench_memory.py", "--depth", "--depths", shallow, deep, *sizes, "--json", tmp_path / "found.json")
    few, many = (run["peak_anonymous_bytes"] for run in json.loads((tmp_path / "found.json").read_text())["depth"])
    assert many - few < (deep - shallow) * PER_BLOCK / 2 + NOISE
