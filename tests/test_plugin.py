"""A method that another package brings goes the whole way: recipe, plan, run, load."""

from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.errors import CheckpointError, RecipeError
from tests.runs import recipe_for
from tests.tiny_models import save_tiny

ENTRY_POINTS = """[compress.methods]
float8 = compress_halves.method:Float8

[compress.representations]
float8_rows = compress_halves.spec:Float8Spec
"""
STEPS = [{"float8": {"largest": 400.0}, "skip": "*.o_proj"}]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The outside package, installed for one test as pip would leave it."""
    site = tmp_path / "site-packages"
    shutil.copytree(Path(__file__).parent / "plugin" / "compress_halves", site / "compress_halves")
    info = site / "compress_halves-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: compress-halves\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(str(site))
    importlib.invalidate_caches()
    yield
    for name in [name for name in sys.modules if name.startswith("compress_halves")]:
        del sys.modules[name]


def test_recipe_plan_run_load(package: Any, tmp_path: Path, text: Path) -> None:
    import compress
    from compress.methods import find, names

    assert "float8" in names() and find("float8").summary.startswith("8-bit floats")
    save_tiny("llama_gqa_tied", tmp_path / "model")
    recipe = recipe_for(tmp_path / "model", STEPS, text)
    planned = compress.plan(recipe)
    assert planned.format == "compress" and "float8_rows" in planned.format_reason
    assert not planned.needs_data
    result = compress.run(recipe, tmp_path / "out")
    assert result.report["evaluation"]["fidelity"]["kl_mean"] < 0.05
    assert 8.0 < result.plan.bits_per_weight < 9.0
    model = compress.load(tmp_path / "out")
    module = model.get_submodule("model.layers.0.mlp.down_proj")
    assert type(module).__name__ == "Float8Linear" and module.weight_float8.dtype == torch.float8_e4m3fn
    assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2).shape == (1, 5)
    model.save_pretrained(tmp_path / "copy")
    copy = compress.load(tmp_path / "copy")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.view(torch.uint8), copy.state_dict()[name].view(torch.uint8))


def test_a_later_step_compresses_what_the_plugin_made(package: Any, tmp_path: Path, text: Path) -> None:
    import compress

    save_tiny("llama", tmp_path / "model")
    steps = [*STEPS, {"gptq": {"bits": 4, "group_size": 32}}]
    result = compress.run(recipe_for(tmp_path / "model", steps, text), tmp_path / "out")
    assert result.plan.format == "compressed-tensors"
    assert {layer.method for layer in result.plan.layers.values()} == {"gptq", "float8+gptq"}


def test_its_settings_are_checked_like_ours(package: Any, tmp_path: Path, text: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    with pytest.raises(RecipeError, match="largest"):
        recipe_for(tmp_path / "model", [{"float8": {"largst": 1.0}}], text)


def test_without_the_package_the_result_names_what_is_missing(tmp_path: Path, text: Path) -> None:
    from compress.checkpoint.description import modules_of

    config = {
        "quantization_config": {
            "quant_method": "compress",
            "format_version": 1,
            "modules": [
                {"representation": "float8_rows", "in_features": 4, "out_features": 4, "names": ["model.layers.0.a"]}
            ],
        }
    }
    with pytest.raises(CheckpointError, match=r"float8_rows.*install the package"):
        modules_of(config)
