"""Differences of paired scores, by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.evaluation.paired import compare

scores = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=2, max_size=40)


def results(values: dict[str, list[float]], groups: dict[str, tuple[list[str], float]] | None = None) -> dict[str, Any]:
    """Results as the harness has them, of tasks with one metric, and groups with their value."""
    groups = groups or {}
    figures = {task: sum(v) / len(v) for task, v in values.items()} | {g: value for g, (_, value) in groups.items()}
    return {
        "results": {task: {"alias": task, "acc,none": f, "acc_stderr,none": 0.1} for task, f in figures.items()},
        "group_subtasks": {group: members for group, (members, _) in groups.items()},
        "configs": {task: {"output_type": "generate_until"} for task in values},
        "samples": {
            task: [{"doc_id": i, "doc_hash": str(i), "filter": "none", "acc": v} for i, v in enumerate(listed)]
            for task, listed in values.items()
        },
    }


@given(scores)
def test_differences_flips_and_their_error_are_those_of_the_pairs(pairs: list[tuple[int, int]]) -> None:
    ours, theirs = [float(a) for a, _ in pairs], [float(b) for _, b in pairs]
    (row,) = compare(results({"t": ours}), results({"t": theirs}))
    n = len(pairs)
    mean = sum(a - b for a, b in pairs) / n
    assert row["difference"] == pytest.approx(mean)
    assert row["difference_stderr"] == pytest.approx(
        math.sqrt(sum((a - b - mean) ** 2 for a, b in pairs) / (n - 1) / n)
    )
    assert row["gained"] - row["lost"] == pytest.approx(n * mean)
    assert row["flips"] == pytest.approx((row["gained"] + row["lost"]) / n)


@pytest.mark.parametrize("by_size", [True, False])
def test_a_group_weights_its_tasks_as_its_value_does(by_size: bool) -> None:
    ours, theirs = {"a": [1.0, 0.0, 1.0, 1.0], "b": [0.0, 1.0]}, {"a": [0.0, 0.0, 1.0, 0.0], "b": [1.0, 1.0]}
    weights = {"a": 4 / 6, "b": 2 / 6} if by_size else {"a": 0.5, "b": 0.5}

    def value(of: dict[str, list[float]]) -> float:
        return sum(weights[task] * sum(v) / len(v) for task, v in of.items())

    rows = compare(results(ours, {"g": (["a", "b"], value(ours))}), results(theirs, {"g": (["a", "b"], value(theirs))}))
    a, b, group = rows
    expected = math.hypot(weights["a"] * a["difference_stderr"], weights["b"] * b["difference_stderr"])
    assert group["difference_stderr"] == pytest.approx(expected)
    assert (group["questions"], group["gained"], group["lost"]) == (6, 2, 1)


def test_what_is_no_mean_over_questions_has_no_error() -> None:
    ours, theirs = results({"t": [1.0, 0.0]}), results({"t": [0.0, 0.0]})
    ours["results"]["t"]["acc,none"] = 7.5  # a perplexity, say
    (row,) = compare(ours, theirs)
    assert row["difference"] == 7.5
    assert row["difference_stderr"] is None
    assert "flips" not in row


def test_other_questions_are_not_compared() -> None:
    ours, theirs = results({"t": [1.0, 0.0]}), results({"t": [0.0, 0.0]})
    theirs["samples"]["t"][0]["doc_hash"] = "another question"
    (row,) = compare(ours, theirs)
    assert row["difference_stderr"] is None
