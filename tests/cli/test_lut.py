"""lut as a user meets it: what plan and run say, where it is refused, and what loads and can be saved again."""

from __future__ import annotations

import json

import torch


def test_what_cannot_be_ends_the_plan_in_one_line(make, compress):
    answer = compress("plan", "--recipe", make({"lut": {"table": "normal_float", "group_size": 24}}))
    assert answer.code != 0 and "group_size=24 does not divide in_features=64; use one of [16, 32, 64]" in answer.error
    answer = compress("plan", "--recipe", make({"lut": {"scales": "absmax"}}))
    assert answer.code != 0 and "has no scales for scales: absmax" in answer.error
    answer = compress("plan", "--recipe", make({"prune": {}}, {"lut": {}}))
    assert answer.code != 0 and "is pruned by then, and lut would fill its zeros" in answer.error
    answer = compress("plan", "--recipe", make({"lut": {}, "output": "x"}))
    assert answer.code != 0


def test_result_saved_again_and_dense_export(make, compress, tmp_path):
    import transformers

    import compress as package

    recipe = make(
        {"lut": {"bits": 3, "group_size": 16, "refit": 1}, "layers": "*.self_attn.*"},
        {"lut": {"bits": 2, "refit": 1}, "layers": "*.mlp.*"},
    )
    report = json.loads(compress("run", "--recipe", recipe, "--out", tmp_path / "out", "--json", "--quiet").out)
    for found in report["layers"]:
        assert found["figures"]["loss"] <= found["figures"]["loss_start"]
    assert "lut" in compress("inspect", tmp_path / "out").out
    model = package.load(tmp_path / "out")
    model.save_pretrained(tmp_path / "again")
    ids = torch.arange(3, 43)[None]
    for again in (
        package.load(tmp_path / "again"),
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again"),
    ):
        with torch.no_grad():
            assert torch.equal(again(ids).logits, model(ids).logits)
        assert type(again.get_submodule("model.layers.0.mlp.down_proj")).__name__ == "LUTLinear"
    answer = compress("export", tmp_path / "out", "--format", "gptq", "--out", tmp_path / "gptq")
    assert answer.code != 0 and "lut" in answer.error
    assert compress("export", tmp_path / "out", "--format", "dense", "--out", tmp_path / "dense").code == 0
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    with torch.no_grad():
        torch.testing.assert_close(dense(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
