"""signround as a user meets it: what is refused, what stands around it, what can be generated from."""

from __future__ import annotations

import json


def test_what_was_pruned_or_factored_is_refused(make, compress):
    for before, said in (
        ({"prune": {}}, "would fill its zeros"),
        ({"svd": {"keep_ratio": 0.5}}, "works on whole weights"),
    ):
        answer = compress("plan", "--recipe", make(before, {"signround": {"bits": 4, "group_size": 8}}))
        assert answer.code != 0 and said in answer.error, answer.error


def test_what_stands_before_and_after_it(make, compress, tmp_path):
    steps = [
        {"gptq": {"bits": 8, "group_size": 32}, "layers": "*.down_proj"},
        {"signround": {"bits": 3, "group_size": 32, "iterations": 2, "batch_rows": 2}, "skip": "*.down_proj"},
        {"rtn": {"bits": 8, "group_size": 32}, "layers": "lm_head"},
    ]
    done = compress("run", "--recipe", make(*steps), "--out", tmp_path / "out", "--json", "--quiet")
    found = {layer["name"]: layer for layer in json.loads(done.out)["layers"]}
    assert "block_error" in found["model.layers.0.self_attn.q_proj"]["figures"]
    assert "block_error" not in found["model.layers.0.mlp.down_proj"]["figures"]
    assert compress("generate", tmp_path / "out", "--prompt", "the old", "--max-new-tokens", "4").code == 0
