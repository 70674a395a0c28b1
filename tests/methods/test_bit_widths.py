"""widths: bits that differ by layer, at the bytes of one width for all."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from compress.errors import RecipeError
from compress.pipeline.run import run
from tests.runs import recipe_for

WIDTHS = {"bits": 4, "group_size": 32, "widths": [2, 3, 4, 5, 6]}


def bits(report: dict[str, Any]) -> dict[str, int]:
    return {layer["name"]: layer["spec"]["bits"] for layer in report["layers"]}


@pytest.mark.parametrize(
    "step",
    [
        {"rtn": WIDTHS},
        {"gptq": {**WIDTHS, "together": False}},
        {"lut": {"bits": 3, "group_size": 32, "widths": [2, 3, 4], "match": 1.0, "refit": 1}},
    ],
)
def test_the_bytes_are_those_of_one_width_and_the_widths_differ(step: dict[str, Any], tiny, text, tmp_path):
    mixed = run(recipe_for(tiny("llama"), [step], text, evaluation=False), tmp_path / "mixed").report
    (method, settings), *_ = step.items()
    plain = {method: {key: value for key, value in settings.items() if key not in ("widths", "together")}}
    uniform = run(recipe_for(tiny("llama"), [plain], text, evaluation=False), tmp_path / "uniform").report
    assert 0.9 * uniform["bytes_after"] <= mixed["bytes_after"] <= uniform["bytes_after"]
    assert len(set(bits(mixed).values())) > 1 and set(bits(mixed).values()) <= {2, 3, 4, 5, 6}
    if settings.get("together", True):
        by_site: dict[str, Counter[int]] = {}
        for layer in mixed["layers"]:
            by_site.setdefault(layer["site"], Counter())[layer["spec"]["bits"]] += 1
        assert all(len(counts) == 1 for counts in by_site.values())


def test_what_it_expects_to_lose_is_less_than_with_one_width(tiny, text, tmp_path, monkeypatch):
    seen: dict[str, dict[int, float]] = {}
    from compress.methods import bit_widths

    chosen = bit_widths._chosen

    def look(method, view, configs, costs, sites):
        seen.update(costs)
        return chosen(method, view, configs, costs, sites)

    monkeypatch.setattr(bit_widths, "_chosen", look)
    step = {"rtn": {**WIDTHS, "together": False}}
    report = run(recipe_for(tiny("llama"), [step], text, evaluation=False), tmp_path / "mixed").report
    own = bits(report)
    assert seen.keys() == own.keys()
    assert all(costs[2] > costs[4] > costs[6] > 0 for costs in seen.values())
    assert sum(seen[name][own[name]] for name in own) < sum(costs[4] for costs in seen.values())


def test_widths_that_cannot_meet_the_bytes_are_refused_in_the_plan(tiny, text, tmp_path):
    with pytest.raises(RecipeError, match="give widths that begin below bits"):
        run(recipe_for(tiny("llama"), [{"gptq": {**WIDTHS, "widths": [5, 6]}}], text), tmp_path / "out")
