"""lq_signround: what it learns beside the codes, and what a run makes of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compress.errors import RecipeError
from compress.methods.lq_signround import LQSignRoundConfig
from compress.pipeline.run import run
from tests.methods.test_signround import figures, same, tensors
from tests.runs import recipe_for

GRID = {"bits": 2, "group_size": 32, "rank": 4, "signed_scales": True}


def test_no_iterations_are_the_start(tiny, text, tmp_path):
    run(recipe_for(tiny("llama"), [{"lqer": GRID}], text, evaluation=False), tmp_path / "start")
    step = {"lq_signround": {**GRID, "iterations": 0}}
    learned = run(recipe_for(tiny("llama"), [step], text, evaluation=False), tmp_path / "a")
    assert same(tmp_path / "start", tmp_path / "a")
    assert all(found["moved"] == 0 and found["block_error"] == found["block_error_start"] for found in figures(learned))


def test_a_block_is_closer_to_the_original_than_its_start(tiny, text, tmp_path):
    kept: dict[str, Any] = {}
    for name, settings in {"pair": {}, "codes": {"factor_lr": 0, "learn_ranges": False}}.items():
        step = {"lq_signround": {**GRID, "iterations": 12, "batch_rows": 4, "quantizer": "rtn", **settings}}
        found = figures(run(recipe_for(tiny("llama"), [step], text, evaluation=False), tmp_path / name))
        assert all(f["block_error"] <= f["block_error_start"] for f in found)
        assert any(f["block_error"] < 0.97 * f["block_error_start"] and f["moved"] > 0 for f in found)
        kept[name] = tensors(tmp_path / name)
    run(recipe_for(tiny("llama"), [{"lqer": {**GRID, "quantizer": "rtn"}}], text, evaluation=False), tmp_path / "start")
    start = tensors(tmp_path / "start")
    first = [name for name in start if ".layers.0." in name and (".right." in name or ".left." in name)]
    assert first and all(torch.equal(start[name], kept["codes"][name]) for name in first)
    assert any(not torch.equal(start[name], kept["pair"][name]) for name in first)


def test_settings_that_must_not_differ_or_have_no_codes_are_refused(tiny, text, tmp_path):
    step = {"lq_signround": GRID, "overrides": {"*.q_proj": {"iterations": 3}}}
    with pytest.raises(RecipeError, match="iterations is 200"):
        run(recipe_for(tiny("llama"), [step], text, evaluation=False), tmp_path / "out")
    with pytest.raises(ValueError, match="factor_bits"):
        LQSignRoundConfig(factor_bits=16)
