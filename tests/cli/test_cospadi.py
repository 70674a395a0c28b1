"""cospadi as a user meets it: what plan and run say, where it is refused, and dictionaries that several layers share."""

from __future__ import annotations

import json

import torch

from compress.checkpoint.headers import read_headers

SHARED = {"cospadi": {"keep_ratio": 0.8, "share": 2, "rounds": 3}}


def test_what_the_format_cannot_express_ends_the_plan_in_one_line(make, compress):
    for steps, said in (
        (({"cospadi": {"keep_ratio": 0.01}},), "use at least 0.0782, or skip the layer"),
        (({"cospadi": {"atoms": 70}},), "atoms=70 is more than in_features=64; use at most 64"),
        (
            ({"cospadi": {}}, {"gptq": {"bits": 4, "group_size": 64}}),
            "less than 64 atoms take (12,800); smaller groups in the later step",
        ),
        (({"cospadi": {}}, {"svd": {}}), "codes is pruned by then, and svd would fill its zeros"),
        (({"prune": {}}, {"cospadi": {}}), "is pruned by then, and cospadi would fill its zeros"),
        (({"cospadi": {}}, {"rtn": {"bits": 4, "group_size": 8, "symmetric": False}}), "use symmetric: true"),
        (
            ({**SHARED, "overrides": {"*.1.*.q_proj": {"rho": 3}}},),
            "rho is 3.0 for model.layers.1.self_attn.q_proj and 2.0 for model.layers.0.self_attn.q_proj",
        ),
    ):
        answer = compress("plan", "--recipe", make(*steps))
        assert answer.code != 0 and said in answer.error, answer.error


def test_a_shared_dictionary_is_stored_once_and_serves_all(make, compress, tmp_path, text):
    import transformers

    import compress as package

    out = tmp_path / "out"
    answer = compress("run", "--recipe", make(SHARED), "--out", out, "--json", "--quiet")
    report, infos = json.loads(answer.out), read_headers(out)
    first, second = ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj")
    assert f"{first}.dictionary.weight" in infos and f"{second}.dictionary.weight" not in infos
    both = sum(layer["bytes_after"] for layer in report["layers"] if layer["name"] in (first, second))
    assert both == sum(i.nbytes for n, i in infos.items() if n.startswith((f"{first}.", f"{second}.")))
    model, ids = package.load(out), torch.arange(3, 43)[None]
    assert model.get_submodule(second).atoms is model.get_submodule(first).atoms
    assert compress("generate", out, "--prompt", "the old", "--max-new-tokens", "4").code == 0
    assert "dictionary" in compress("inspect", out).out

    model.save_pretrained(tmp_path / "again")
    assert f"{second}.dictionary.weight" not in read_headers(tmp_path / "again")
    for again in (
        package.load(tmp_path / "again"),
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again"),
    ):
        with torch.no_grad():
            assert torch.equal(again(ids).logits, model(ids).logits)
    assert compress("export", out, "--format", "dense", "--out", tmp_path / "dense").code == 0
    with torch.no_grad():
        dense = package.load(tmp_path / "dense")(ids).logits
    torch.testing.assert_close(dense, model(ids).logits, rtol=1e-3, atol=1e-3)

    base = {"model": str(out)}
    answer = compress("plan", "--recipe", make({"rtn": {"bits": 8, "group_size": -1}, "skip": "*.1.*"}, **base))
    assert "uses the dictionary that model.layers.0" in answer.error and "name both, or skip both" in answer.error
    answer = compress("plan", "--recipe", make({"drop_blocks": {"blocks": [0]}}, **base))
    assert "would be left out, and model.layers.1" in answer.error
    later = make({"drop_blocks": {"blocks": [1]}}, **base)  # the window of blocks 2 and 3 moves up, if there is one
    assert compress("run", "--recipe", later, "--out", tmp_path / "less", "--quiet").code == 0
    with torch.no_grad():
        assert torch.isfinite(package.load(tmp_path / "less")(ids).logits).all()
