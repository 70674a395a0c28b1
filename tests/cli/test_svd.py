"""svd as a user meets it: what plan and report say, and where it is refused."""

from __future__ import annotations

import json


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


def test_a_second_truncation_is_refused(make, compress):
    error = compress("plan", "--recipe", make({"svd": {}}, {"svd": {"objective": "plain"}})).error
    assert "is stored as low_rank by then, and svd works on whole weights" in error


def test_only_formats_that_hold_factors_are_taken(make, compress):
    recipe = make({"svd": {}}, output={"format": "compressed-tensors"})
    assert "compressed-tensors cannot hold this result" in compress("plan", "--recipe", recipe).error


def test_inspect_shows_one_line_for_both_factors(make, compress, tmp_path):
    recipe = make({"svd": {"keep_ratio": 0.5, "objective": "plain"}})
    assert compress("run", "--recipe", recipe, "--out", tmp_path / "out", "--quiet").code == 0
    listed = json.loads(compress("inspect", tmp_path / "out", "--json").out)
    rows = json.dumps(listed)
    assert "low_rank rank=16" in rows and ".left" not in rows and ".right" not in rows
    assert compress("export", tmp_path / "out", "--format", "dense", "--out", tmp_path / "dense").code == 0
