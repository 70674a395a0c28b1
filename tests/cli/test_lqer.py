"""lqer and lq_lora as a user meets them: what the plan knows, what is refused in one line, what runs and is saved again."""

from __future__ import annotations

import json

import torch

LQER = {"lqer": {"bits": 3, "group_size": 32, "rank": 6}}


def test_plan_knows_ranks_and_bytes_without_weights(make, compress):
    planned = json.loads(compress("plan", "--recipe", make(LQER), "--json").out)
    assert planned["format"] == "compress"
    assert {layer["spec"]["rank"] for layer in planned["layers"]} == {6}
    sized = json.loads(
        compress("plan", "--recipe", make({"lqer": {**LQER["lqer"], "bits_per_weight": 8}}), "--json").out
    )
    ranks = {layer["name"].rpartition(".")[2]: layer["spec"]["rank"] for layer in sized["layers"]}
    assert ranks["gate_proj"] > ranks["q_proj"] > ranks["k_proj"] > 6
    later = json.loads(compress("plan", "--recipe", make(LQER, {"rtn": {"bits": 8, "group_size": 4}}), "--json").out)
    assert {layer["spec"]["rank"] for layer in later["layers"]} == {4}


def test_what_cannot_be_ends_the_plan_in_one_line(make, compress):
    for steps, said in (
        (({"lqer": {**LQER["lqer"], "bits_per_weight": 4}},), "bits_per_weight=4 leaves no room for a correction"),
        (({"lqer": {"bits": 3, "group_size": 32, "gptaq": 0.5}},), "or use refit"),
        (({"lq_lora": {"bits": 3, "group_size": 32, "rounds": 0}},), "rounds"),
        (({"svd": {"keep_ratio": 0.5}}, LQER), "lqer works on whole weights"),
        (({"prune": {}}, LQER), "is pruned by then, and lqer would fill its zeros"),
        ((LQER, {"svd": {}}), "is stored as corrected by then, and svd works on whole weights"),
        (({**LQER, "layers": "*embed_tokens"},), "lqer is for linears, not for tables"),
        (({"lqer": {"bits": 3, "group_size": 32, "rank": 60, "factor_bits": 16}},), "of 16 bits per weight"),
    ):
        answer = compress("plan", "--recipe", make(*steps))
        assert answer.code != 0 and said in answer.error, answer.error


def test_save_pretrained_and_back_and_dense_export(make, compress, tmp_path):
    import transformers

    import compress as package

    turned = {
        "lq_lora": {"bits": 2, "group_size": 32, "rank": 4, "rounds": 2, "factor_bits": 8},
        "layers": "*.down_proj",
    }
    plain = {"lqer": {**LQER["lqer"], "factor_bits": 16}, "skip": "*.down_proj"}
    report = json.loads(
        compress("run", "--recipe", make(turned, plain), "--out", tmp_path / "out", "--json", "--quiet").out
    )
    for found in report["layers"]:
        assert found["figures"]["proxy_loss"] < found["figures"]["proxy_loss_start"]
    assert "corrected" in compress("inspect", tmp_path / "out").out
    assert compress("generate", tmp_path / "out", "--prompt", "the old", "--max-new-tokens", "4").code == 0
    model = package.load(tmp_path / "out")
    model.save_pretrained(tmp_path / "again")
    ids = torch.arange(3, 43)[None]
    for again in (
        package.load(tmp_path / "again"),
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again"),
    ):
        with torch.no_grad():
            assert torch.equal(again(ids).logits, model(ids).logits)
        assert again.get_submodule("model.layers.0.mlp.down_proj").right.spec.bits == 8
        state = model.state_dict()
        assert all(torch.equal(t, state[name]) for name, t in again.state_dict().items())
    assert compress("export", tmp_path / "out", "--format", "dense", "--out", tmp_path / "dense").code == 0
    dense = package.load(tmp_path / "dense")
    with torch.no_grad():
        torch.testing.assert_close(dense(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-3)
    assert compress("export", tmp_path / "out", "--format", "gptq", "--out", tmp_path / "gptq").code != 0
