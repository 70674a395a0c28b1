"""cur as a user meets it: what plan and report say, where it is refused, and what loads and can be saved again."""

from __future__ import annotations

import json

import torch


def test_blocks_that_cannot_be_chosen_end_the_run_in_one_line(make, compress, tmp_path):
    recipe = make({"cur": {"n_blocks": 2}})
    planned = json.loads(compress("plan", "--recipe", recipe, "--json").out)
    assert any("settles 21 layers once it has seen the whole model" in warning for warning in planned["warnings"])
    answer = compress("run", "--recipe", recipe, "--out", tmp_path / "out", "--quiet")
    assert "cur: n_blocks=2, but 1 blocks can be chosen" in answer.error


def test_report_names_the_blocks_and_the_result_loads_evaluates_and_generates(make, compress, tmp_path, text):
    recipe = make({"cur": {"n_blocks": 1, "energy": 0.7, "selection": "deim", "heal": 1.0}, "layers": "*.gate_proj"})
    report = json.loads(compress("run", "--recipe", recipe, "--out", tmp_path / "out", "--json", "--quiet").out)
    assert [layer["name"] for layer in report["layers"]] == ["model.layers.1.mlp.gate_proj"]
    assert any("n_blocks=1: blocks 1 turn their hidden states less" in warning for warning in report["warnings"])
    assert "cur" in compress("inspect", tmp_path / "out").out
    assert compress("generate", tmp_path / "out", "--prompt", "the old", "--max-new-tokens", "4").code == 0
    found = json.loads(
        compress("eval", tmp_path / "out", "--data", text, "--max-tokens", "96", "--length", "48", "--json").out
    )
    assert found["model"]["perplexity"] > 1


def test_save_pretrained_and_back(make, compress, tmp_path):
    import transformers

    import compress as package

    recipe = make({"cur": {"keep_ratio": 0.7}}, {"rtn": {"bits": 8, "group_size": 4}, "layers": "*.down_proj"})
    compress("run", "--recipe", recipe, "--out", tmp_path / "out", "--quiet")
    model = package.load(tmp_path / "out")
    model.save_pretrained(tmp_path / "again")
    for again in (
        package.load(tmp_path / "again"),
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again"),
    ):
        ids = torch.arange(3, 43)[None]
        with torch.no_grad():
            assert torch.equal(again(ids).logits, model(ids).logits)
        layer = again.get_submodule("model.layers.0.mlp.down_proj")
        assert type(layer).__name__ == "CURLinear" and type(layer.link).__name__ == "QuantizedLinear"
