"""drop_blocks as a user meets it: the plan before it looks, what run and report say, and what is refused, in one line."""

from __future__ import annotations

import json
import re

import pytest


def test_the_plan_knows_the_bytes_before_anything_is_chosen(make, compress):
    recipe = make({"drop_blocks": {"n_drop": 1}}, {"rtn": {"bits": 8, "group_size": 32}})
    planned = json.loads(compress("plan", "--recipe", recipe, "--json").out)
    attention = 64 * 64 * 2 + 32 * 64 * 2 + 64 + 32 + 32 + 64  # q and o, k and v, biases
    block = attention + 3 * 64 * 128 + 2 * 64
    assert planned["bytes_total_before"] == 4 * (288 * 64 + 64 + 3 * block)
    assert planned["n_blocks"] == 2 and len(planned["layers"]) == 14
    assert planned["rewrites"][0]["note"] == "leaves out 1 of 3 blocks, chosen by perplexity"
    said = compress("plan", "--recipe", recipe)
    assert "drop_blocks: leaves out 1 of 3 blocks, chosen by perplexity" in " ".join(said.out.split())
    assert "steps.0.drop_blocks looks at the whole model first" in said.err
    settled = json.loads(compress("plan", "--recipe", make({"drop_blocks": {"blocks": [1]}}), "--json").out)
    assert settled["bytes_total_after"] == 4 * (288 * 64 + 64 + 2 * block) and settled["format"] == "plain"


def test_run_says_which_blocks_went_and_the_report_has_their_scores(make, compress, tmp_path):
    recipe = make({"drop_blocks": {"n_drop": 1, "score": "angular_distance"}})
    answer = compress("run", "--recipe", recipe, "--out", tmp_path / "out", "--quiet")
    assert answer.code == 0, answer.err
    report = json.loads((tmp_path / "out" / "compress_report.json").read_text())
    figures = report["rewrites"][0]["figures"]
    (gone,) = figures["blocks"]
    assert f"drop_blocks: leaves out block {gone} of 0 to 2, chosen by angular_distance" in " ".join(answer.out.split())
    scores = figures["rounds"][0]["scores"]
    assert len(scores) == 3 and scores[gone] == min(scores)
    assert "Rewritten first" in (tmp_path / "out" / "compress_report.html").read_text()
    assert compress("inspect", tmp_path / "out").code == 0
    assert compress("generate", tmp_path / "out", "--prompt", "river", "--max-new-tokens", "3").code == 0


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ({"drop_blocks": {}}, "nothing says what goes; give one of n_drop, keep_ratio and blocks"),
        ({"drop_blocks": {"n_drop": 1, "keep_ratio": 0.5}}, "n_drop and keep_ratio are two ways to say what goes"),
        ({"drop_blocks": {"n_drop": 0}}, "greater than or equal to 1"),
        ({"drop_blocks": {"n_drop": 3}}, "n_drop=3, but 2 of 3 blocks can go; use n_drop=2"),
        ({"drop_blocks": {"keep_ratio": 0.1}}, "keep_ratio=0.1 leaves none of 3 blocks; use keep_ratio=0.334 or more"),
        ({"drop_blocks": {"blocks": [3]}}, "3 is no block of this model; they are 0 to 2"),
        ({"drop_blocks": {"blocks": [0, 1, 2]}}, "leaves none"),
        ({"drop_blocks": {"n_drop": 1, "score": "taylor"}}, "protect=[4, 2] keeps all 3 blocks"),
        ({"drop_blocks": {"n_drop": 1, "score": "ppl"}}, "score"),
        ({"drop_blocks": {"n_drop": 1, "selection": "contiguous"}}, "needs score=angular_distance and n_drop"),
        ({"drop_blocks": {"n_drop": 1}, "layers": "*.q_proj"}, "steps.0.layers: drop_blocks rewrites the whole model"),
    ],
)
def test_what_cannot_be_is_refused_in_the_plan_in_one_line(make, compress, step, said):
    assert said in compress("plan", "--recipe", make(step)).error


@pytest.mark.parametrize("more", [{}, {"score": "magnitude", "protect": [1, 1]}])
def test_the_number_that_is_named_works(make, compress, more):
    error = compress("plan", "--recipe", make({"drop_blocks": {"keep_ratio": 0.01, **more}})).error
    named = float(re.search(r"use keep_ratio=([\d.]+)", error)[1])
    assert compress("plan", "--recipe", make({"drop_blocks": {"keep_ratio": named, **more}})).code == 0
