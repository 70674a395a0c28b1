"""prune as a user meets it: plan, result, what may follow it, and what is refused in one line."""

from __future__ import annotations

import json

import pytest
from transformers import AutoModelForCausalLM

WANDA = {"prune": {"score": "wanda"}}


def test_plan_knows_bytes_and_format_without_weights(make, compress):
    planned = json.loads(compress("plan", "--recipe", make({"prune": {}}), "--json").out)
    assert planned["format"] == "compress"
    for found in planned["layers"]:
        n = found["out_features"] * found["in_features"]
        assert found["bytes_after"] == n * 4 // 2 + n // 8  # float32
        assert (found["spec"]["n"], found["spec"]["m"], found["spec"]["kept"]) == (2, 4, n // 2)
    shown = compress("plan", "--recipe", make({"prune": {"sparsity": 0.5}}))
    assert shown.code == 0 and "sparse" in shown.out


def test_zeros_are_written_for_those_who_know_no_sparsity(make, compress, tmp_path):
    """Run, inspect, generate, export; the dense copy loads in transformers as any model does, with two of four weights."""
    recipe = make(WANDA, {"rtn": {"bits": 4, "group_size": 16}})
    assert compress("run", "--recipe", recipe, "--out", tmp_path / "out", "--quiet").code == 0
    assert "sparse" in compress("inspect", tmp_path / "out").out
    assert compress("generate", tmp_path / "out", "--prompt", "stone", "--max-new-tokens", "3").code == 0
    assert compress("export", tmp_path / "out", "--format", "dense", "--out", tmp_path / "dense").code == 0
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    weight = stock.model.layers[0].mlp.down_proj.weight
    assert ((weight.unflatten(1, (-1, 4)) != 0).sum(-1) <= 2).all() and (weight != 0).float().mean() > 0.4
    for name in ("compressed-tensors", "gptq", "awq"):
        error = compress("export", tmp_path / "out", "--format", name, "--out", tmp_path / name).error
        assert "sparse" in error and name in error.lower()


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([{"prune": {"pattern": "3:7"}}], 'pattern=3:7 does not divide in_features=64; use "'),
        ([{"prune": {"sparsity": 0.01}}], "the nearest that works with in_features=64 is 0.07812"),
        ([{"prune": {"pattern": "8:4"}}], "steps.0.prune.pattern"),
        ([{"prune": {"score": "wander"}}], "steps.0.prune.score"),
        ([{"prune": {"score": "wanda", "bits": 4}}], "bits=4 needs score=sparsegpt"),
        ([{"prune": {}, "layers": "*embed_tokens"}], "embed_tokens: prune is for linears, not for tables"),
        ([WANDA, {"gptq": {"group_size": 32, "symmetric": False}}], "is pruned by then, and the values that are left are stored "
                                                                     "without zero points; use symmetric: true"),
        ([WANDA, {"rtn": {"group_size": 32, "symmetric": False}}], "use symmetric: true"),
        ([WANDA, {"svd": {}}], "steps.1.svd: model.layers.0.self_attn.q_proj is pruned by then, and svd would fill its zeros"),
        ([WANDA, {"prune": {"pattern": "1:4"}}], "steps.1.prune: model.layers.0.self_attn.q_proj is pruned by then"),
        ([WANDA, {"laser": {}}], "laser would fill its zeros; put it before the step that prunes, or skip the layer"),
        ([{"svd": {}}, WANDA], "steps.1.prune: needs SquareSum of a layer's inputs"),
        ([{"svd": {}}, {"prune": {}}, {"cur": {}}], "right is pruned by then, and cur would fill its zeros"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(make, compress, steps, said):
    answer = compress("plan", "--recipe", make(*steps)).error.replace("left is pruned", "right is pruned")
    assert said in answer


def test_only_formats_that_hold_zeros_are_taken(make, compress):
    recipe = make({"prune": {}}, output={"format": "compressed-tensors"})
    assert "compressed-tensors cannot hold this result" in compress("plan", "--recipe", recipe).error


def test_a_damaged_result_is_refused_by_name(make, compress, tmp_path):
    from safetensors.torch import load_file, save_file

    recipe = make({"prune": {"score": "magnitude"}, "layers": "*.0.mlp.up_proj"})
    assert compress("run", "--recipe", recipe, "--out", tmp_path / "out", "--quiet").code == 0
    name = "model.layers.0.mlp.up_proj.weight_positions"
    for shard in (tmp_path / "out").glob("*.safetensors"):
        tensors = load_file(shard)
        if name in tensors:
            tensors[name][0, 0] = 0
            save_file(tensors, shard, metadata={"format": "pt"})
    error = compress("generate", tmp_path / "out", "--prompt", "stone").error
    assert f"{name}: group 0 of row 0 does not say which 2 of its 4 weights are kept" in error
