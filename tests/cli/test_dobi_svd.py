"""`dobi_svd` on the command line: what is refused, in one line, before anything is read."""

from __future__ import annotations

import json

import pytest


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ("{keep_ratio: 0.0001}", "less than rank 1 takes (516); use at least 0.004"),
        ("{rank: 0}", "rank"),
        ("{rank: 200}", "model.layers.0.self_attn.k_proj: rank=200, but full rank is 128; use less, or skip the layer"),
        ("{keep_ratio: 1.0}", "keep_ratio"),
        ("{update: pca}", "update"),
        ("{lamda: 200}", "lamda"),
    ],
)
def test_what_cannot_be_is_one_line(compress, settings, expected):
    answer = compress("plan", "--recipe", "demo", "--set", f"steps=[{{dobi_svd: {settings}}}]")
    assert expected in answer.error


def test_a_budget_that_groups_cannot_meet_stops_before_learning(compress, tmp_path):
    steps = "steps=[{dobi_svd: {keep_ratio: 0.3, remap: false}}, {gptq: {bits: 4, group_size: 64}}]"
    cut = ("--set", "calibration.samples=4", "--set", "calibration.length=32", "--set", "evaluation=false")
    answer = compress("run", "--recipe", "demo", "--out", tmp_path / "out", "--set", steps, *cut)
    assert answer.code != 0 and "cannot be met: 42 layers at their least ranks" in answer.err.splitlines()[-1]
    assert "learn ranks" not in answer.err


def test_the_plan_says_what_is_settled_later_and_how_much_memory_that_takes(compress):
    own = ("--set", "evaluation=false", "--set", "calibration.batch_size=32")  # else evaluating takes most
    large, small = (
        compress("plan", "--recipe", "demo", "--json", "--set", f"steps=[{{dobi_svd: {{steps: {steps}}}}}]", *own)
        for steps in (8, 0)
    )
    assert large.code == small.code == 0
    whole, block = (json.loads(answer.out) for answer in (large, small))
    assert whole["predicted_peak_bytes"] > block["predicted_peak_bytes"]
    assert whole["predicted_seconds"] > block["predicted_seconds"]
    assert any("settles 42 layers" in warning for warning in whole["warnings"])
    assert 0.79 < whole["bytes_after"] / whole["bytes_before"] <= 0.8
