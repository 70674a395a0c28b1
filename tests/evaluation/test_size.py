"""Bytes from the headers are those of the files, and of the model that is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import compress
from compress.checkpoint.source import find_source
from compress.evaluation.size import OTHER, sizes
from tests.runs import recipe_for
from tests.tiny_models import TINY, save_tiny


def loaded_bytes(folder: Path) -> int:
    """Of all parameters; one that is used twice counts once."""
    return sum(p.nbytes for p in compress.load(folder).parameters())


@pytest.mark.parametrize("family", TINY)
def test_memory_is_that_of_the_loaded_model(family: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path / "model")
    found = sizes(find_source(str(tmp_path / "model")))
    assert found["model"]["bytes_in_memory"] == loaded_bytes(tmp_path / "model")
    assert found["model"]["bytes_tensors"] == sum(kind["bytes"] for kind in found["kinds"])
    assert found["reference"] is None


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama_gqa_tied", {"bits": 4, "group_size": 32}),
        ("llama_gqa_tied", {"bits": 3, "group_size": 32, "symmetric": False}),
        ("gpt2", {"bits": 8, "group_size": -1}),
        ("mixtral", {"bits": 4, "group_size": 32}),
        ("opt", {"bits": 2, "group_size": 32}),
    ],
)
def test_sizes_of_a_result_beside_its_original(
    family: str, settings: dict[str, int], text: Path, tmp_path: Path
) -> None:
    source = tmp_path / "model"
    save_tiny(family, source)
    result = compress.run(recipe_for(source, [{"rtn": settings}], text, evaluation=False), tmp_path / "out")
    found = sizes(find_source(str(result.folder)), find_source(str(source)))
    assert found["model"]["bytes_in_memory"] == loaded_bytes(result.folder)
    assert found["reference"]["bytes_in_memory"] == loaded_bytes(source)
    assert found["model"]["bytes_tensors"] == result.report["bytes_total_after"]
    assert found["model"]["bytes_on_disk"] == result.report["bytes_on_disk_all"]
    layers = {row["name"]: row for row in found["layers"]}
    for layer in result.report["layers"]:
        row = layers[layer["name"]]
        assert (row["bytes"], row["bytes_reference"]) == (layer["bytes_after"], layer["bytes_before"])
        assert row["bits_per_weight"] == pytest.approx(layer["bits_per_weight"])
        assert row["block"] == layer["block"]
    for side, total in (("bytes", "model"), ("bytes_reference", "reference")):
        assert sum(kind[side] for kind in found["kinds"]) == found[total]["bytes_tensors"]
        assert all(kind[side] >= 0 for kind in found["kinds"])
    assert found["kinds"][-1]["kind"] == OTHER


def test_another_dtype_in_the_config_is_what_is_loaded(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace("float32", "bfloat16"))
    found = sizes(find_source(str(tmp_path / "model")))["model"]
    assert found["bytes_in_memory"] == found["bytes_tensors"] // 2 == loaded_bytes(tmp_path / "model")
    assert compress.load(tmp_path / "model").dtype == torch.bfloat16
