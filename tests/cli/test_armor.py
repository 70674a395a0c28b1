"""armor as a user meets it: what plan and run say, where it is refused, and what loads and can be saved again."""

from __future__ import annotations

import json

import torch


def test_sizes_that_do_not_fit_end_the_plan_in_one_line(make, compress):
    answer = compress("plan", "--recipe", make({"armor": {"block_size": 24}}))
    assert answer.code != 0 and "block_size=24 does not divide in_features=64; use one of [16, 32, 64]" in answer.error
    answer = compress("plan", "--recipe", make({"armor": {"block_size": 6}}))
    assert answer.code != 0 and "block_size" in answer.error and "multiple of 4" in answer.error


def test_steps_that_cannot_stand_around_it_are_refused(make, compress):
    wrap = {"armor": {"block_size": 8, "n_iters": 1}}
    for steps, said in (
        (({"prune": {}}, wrap), "is pruned by then, and armor would fill its zeros"),
        ((wrap, {"svd": {}}), "core is pruned by then, and svd would fill its zeros"),
        ((wrap, {"rtn": {"bits": 4, "group_size": 16, "symmetric": False}}), "use symmetric: true"),
        (({"svd": {"keep_ratio": 0.5}}, wrap), "armor works on whole weights"),
    ):
        answer = compress("plan", "--recipe", make(*steps))
        assert answer.code != 0 and said in answer.error, answer.error


def test_report_and_result(make, compress, tmp_path, text):
    recipe = make({"armor": {"block_size": 8, "n_iters": 3}, "layers": ["*.gate_proj", "*.k_proj"]})
    report = json.loads(compress("run", "--recipe", recipe, "--out", tmp_path / "out", "--json", "--quiet").out)
    for found in report["layers"]:
        assert found["figures"]["proxy_loss"] <= found["figures"]["proxy_loss_start"]
    assert "armor" in compress("inspect", tmp_path / "out").out
    assert compress("generate", tmp_path / "out", "--prompt", "the old", "--max-new-tokens", "4").code == 0
    asked = ("eval", tmp_path / "out", "--data", text, "--max-tokens", "96", "--length", "48", "--json")
    assert json.loads(compress(*asked).out)["model"]["perplexity"] > 1


def test_save_pretrained_and_back_and_dense_export(make, compress, tmp_path):
    import transformers

    import compress as package

    recipe = make(
        {"armor": {"block_size": 8, "n_iters": 2}}, {"rtn": {"bits": 8, "group_size": 16}, "layers": "*.down_proj"}
    )
    compress("run", "--recipe", recipe, "--out", tmp_path / "out", "--quiet")
    model = package.load(tmp_path / "out")
    model.save_pretrained(tmp_path / "again")
    ids = torch.arange(3, 43)[None]
    for again in (
        package.load(tmp_path / "again"),
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again"),
    ):
        with torch.no_grad():
            assert torch.equal(again(ids).logits, model(ids).logits)
        layer = again.get_submodule("model.layers.0.mlp.down_proj")
        assert type(layer).__name__ == "ArmorLinear" and layer.core.spec.bits == 8
    assert compress("export", tmp_path / "out", "--format", "dense", "--out", tmp_path / "dense").code == 0
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    with torch.no_grad():
        torch.testing.assert_close(dense(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-3)
