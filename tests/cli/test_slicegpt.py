"""slicegpt as a user meets it: what the plan says, where it is refused, and what becomes of the result."""

from __future__ import annotations

import copy
import json
from functools import partial

import pytest


@pytest.fixture
def make(make):
    return partial(make, family="llama")


def test_plan_knows_width_and_bytes_without_weights(make, compress):
    planned = json.loads(compress("plan", "--recipe", make({"slicegpt": {"sparsity": 0.25}}), "--json").out)
    assert planned["format"] == "compress"
    assert "the blocks have shortcut matrices" in planned["format_reason"]
    assert planned["rewrites"][0]["note"].startswith(
        "the residual stream has 48 of 64 entries (25.0% sliced), the model 8"
    )
    tables, blocks = 288 * 48 + 288 * 64, 3 * (48 * 4 * 64 + 3 * 48 * 128 + 2 * 48**2)
    assert planned["bytes_total_after"] == 4 * (tables + blocks + (64 - 48) * (128 + 48))


def test_a_later_step_is_planned_on_the_narrow_model(make, compress):
    steps = ({"slicegpt": {"sparsity": 0.25}}, {"rtn": {"bits": 4, "group_size": 16}})
    planned = json.loads(compress("plan", "--recipe", make(*steps), "--json").out)
    shapes = {
        layer["name"].rpartition(".")[2]: (layer["out_features"], layer["in_features"]) for layer in planned["layers"]
    }
    assert shapes["q_proj"] == (64, 48) and shapes["gate_proj"] == (128, 48)
    assert not any("shortcut" in name for name in shapes)


def test_the_plan_warns_of_a_model_that_grows(make, compress):
    recipe = make({"slicegpt": {"sparsity": 0.1}}, family="llama_gqa_tied")
    shown = compress("plan", "--recipe", recipe)
    assert shown.code == 0
    words = " ".join((shown.out + shown.err).split())
    assert "steps.0.slicegpt: the sliced model has" in words and "slice more, or use keep_ratio" in words
    assert "the head and the token table share one matrix in the source" in words


@pytest.mark.parametrize(("steps", "family", "said"), [
    ([{"slicegpt": {"sparsity": 1}}], "llama", "less than 1"),
    ([{"slicegpt": {"sparsity": 0.9}}], "llama", "sparsity=0.9: leaves 6 of 64 entries, fewer than round_to=8; slice less"),
    ([{"slicegpt": {"keep_ratio": 0.1}}], "llama", "keep_ratio=0.1: no width fits"),
    ([{"slicegpt": {"keep_ratio": 1.5}}], "llama", "less than or equal to 1"),
    ([{"slicegpt": {"width": 48}}], "llama", "width"),
    ([{"slicegpt": {}, "layers": "*.q_proj"}], "llama", "slicegpt rewrites the whole model, not single layers; leave layers out"),
    ([{"rtn": {}}, {"slicegpt": {}}], "llama", "slicegpt rewrites the whole model and must stand before rtn"),
    ([{"slicegpt": {}}, {"slicegpt": {}}], "llama", "steps.1.slicegpt: Llama 2, 3 (llama): it was rewritten before"),
    ([{"slicegpt": {}}, {"rtn": {"bits": 4, "group_size": 32}}], "llama", "group_size=32 does not divide in_features=48"),
    ([{"slicegpt": {}}], "gemma2", "Gemma 2 (gemma2): its norms behind attention and MLP"),
    ([{"slicegpt": {}}], "gemma3_text", "Gemma 3 (text) (gemma3_text): its norms behind attention and MLP"),
    ([{"slicegpt": {}}], "opt_post_norm", "OPT (opt): its token table has 32 columns"),
    ([{"slicegpt": {}}], "gpt_neox", "GPT-NeoX, Pythia (gpt_neox): attention and MLP of a block run side by side"),
])  # fmt: skip
def test_refusals_are_one_line(steps, family, said, make, compress):
    assert said in compress("plan", "--recipe", make(*steps, family=family)).error


def test_a_format_that_cannot_say_it_is_refused(make, compress):
    recipe = make({"slicegpt": {}}, {"rtn": {"bits": 4, "group_size": 16}}, output={"format": "compressed-tensors"})
    assert (
        "compressed-tensors cannot hold this result: the blocks have shortcut matrices"
        in compress("plan", "--recipe", recipe).error
    )


def test_run_inspect_generate_evaluate_and_no_export(make, compress, tmp_path, text):
    data = {"data": str(text), "length": 48, "max_tokens": 480}
    recipe, out = make({"slicegpt": {"sparsity": 0.25}}, evaluation=data), tmp_path / "out"
    assert compress("run", "--recipe", recipe, "--out", out, "--quiet").code == 0
    assert "model.layers.[0-2].attn_shortcut" in compress("inspect", out).out
    assert compress("generate", out, "--prompt", "the old bridge", "--max-new-tokens", 3).code == 0
    assert compress("eval", out, "--data", text, "--length", 48, "--max-tokens", 96).code == 0
    for format_ in ("dense", "compressed-tensors", "gptq", "awq"):
        error = compress("export", out, "--format", format_, "--out", tmp_path / format_).error
        assert "the blocks have shortcut matrices" in error and not (tmp_path / format_).exists()
    config = json.loads((out / "config.json").read_text())
    for field, value, said in (
        ("width", 65, "width=65 is not between 1 and 64"),
        ("width", 40, "[288, 48] is stored, and by config.json's quantization_config.structure it is [288, 40]"),
        ("last_width", 48, "[64, 128] is stored, and by config.json's quantization_config.structure it is [48, 128]"),
    ):
        changed = copy.deepcopy(config)
        changed["quantization_config"]["structure"][field] = value
        (out / "config.json").write_text(json.dumps(changed))
        assert said in compress("generate", out, "--prompt", "a").error
