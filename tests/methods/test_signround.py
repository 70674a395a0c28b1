"""signround: what it learns, from where, and what a run makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compress.errors import RecipeError
from compress.linalg.grid import Grid
from compress.linalg.learned_rounding import Start
from compress.methods.block_learning import LearnedLinear, batches, squared_error
from compress.pipeline.run import run
from tests.runs import recipe_for


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same(a: Path, b: Path) -> bool:
    first, second = tensors(a), tensors(b)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def figures(result: Any) -> list[dict[str, float]]:
    return [layer["figures"] for layer in result.report["layers"]]


@pytest.mark.parametrize("start", ["rtn", "gptq"])
def test_no_iterations_are_the_start(start: str, tiny, text, tmp_path):
    grid = {"bits": 3, "group_size": 32, "clip": "mse", "signed_scales": True}
    run(recipe_for(tiny("llama"), [{start: grid}], text), tmp_path / "start")
    learned = run(
        recipe_for(tiny("llama"), [{"signround": {**grid, "start": start, "iterations": 0}}], text), tmp_path / "a"
    )
    assert same(tmp_path / "start", tmp_path / "a")
    assert all(found["moved"] == 0 and found["block_error"] == found["block_error_start"] for found in figures(learned))


@pytest.mark.parametrize(
    "settings",
    [{}, {"parametrization": "adaround", "lr": 0.05}, {"learn_ranges": False}, {"trim": 0.01}, {"half": True}],
)
def test_a_block_is_closer_to_the_original_than_its_start(settings: dict[str, Any], tiny, text, tmp_path):
    step = {"signround": {"bits": 2, "group_size": 32, "start": "rtn", "iterations": 12, "batch_rows": 4, **settings}}
    found = figures(run(recipe_for(tiny("llama"), [step], text), tmp_path / "out"))
    assert all(f["block_error"] <= f["block_error_start"] for f in found)
    assert any(f["block_error"] < 0.97 * f["block_error_start"] and f["moved"] > 0 for f in found)
    if settings.get("parametrization") == "adaround":
        assert all(0 <= f["undecided"] <= 1 for f in found)


def test_scales_stay_where_ranges_are_not_learned(tiny, text, tmp_path):
    step = {"bits": 2, "group_size": 32, "iterations": 4, "batch_rows": 4, "start": "rtn"}
    for name, settings in {"fixed": {"learn_ranges": False}, "start": {"iterations": 0}, "moved": {}}.items():
        run(recipe_for(tiny("llama"), [{"signround": {**step, **settings}}], text), tmp_path / name)
    scales = {
        name: {key: value for key, value in tensors(tmp_path / name).items() if key.endswith("weight_scale")}
        for name in ("fixed", "start", "moved")
    }
    assert all(torch.equal(scales["fixed"][key], scales["start"][key]) for key in scales["start"])
    assert not all(torch.equal(scales["moved"][key], scales["start"][key]) for key in scales["start"])


def test_products_in_bfloat16_have_nearly_the_same_output_and_gradients():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 32, generator=generator)
    start = Start(weight, Grid(4, weight.unflatten(1, (2, 16)).abs().amax(-1) / 8, None))
    x, wanted = torch.randn(3, 5, 32, generator=generator), torch.randn(3, 5, 24, generator=generator)
    found = {}
    for half in (False, True):
        module = LearnedLinear(start, torch.ones(24))
        module.in_half = half
        entering = x.clone().requires_grad_()
        output = module(entering)
        squared_error(output, wanted).backward()
        assert output.dtype == torch.float32
        found[half] = (output.detach(), entering.grad, module.offset.grad, module.factor.grad)
    for full, other in zip(found[False], found[True], strict=True):
        assert full is not None and other is not None
        assert 0 < float((full - other).norm() / full.norm()) < 0.01


def test_batches_hold_rows_of_one_length_and_visit_all():
    lengths = [4, 7, 4, 4, 7, 4, 4]
    drawn = batches(lengths, 2, torch.Generator().manual_seed(0))
    seen: set[int] = set()
    for _ in range(40):
        rows = next(drawn)
        assert len({lengths[row] for row in rows}) == 1 and 1 <= len(rows) <= 2
        seen |= set(rows)
    assert seen == set(range(7))


def test_the_largest_errors_can_count_nothing():
    output, target = torch.zeros(1, 10, 10), torch.zeros(1, 10, 10)
    output[0, 0, 0] = 100.0
    assert float(squared_error(output, target)) == 100.0
    assert float(squared_error(output, target, trim=0.01)) == 0.0


def test_settings_that_must_not_differ_end_the_plan(tiny, text, tmp_path):
    step = {"signround": {"bits": 4, "group_size": 32}, "overrides": {"*.down_proj": {"iterations": 5}}}
    with pytest.raises(RecipeError, match="iterations is .* learned together"):
        run(recipe_for(tiny("llama"), [step], text), tmp_path / "out")
    mixed = {"signround": {"bits": 4, "group_size": 32, "iterations": 1}, "overrides": {"*.down_proj": {"bits": 8}}}
    report = run(recipe_for(tiny("llama"), [mixed], text), tmp_path / "mixed").report
    assert {layer["bits"] for layer in report["layers"] if "bits" in layer} <= {4, 8}
