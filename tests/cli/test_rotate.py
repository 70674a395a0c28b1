"""rotate as a user meets it: what the plan says, where it is refused, and what becomes of the result."""

from __future__ import annotations

import json
from functools import partial

import pytest


@pytest.fixture
def make(make):
    return partial(make, family="llama", evaluation=False)


def test_plan_says_what_is_rotated_and_what_it_costs(make, compress):
    recipe = make({"rotate": {}}, {"rtn": {"bits": 4, "group_size": 16}}, family="llama_gqa_tied")
    planned = json.loads(compress("plan", "--recipe", recipe, "--json").out)
    assert planned["format"] == "compressed-tensors"
    note = "R1 random hadamard [64]; R2 random hadamard [16] in 3 blocks; the head gets its own 288 x 64 weights"
    assert planned["rewrites"][0]["note"] == note
    assert len(planned["layers"]) == 21
    shown = compress("plan", "--recipe", recipe)
    assert "R1 random hadamard" in " ".join((shown.out + shown.err).split())


def test_what_is_online_needs_our_format(make, compress):
    planned = json.loads(compress("plan", "--recipe", make({"rotate": {"online": ["mlp"]}}), "--json").out)
    assert planned["format"] == "compress"
    assert "transformed while the model runs" in planned["format_reason"]
    forced = make({"rotate": {"online": ["mlp"]}}, output={"format": "compressed-tensors"})
    refused = compress("plan", "--recipe", forced)
    assert refused.code != 0 and "transformed while the model runs" in refused.err


def test_learning_is_in_the_memory_that_is_planned(make, compress):
    plain, learned = (
        json.loads(compress("plan", "--recipe", make({"rotate": settings}), "--json").out)
        for settings in ({}, {"learn": 10, "group_size": 16})
    )
    weights = 4 * (2 * 288 * 64 + 3 * (4 * 64 * 64 + 3 * 64 * 128))
    assert learned["predicted_peak_bytes"] >= plain["predicted_peak_bytes"] + weights
    assert learned["predicted_seconds"] > plain["predicted_seconds"]


@pytest.mark.parametrize(
    ("family", "steps", "message"),
    [
        ("gemma2", [{"rotate": {}}], "Gemma 2 (gemma2): its norms behind attention and MLP"),
        ("opt_post_norm", [{"rotate": {}}], "its token table has 32 columns"),
        ("llama", [{"rotate": {"block_size": 48}}], "use one of [2, 4, 8, 16, 32, 64]"),
        ("llama", [{"rotate": {"bits": 3}}], "bits is for candidates and learn"),
        ("llama", [{"rotate": {"r1": "none", "r2": "none"}}], "rotates nothing"),
        ("llama", [{"rtn": {"bits": 4, "group_size": 16}}, {"rotate": {}}], "put it first"),
        ("llama", [{"rotate": {}, "layers": "*.q_proj"}], "leave layers out"),
        ("mixtral", [{"rotate": {"online": ["mlp"]}}], "experts are not transformed"),
    ],
)
def test_refusals(family, steps, message, make, compress):
    shown = compress("plan", "--recipe", make(*steps, family=family))
    assert shown.code != 0
    assert message in " ".join(shown.err.split())
    assert "Traceback" not in shown.err


def test_run_generate_inspect_and_export(make, compress, tmp_path):
    out = tmp_path / "out"
    recipe = make(
        {"rotate": {"candidates": 2, "learn": 2, "group_size": 16, "online": ["mlp"]}},
        {"gptq": {"bits": 4, "group_size": 16}},
    )
    done = compress("run", "--recipe", recipe, "--out", out)
    assert done.code == 0
    assert "loss of the calibration tokens, weights rounded" in " ".join((done.out + done.err).split())
    figures = json.loads((out / "compress_report.json").read_text())["rewrites"][0]["figures"]
    assert set(figures) == {"candidate", "learned", "losses", "loss_learned"}
    assert compress("generate", out, "--prompt", "It was", "--max-new-tokens", "4").code == 0
    assert compress("inspect", out).code == 0
    refused = compress("export", out, "--format", "dense", "--out", tmp_path / "dense")
    assert refused.code != 0 and "Traceback" not in refused.err
