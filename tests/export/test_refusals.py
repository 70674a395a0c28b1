"""What a format cannot hold is refused before anything is written, with the layer, the reason and the formats that can."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import compress
from compress.errors import CheckpointError, RecipeError
from compress.export.awq import AWQ
from compress.export.run import open_model
from tests.checkpoint.folders import quantize_folder
from tests.export.conftest import Made
from tests.runs import recipe_for
from tests.test_plugin import STEPS
from tests.test_plugin import package as package
from tests.tiny_models import save_tiny

Make = Callable[[str], Made]


def refused(folder: Path, format_: str, out: Path) -> str:
    with pytest.raises(RecipeError) as caught:
        compress.export(folder, format_, out)
    assert not out.exists()
    return str(caught.value)


def three_in_v(name: str) -> int:
    return 3 if "v_proj" in name else 4


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_tiny("llama", tmp_path / "source", tokenizer=False)


@pytest.mark.parametrize(
    ("format_", "how", "said", "others"),
    [
        ("gptq", {"bits": 5}, "it has 5 bits, and GPTQ holds 2, 3, 4, 8", "compressed-tensors, dense"),
        ("awq", {"bits": 8}, "it has 8 bits, and AWQ holds 4", "compressed-tensors, gptq, dense"),
        ("awq", {"bits": three_in_v}, "v_proj: awq cannot hold it (and 2 more layers)", "compressed-tensors, gptq, dense"),
        ("compressed-tensors", {"bits": three_in_v, "symmetric": False}, "several", "gptq, dense"),
    ],
)  # fmt: skip
def test_bits_and_mixtures(source: Path, tmp_path: Path, format_: str, how: dict, said: str, others: str):
    folder = quantize_folder(source, tmp_path / "q", **how, own=True).path
    message = refused(folder, format_, tmp_path / "out")
    assert said in message
    assert message.startswith(f"{folder}: model.layers.0.")
    assert f"formats that can hold this model: {others}" in message


def test_group_sizes_in_awq(tmp_path: Path):
    """down_proj has 128 inputs, the others 64: whole rows of 64 are groups of 64, but not those of 128."""
    source = save_tiny("llama", tmp_path / "source", tokenizer=False)
    first = quantize_folder(source, tmp_path / "rows", group_size=-1)
    compress.export(first.path, "awq", tmp_path / "rows-awq")  # the same for all
    model = open_model(str(first.path))
    name = "model.layers.1.mlp.down_proj"
    changed = replace(model, specs={**model.specs, name: replace(model.specs[name], group_size=32)})
    assert AWQ().obstacles(changed) == {name: "it has groups of 32, and AWQ has one group size for all, -1 for most"}


@pytest.mark.parametrize("format_", ["gptq", "awq", "compressed-tensors"])
def test_a_compressed_table(source: Path, tmp_path: Path, format_: str):
    folder = quantize_folder(source, tmp_path / "q", own=True, select=lambda n, s: True).path
    message = refused(folder, format_, tmp_path / "out")
    assert "model.embed_tokens: " in message
    assert message.endswith("formats that can hold this model: dense")
    report = compress.export(folder, "dense", tmp_path / "dense")
    assert report["read_back"]["layers"] == 23
    ids = torch.arange(20)[None]
    assert torch.equal(compress.load(tmp_path / "dense")(ids).logits, compress.load(folder)(ids).logits)


@pytest.mark.parametrize("format_", ["awq", "compressed-tensors"])
def test_a_conv1d(made: Make, tmp_path: Path, format_: str):
    message = refused(made("gpt2").path, format_, tmp_path / "out")
    assert "transformer.h.0.attn.c_attn: " in message
    assert "Conv1D" in message
    assert message.endswith("gptq, dense")


def test_shapes_that_do_not_fill_words(tmp_path: Path):
    source = save_tiny(
        "llama", tmp_path / "source", tokenizer=False, hidden_size=72, head_dim=18, intermediate_size=144
    )
    for bits, said in (
        (3, "down_proj: .*in_features=144 is not divisible by 32"),
        (2, "in_features=(72|144) is not divisible by 16|out_features=72 is not divisible by 16"),
    ):
        folder = quantize_folder(source, tmp_path / f"q{bits}", bits=bits, group_size=8).path
        assert re.search(said, refused(folder, "gptq", tmp_path / "out"))
    assert compress.export(quantize_folder(source, tmp_path / "q4", group_size=8).path, "gptq", tmp_path / "four")


def test_other_representations_can_be_dense(package: None, tmp_path: Path, text: Path):
    """float8, which another package adds: dense holds it by its `dense()`, formats of integers say what it is."""
    save_tiny("llama_gqa_tied", tmp_path / "model", dtype=torch.bfloat16)
    compress.run(recipe_for(tmp_path / "model", STEPS, text), tmp_path / "float8")
    message = refused(tmp_path / "float8", "gptq", tmp_path / "out")
    assert (
        "it is stored as float8_rows, and GPTQ holds integer codes; formats that can hold this model: dense" in message
    )
    compress.export(tmp_path / "float8", "dense", tmp_path / "dense")
    ids = torch.arange(20)[None]
    assert torch.equal(compress.load(tmp_path / "dense")(ids).logits, compress.load(tmp_path / "float8")(ids).logits)


def test_nothing_compressed_unknown_formats_and_missing_folders(source: Path, tmp_path: Path):
    assert "nothing in it is compressed" in refused(source, "gptq", tmp_path / "out")
    folder = quantize_folder(source, tmp_path / "q").path
    assert "did you mean 'awq'?" in refused(folder, "aqw", tmp_path / "out")
    assert "choose one of compressed-tensors, gptq, awq, dense" in refused(folder, "onnx", tmp_path / "out")
    with pytest.raises(CheckpointError, match="no such"):
        compress.export(tmp_path / "nowhere", "gptq", tmp_path / "out")


def test_a_damaged_source_leaves_nothing(made: Make, tmp_path: Path):
    folder = tmp_path / "cut"
    folder.mkdir()
    for file in made("llama4").path.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-10])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated"):
        compress.export(folder, "gptq", tmp_path / "out")
    (folder / "model.safetensors").write_bytes(data)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 16
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError):
        compress.export(folder, "gptq", tmp_path / "out")
    assert not (tmp_path / "out").exists()
