"""svd as a user meets it: what plan and report say, and where it is refused."""

from __future__ import annotations

import json

import pytest


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


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ({"svd": {"allocation": "fisher"}}, "steps.0.svd.allocation: "),
        ({"svd": {"allocation": "loss", "objective": "plain"}}, "allocation=loss needs to know the outputs' errors"),
        (
            {"svd": {"allocation": "energy", "keep_ratio": 0.2, "rank_multiple": 8}},
            "steps.0.svd: a budget of 88,473 bytes cannot be met: 21 layers at their least ranks (a multiple of 8) take 98,304; "
            "use a keep_ratio of at least 0.2223, smaller groups, or leave layers out",
        ),
        (
            {"svd": {"allocation": "lorap"}, "layers": "*.mlp.*"},
            "steps.0.svd: allocation=lorap shares bytes among q, k, v and o of attention, but not all four are layers of",
        ),
        (
            {"svd": {"allocation": "loss"}, "overrides": {"*.q_proj": {"allocation": "energy"}}},
            "but one budget is spent by one rule; use two steps",
        ),
    ],
)
def test_budgets_that_cannot_be_are_refused_in_the_plan(make, compress, step, said):
    assert said in compress("plan", "--recipe", make(step)).error


def test_ranks_that_a_budget_settles(make, compress, tmp_path):
    """The plan has the total and what will be looked at; the report has the ranks."""
    recipe = make({"svd": {"keep_ratio": 0.6, "allocation": "loss"}}, evaluation=False)
    planned = json.loads(compress("plan", "--recipe", recipe, "--json").out)
    assert 0.57 < planned["bytes_after"] / planned["bytes_before"] <= 0.6
    assert any("steps.0.svd settles 21 layers once it has seen the whole model" in said for said in planned["warnings"])
    answer = compress("run", "--recipe", recipe, "--out", tmp_path / "out", "--json")
    assert (
        "svd: ranks settled by allocation=loss: " in answer.err and "svd: expected to raise the loss by" in answer.err
    )
    report = json.loads(answer.out)
    assert len({layer["figures"]["rank"] for layer in report["layers"]}) > 5
    assert report["bytes_after"] <= 0.6 * planned["bytes_before"]
    assert not any("settles" in said for said in report["warnings"])
    again = compress("run", "--recipe", recipe, "--out", tmp_path / "out", "--json")
    assert json.loads(again.out)["bytes_after"] == report["bytes_after"]
    assert compress("generate", tmp_path / "out", "--prompt", "stone", "--max-new-tokens", "3").code == 0


def test_the_plan_has_the_memory_of_looking_at_the_whole_model(compress):
    own = ("--set", "evaluation=false", "--set", "calibration.batch_size=32")  # else other parts take most
    peaks = {}
    for allocation in ("uniform", "energy", "loss"):
        steps = f"steps=[{{svd: {{allocation: {allocation}}}}}]"
        planned = json.loads(compress("plan", "--recipe", "demo", "--json", "--set", steps, *own).out)
        peaks[allocation] = planned["predicted_peak_bytes"]
    assert peaks["energy"] == pytest.approx(peaks["uniform"], rel=0.01)
    assert peaks["loss"] > 1.2 * peaks["uniform"]
