"""svd as a user meets it: what plan and report say, and where it is refused."""

from __future__ import annotations

import json

import pytest

from tests.tiny_models import save_tiny


@pytest.fixture
def make(tmp_path, text):
    """A recipe file for a tiny model with the steps given."""
    source = save_tiny("llama_gqa_tied", tmp_path / "source")

    def write(*steps, **fields):
        recipe = {
            "model": str(source),
            "calibration": {"data": str(text), "samples": 6, "length": 48},
            "steps": list(steps),
            **fields,
        }
        file = tmp_path / "recipe.yaml"
        file.write_text(json.dumps(recipe))  # JSON is YAML
        return file

    return write


def test_plan_knows_ranks_bytes_and_format_without_weights(make, compress):
    planned = json.loads(compress("plan", "--recipe", make({"svd": {"keep_ratio": 0.5}}), "--json").out)
    assert planned["format"] == "compress"
    ranks = {layer["name"].rpartition(".")[2]: layer["spec"]["rank"] for layer in planned["layers"]}
    assert ranks == {
        "q_proj": 16, "k_proj": 10, "v_proj": 10, "o_proj": 16, "gate_proj": 21, "up_proj": 21, "down_proj": 21,
    }  # fmt: skip
    assert planned["bytes_after"] == 3 * 4 * (2 * 16 * 128 + 2 * 10 * 96 + 3 * 21 * 192)
    shown = compress("plan", "--recipe", make({"svd": {"keep_ratio": 0.5}}))
    assert "low_rank rank=16" in shown.out


def test_a_layer_that_stays_dense_is_named_in_plan_and_report(make, compress, tmp_path):
    """Rank 24 is less than the break-even of 64 x 64, and more than that of 32 x 64."""
    recipe = make({"svd": {"rank": 24, "objective": "plain"}})
    said = (
        "model.layers.[0-2].self_attn.[a-z]_proj: kept as before: factors of rank 24 would hold 1.12 times the numbers of "
        "the 32 x 64 weight"
    )
    planned = json.loads(compress("plan", "--recipe", recipe, "--json").out)
    kept = [warning for warning in planned["warnings"] if "kept as before" in warning]
    assert len(kept) == 1 and said.partition(": ")[2] in kept[0]
    assert all(f"model.layers.[0-2].self_attn.{name}_proj" in kept[0] for name in "kv")
    assert not any(layer["name"].endswith(("k_proj", "v_proj")) for layer in planned["layers"])
    answer = compress("run", "--recipe", recipe, "--out", tmp_path / "out", "--json", "--quiet")
    report = json.loads(answer.out)
    assert kept[0] in report["warnings"]
    assert report["bytes_after"] == planned["bytes_after"]
    names = {layer["name"] for layer in report["layers"]}
    assert names == {layer["name"] for layer in planned["layers"]}
    assert compress("generate", tmp_path / "out", "--prompt", "stone", "--max-new-tokens", "3").code == 0


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ({"svd": {"rank": 0}}, "steps.0.svd.rank: "),
        ({"svd": {"rank": 4096}}, "no layer would change; model.layers.0.self_attn.q_proj: factors of rank 4096 would hold"),
        ({"svd": {"keep_ratio": 1.5}}, "steps.0.svd.keep_ratio: "),
        ({"svd": {"keep_rate": 0.5}}, "keep_ratio"),
        ({"svd": {"refit": 0.5, "objective": "plain"}}, "refit=0.5 needs objective=whitened, not plain"),
        ({"svd": {}, "layers": "*embed_tokens"}, "embed_tokens: svd is for linears, not for tables; leave it out of layers"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_the_plan(make, compress, step, said):
    error = compress("plan", "--recipe", make(step)).error
    assert said in error


def test_a_second_truncation_is_refused(make, compress):
    error = compress("plan", "--recipe", make({"svd": {}}, {"svd": {"objective": "plain"}})).error
    assert "is stored as low_rank by then, and svd works on whole weights" in error


def test_only_formats_that_hold_factors_are_taken(make, compress):
    recipe = make({"svd": {}}, output={"format": "compressed-tensors"})
    assert "compressed-tensors cannot hold this result" in compress("plan", "--recipe", recipe).error


def test_ranks_become_multiples_of_the_groups_of_a_later_step(make, compress):
    recipe = make({"svd": {"keep_ratio": 0.9}}, {"gptq": {"bits": 4, "group_size": 16}})
    planned = json.loads(compress("plan", "--recipe", recipe, "--json").out)
    assert {layer["spec"]["rank"] for layer in planned["layers"]} == {16, 32}
    for layer in planned["layers"]:
        assert layer["method"] == "svd+gptq"
        assert {layer["spec"][leaf]["bits"] for leaf in ("left", "right")} == {4}


def test_inspect_shows_one_line_for_both_factors(make, compress, tmp_path):
    recipe = make({"svd": {"keep_ratio": 0.5, "objective": "plain"}})
    assert compress("run", "--recipe", recipe, "--out", tmp_path / "out", "--quiet").code == 0
    listed = json.loads(compress("inspect", tmp_path / "out", "--json").out)
    rows = json.dumps(listed)
    assert "low_rank rank=16" in rows and ".left" not in rows and ".right" not in rows
    assert compress("export", tmp_path / "out", "--format", "dense", "--out", tmp_path / "dense").code == 0
