"""cbq: windows of blocks, what goes on from one to the next, and where it equals signround."""

from __future__ import annotations

import shutil

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from compress.errors import RecipeError
from compress.linalg.outliers import truncated
from compress.methods.block import WindowTask
from compress.methods.block_learning import LearnedLinear, Schedule, _loss
from compress.methods.cbq import CBQConfig, window_error
from compress.pipeline.run import run
from tests.methods.test_signround import figures, same
from tests.runs import recipe_for

LEARN = {"bits": 3, "group_size": 32, "iterations": 4, "batch_rows": 2}


def test_windows_of_one_block_are_signround(tiny, text, tmp_path):
    run(recipe_for(tiny("llama"), [{"signround": LEARN}], text), tmp_path / "a")
    alone = {"window": 1, "overlap": 0, "homologous": False}
    run(recipe_for(tiny("llama"), [{"cbq": {**LEARN, **alone}}], text), tmp_path / "b")
    assert same(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(("window", "overlap"), [(2, 1), (3, 0), (9, 8)])
def test_every_block_is_learned_and_none_is_worse_than_where_it_began(window, overlap, tiny, text, tmp_path):
    step = {"cbq": {**LEARN, "bits": 2, "start": "rtn", "window": window, "overlap": overlap, "iterations": 8}}
    found = figures(run(recipe_for(tiny("llama"), [step], text), tmp_path / "out"))
    assert all(f["block_error"] <= f["block_error_start"] for f in found)
    assert all("start_weight_error" in f for f in found)
    assert sum(f["moved"] > 0 for f in found) > len(found) // 2


def test_outliers_are_cut_before_anything_is_rounded(tiny, text, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny("llama"), model)
    file = model / "model.safetensors"
    weights = load_file(file)
    name = "model.layers.0.self_attn.q_proj.weight"
    weights[name][0, :3] = torch.tensor([9.0, -9.5, 9.2]) * weights[name].float().std()
    save_file(weights, file, {"format": "pt"})
    step = {"bits": 4, "group_size": 32, "clip": "none"}
    learned = {**step, "start": "rtn", "iterations": 0, "truncate": True}
    run(recipe_for(model, [{"cbq": learned}], text), tmp_path / "a")
    cut = {key: truncated(value) if key.endswith("_proj.weight") else value for key, value in weights.items()}
    assert not torch.equal(cut[name], weights[name])
    save_file(cut, file, {"format": "pt"})
    run(recipe_for(model, [{"rtn": step}], text), tmp_path / "b")
    assert same(tmp_path / "a", tmp_path / "b")


def test_the_same_inputs_on_both_sides_count_twice():
    """With x~ = x the homologous loss is twice the single one."""
    torch.manual_seed(0)
    from compress.linalg.grid import GridRule, fit_grid
    from compress.linalg.learned_rounding import Start
    from compress.methods.base import Layer

    weight, x = torch.randn(8, 8), torch.randn(3, 5, 8)
    module = LearnedLinear(Start(weight, fit_grid(weight, 8, GridRule(3))), None)

    class Same:
        lengths = [5, 5, 5]

        def inputs(self, rows, original=False):
            return x[rows]

        def targets(self, rows):
            return x[rows] @ weight.T

    layer = Layer("a", weight, None, CBQConfig(), torch.float32)
    task = WindowTask(
        "block", {"a": layer}, {}, {}, frozenset({"a"}), Same(), module, lambda modules: None, False, print
    )
    loss = lambda a, b: window_error(a, b, 0.0, 0.5)  # noqa: E731
    losses = [
        float(_loss(task, {"a": module}, [0, 2], Schedule(1, 0.1, 0.1, 2, homologous=both), loss).detach())
        for both in (False, True)
    ]
    assert losses[1] == pytest.approx(2 * losses[0])


def test_the_divergence_of_equal_outputs_is_nothing():
    a, b = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    assert float(window_error(a, a, 0.0, 1.0)) == pytest.approx(0, abs=1e-6)
    assert float(window_error(a, b, 0.0, 1.0)) > float(window_error(a, b, 0.0, 0.0))


def test_a_window_that_would_not_move_is_refused():
    with pytest.raises(ValidationError, match="overlap=2 must be less than window=2; use 1 or less"):
        CBQConfig(window=2, overlap=2)


@pytest.mark.parametrize("overlap", [0, 1])
def test_a_block_without_layers_of_the_step_stands_in_a_window(overlap, tiny, text, tmp_path):
    learn = {**LEARN, "iterations": 1, "window": 2, "overlap": overlap}
    step = {"cbq": learn, "skip": "model.layers.1.*" if overlap else "model.layers.2.*"}
    found = run(recipe_for(tiny("llama"), [step], text), tmp_path / "out").report["layers"]
    assert found and all("block_error" in layer["figures"] for layer in found)


def test_a_layer_that_is_changed_first_is_for_windows_of_one_block(tiny, text, tmp_path):
    steps = [{"laser": {"rate": 0.5}, "layers": "*.down_proj"}, {"cbq": {**LEARN}}]
    with pytest.raises(RecipeError, match=r"down_proj is changed by steps\.0\.laser first"):
        run(recipe_for(tiny("llama"), steps, text), tmp_path / "out")
