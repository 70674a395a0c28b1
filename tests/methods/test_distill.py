"""distill: gradients through the streamed model, what it moves and what it leaves alone, resuming, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

from compress.errors import NumericsError, RecipeError
from compress.methods.distill import Distill, DistillConfig, set_aside, step_size
from compress.pipeline.run import run
from tests.runs import fingerprints, recipe_for

CODES = {"rtn": {"bits": 3, "group_size": 32, "clip": "mse"}}
TUNED = {"distill": {"iterations": 6, "batch_rows": 3, "lr": 0.01}}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("model", ["llama_gqa_tied", "gpt2", "mixtral"])
def test_scales_and_norms_move_and_nothing_else(model: str, tiny, text, tmp_path):
    before = run(recipe_for(tiny(model), [CODES], text), tmp_path / "before").report
    after = run(recipe_for(tiny(model), [CODES, TUNED], text), tmp_path / "after").report
    figures = after["tuning"]["figures"]
    assert figures["kept"] == 1 and figures["divergence"] < 0.95 * figures["divergence_start"]
    assert after["evaluation"]["fidelity"]["kl_mean"] < before["evaluation"]["fidelity"]["kl_mean"]
    assert after["format"] == before["format"]
    first, second = tensors(tmp_path / "before"), tensors(tmp_path / "after")
    assert first.keys() == second.keys()
    moved = {name for name in first if not torch.equal(first[name], second[name])}
    assert all(first[name].dtype == second[name].dtype for name in first)
    assert all(name.endswith("weight_scale") or first[name].dim() == 1 for name in moved)
    assert any(name.endswith("weight_scale") for name in moved) and any(first[name].dim() == 1 for name in moved)
    assert not any(name.endswith("bias") for name in moved)


def test_gradients_are_those_of_the_whole_model(tiny, text, tmp_path, monkeypatch):
    """Against plain autograd over the same model with the scales as parameters of its weights."""
    seen: dict[str, torch.Tensor] = {}

    def look(task, config, generator):
        def update(parameters):
            seen.update({name: parameter.gradient.clone() for name, parameter in parameters.items()})

        seen["loss"] = torch.tensor(task.descend([1, 3, 4], update))
        seen["rows"] = torch.stack([task.rows[row] for row in [1, 3, 4]])
        return {"kept": 0.0}

    monkeypatch.setattr(Distill, "tune", look)
    folder = tiny("llama")
    run(recipe_for(folder, [CODES, TUNED], text, evaluation=False), tmp_path / "out")

    teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    student = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    stored, scales = tensors(tmp_path / "out"), {}
    from compress.kernels.packing import unpack

    weights = {}
    for name in [name.removesuffix(".weight_scale") for name in stored if name.endswith(".weight_scale")]:
        scale = stored[f"{name}.weight_scale"].float().requires_grad_()
        codes = unpack(stored[f"{name}.weight_packed"], 3, int(stored[f"{name}.weight_shape"][1])).float() - 4
        scales[f"{name}.weight_scale"] = scale
        weights[f"{name}.weight"] = (codes.unflatten(1, (scale.shape[1], -1)) * scale.unsqueeze(-1)).flatten(1)
    norms = {n: p for n, p in student.named_parameters() if "norm" in n}
    found = torch.func.functional_call(student, weights, (seen["rows"],), {"use_cache": False}).logits.log_softmax(-1)
    with torch.no_grad():
        expected = teacher(seen["rows"], use_cache=False).logits.log_softmax(-1)
    loss = functional.kl_div(found, expected, log_target=True, reduction="sum") / seen["rows"].numel()
    assert float(loss) == pytest.approx(float(seen["loss"]), rel=1e-4)
    wanted = {**scales, **norms}
    gradients = torch.autograd.grad(loss, list(wanted.values()))
    assert seen.keys() - {"loss", "rows"} == wanted.keys()
    for name, gradient in zip(wanted, gradients, strict=True):
        assert torch.allclose(seen[name], gradient, rtol=1e-3, atol=1e-6 * float(gradient.abs().max() + 1)), name


@pytest.mark.parametrize("settings", [{"table": "kmeans", "group_size": 32}, {"table": "kmeans"}])
def test_tables_have_the_gradients_of_their_weights(settings: dict[str, Any], tiny, text, tmp_path):
    step = {"lut": {"bits": 3, "refit": 0, **settings}}
    run(recipe_for(tiny("llama"), [step], text, evaluation=False), tmp_path / "out")
    import compress
    from compress.modules.lut import LUTLinear

    module = next(m for m in compress.load(tmp_path / "out").modules() if isinstance(m, LUTLinear))
    by_weight = torch.randn(
        module.spec.out_features, module.spec.in_features, generator=torch.Generator().manual_seed(0)
    )
    values = {name: value.detach().float().requires_grad_() for name, value in module.tunable().items()}
    codes = module.codes().long()
    if "weight_scale" in values:
        scales = values["weight_scale"].repeat_interleave(codes.shape[1] // values["weight_scale"].shape[1], 1)
        weight = values["weight_table"][codes] * scales
    else:
        weight = values["weight_table"].gather(1, codes)
    expected = torch.autograd.grad(weight, list(values.values()), by_weight)
    found = module.tuning_gradients(by_weight)
    assert found.keys() == values.keys()
    for name, gradient in zip(values, expected, strict=True):
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-4), name


def test_no_iterations_change_nothing(tiny, text, tmp_path):
    run(recipe_for(tiny("llama"), [CODES], text), tmp_path / "before")
    run(recipe_for(tiny("llama"), [CODES, {"distill": {"iterations": 0}}], text), tmp_path / "after")
    first, second = tensors(tmp_path / "before"), tensors(tmp_path / "after")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_rows_of_several_lengths_are_tuned_and_judged(tiny, text, tmp_path, monkeypatch):
    from compress.pipeline import run as pipeline

    batches = pipeline.calibration_batches

    def cut(plan, source):
        whole = batches(plan, source)
        return [ids if place % 2 else ids[:, :31] for place, ids in enumerate(whole * 4)]

    monkeypatch.setattr(pipeline, "calibration_batches", cut)
    step = {"distill": {"iterations": 3, "batch_rows": 4, "lr": 0.01}}
    figures = run(recipe_for(tiny("llama"), [CODES, step], text, evaluation=False), tmp_path / "out").report["tuning"][
        "figures"
    ]
    assert 0 < figures["divergence"] < figures["divergence_start"]


def test_what_is_worse_is_not_kept(tiny, text, tmp_path):
    wild = {"distill": {"iterations": 1, "batch_rows": 1, "lr": 0.1, "parameters": "norms"}}
    monkey = pytest.MonkeyPatch()
    monkey.setattr("compress.methods.distill.adam", lambda parameter, iteration, lr: parameter.value.mul_(5.0))
    with monkey.context():
        report = run(recipe_for(tiny("llama"), [CODES, wild], text), tmp_path / "after").report
    monkey.undo()
    run(recipe_for(tiny("llama"), [CODES], text), tmp_path / "before")
    first, second = tensors(tmp_path / "before"), tensors(tmp_path / "after")
    assert report["tuning"]["figures"]["kept"] == 0
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_interrupted_run_goes_on_with_the_next_iteration(tiny, text, tmp_path, monkeypatch):
    recipe = recipe_for(tiny("llama"), [CODES, TUNED], text)
    run(recipe, tmp_path / "whole")
    steps: list[int] = []
    original = Distill.tune

    def interrupted(task, config, generator):
        tell = task.tell

        def counting(detail: str) -> None:
            tell(detail)
            steps.append(task.done)
            if task.done == 4:
                raise KeyboardInterrupt

        task.tell = counting
        return original(task, config, generator)

    monkeypatch.setattr(Distill, "tune", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "cut")
    monkeypatch.setattr(Distill, "tune", original)
    seen: list[int] = []
    monkeypatch.setattr(
        "compress.methods.distill.step_size",
        lambda iteration, config: seen.append(iteration) or step_size(iteration, config),
    )
    run(recipe, tmp_path / "cut")
    assert steps == [1, 2, 3, 4] and seen == [4, 5]
    assert fingerprints(tmp_path / "whole") == fingerprints(tmp_path / "cut")


def test_a_compressed_model_is_tuned_beside_its_original(tiny, text, tmp_path):
    run(recipe_for(tiny("llama"), [CODES], text), tmp_path / "codes")
    alone: dict[str, Any] = {"distill": {**TUNED["distill"], "teacher": str(tiny("llama"))}}
    tuned = run(recipe_for(tmp_path / "codes", [alone], text, evaluation=False), tmp_path / "tuned").report
    assert tuned["tuning"]["figures"]["kept"] == 1
    with pytest.raises(RecipeError, match="compressed already; name the original as teacher"):
        run(recipe_for(tmp_path / "codes", [TUNED], text), tmp_path / "refused")


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([TUNED, CODES], "tunes the finished model; put it last"),
        ([CODES, TUNED, TUNED], "put it last, and name it once"),
        ([CODES, {**TUNED, "skip": "*.0.*"}], "steps.1.skip: distill tunes the whole model"),
        ([TUNED], "nothing compressed to tune"),
        ([{"bitstack": {"blocks": 2, "rank": 4}}, TUNED], "a stack has no one size"),
    ],
)
def test_what_cannot_be_tuned_is_refused_in_the_plan(steps: list[dict[str, Any]], message: str, tiny, text, tmp_path):
    with pytest.raises(RecipeError, match=message):
        run(recipe_for(tiny("llama"), steps, text), tmp_path / "out")


def test_a_loss_that_is_not_finite_ends_the_run(tiny, text, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "compress.methods.distill.adam", lambda parameter, iteration, lr: parameter.value.fill_(float("nan"))
    )
    with pytest.raises(NumericsError, match="distill"):
        run(recipe_for(tiny("llama"), [CODES, TUNED], text), tmp_path / "out")


def test_rows_are_set_aside_and_steps_rise_and_fall():
    aside, learned = set_aside(40)
    assert aside == [0, 16, 32] and not set(aside) & set(learned) and len(learned) == 37
    assert set_aside(1) == ([0], [0])
    sizes = [step_size(i, DistillConfig(iterations=50, lr=0.01)) for i in range(50)]
    assert sizes[0] < sizes[4] > sizes[30] > sizes[49] > 0
