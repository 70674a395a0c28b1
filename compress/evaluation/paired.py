"""Two models on the same questions: the difference of their scores, how sure it is, and how many answers changed.

The questions are the same, so their difficulty cancels: with d_i = score_i(model) - score_i(reference),

    difference  mean d_i
    stderr      sd(d_i) / sqrt(n)      far smaller than the two scores' own errors put together
    flips       the share of questions with d_i != 0: a model can lose nothing on average and still answer others
                (Dutta et al., 2024, "Accuracy is Not All You Need", arXiv:2407.09141)

A group that averages its tasks gets theirs, weighted as it weights them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, TypeGuard

CLOSE = 1e-9  # a mean computed twice


def compare(model: Mapping[str, Any], reference: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for every task and metric that both have.

    Args:
        model, reference: results of the harness, samples included.

    Returns: rows with "task", "metric", "filter", "model", "reference", "difference", "difference_stderr" (None where
        the score is no mean over questions), "questions", and for those "flips", "gained", "lost"; "same_choice" where
        one of several answers is chosen: the share of questions on which both choose the same.
    """
    rows = []
    for task, scores in model["results"].items():
        for key in metrics_of(scores):
            theirs = reference["results"].get(task, {}).get(key)
            if isinstance(theirs, int | float):
                rows.append(_row(task, key, scores[key], theirs, model, reference))
    return rows


def metrics_of(scores: Mapping[str, Any]) -> list[str]:
    """The keys of a task's scores that are figures: "acc,none"; not their errors."""
    return [
        key for key, value in scores.items()
        if "," in key and "_stderr" not in key.partition(",")[0] and isinstance(value, int | float)
    ]  # fmt: skip


def _row(
    task: str, key: str, score: float, theirs: float, model: Mapping[str, Any], reference: Mapping[str, Any]
) -> dict[str, Any]:
    metric, _, filtered = key.partition(",")
    row: dict[str, Any] = {
        "task": task, "metric": metric, "filter": filtered, "model": score, "reference": theirs,
        "difference": score - theirs, "difference_stderr": None,
    }  # fmt: skip
    members = model.get("group_subtasks", {}).get(task)
    if members:
        row.update(_of_group(_leaves(members, model), metric, filtered, row["difference"], model, reference))
        return row
    pairs = _pairs(task, metric, filtered, model, reference)
    if not pairs:
        return row
    row["questions"] = len(pairs)
    changes = [ours - old for ours, old in pairs]
    if math.isclose(fmean(changes), row["difference"], abs_tol=CLOSE):
        row["difference_stderr"] = _stderr(changes)
        row["flips"] = sum(change != 0 for change in changes) / len(changes)
        row["gained"], row["lost"] = sum(change > 0 for change in changes), sum(change < 0 for change in changes)
    same = _same_choice(task, filtered, model, reference)
    if same is not None:
        row["same_choice"] = same
    return row


def _stderr(changes: Sequence[float]) -> float | None:
    return stdev(changes) / math.sqrt(len(changes)) if len(changes) > 1 else None


def _samples(task: str, filtered: str, results: Mapping[str, Any]) -> dict[tuple[int, str], Mapping[str, Any]]:
    return {(s["doc_id"], s["doc_hash"]): s for s in results["samples"].get(task, ()) if s["filter"] == filtered}


def _pairs(
    task: str, metric: str, filtered: str, model: Mapping[str, Any], reference: Mapping[str, Any]
) -> list[tuple[float, float]]:
    """Scores of the two on each question; none where a question has no score of its own."""
    ours, theirs = _samples(task, filtered, model), _samples(task, filtered, reference)
    pairs = [(ours[q].get(metric), theirs[q].get(metric)) for q in ours if q in theirs]
    scored = [(float(a), float(b)) for a, b in pairs if _is_score(a) and _is_score(b)]
    return scored if len(scored) == len(ours) else []


def _is_score(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float)


def _same_choice(task: str, filtered: str, model: Mapping[str, Any], reference: Mapping[str, Any]) -> float | None:
    if model["configs"].get(task, {}).get("output_type") != "multiple_choice":
        return None
    ours, theirs = _samples(task, filtered, model), _samples(task, filtered, reference)
    return fmean(_choice(sample) == _choice(theirs[q]) for q, sample in ours.items())


def _choice(sample: Mapping[str, Any]) -> int:
    """The likeliest of the answers, as `acc` takes it."""
    likelihoods = [float(response[0]) for response in sample["filtered_resps"]]
    if "acc_mutual_info" in sample["metrics"]:  # the second half are the answers without their question
        likelihoods = likelihoods[: len(likelihoods) // 2]
    return likelihoods.index(max(likelihoods))


def _leaves(members: Sequence[str], results: Mapping[str, Any]) -> list[str]:
    subtasks = results["group_subtasks"]
    return [leaf for m in members for leaf in (_leaves(subtasks[m], results) if subtasks.get(m) else [m])]


def _of_group(
    tasks: Sequence[str], metric: str, filtered: str, difference: float, model: Mapping[str, Any], reference: Mapping[str, Any]
) -> dict[str, Any]:  # fmt: skip
    """Figures of a group from its tasks', if they are averaged, over questions or over tasks."""
    pairs = [_pairs(task, metric, filtered, model, reference) for task in tasks]
    if not all(len(p) > 1 for p in pairs):
        return {}
    changes = [[ours - old for ours, old in p] for p in pairs]
    total = sum(map(len, changes))
    for weights in ([len(c) / total for c in changes], [1 / len(changes)] * len(changes)):
        if math.isclose(sum(w * fmean(c) for w, c in zip(weights, changes, strict=True)), difference, abs_tol=CLOSE):
            variance = sum((w * (_stderr(c) or 0.0)) ** 2 for w, c in zip(weights, changes, strict=True))
            flat = [change for c in changes for change in c]
            return {
                "difference_stderr": math.sqrt(variance), "questions": total, "flips": sum(c != 0 for c in flat) / total,
                "gained": sum(c > 0 for c in flat), "lost": sum(c < 0 for c in flat),
            }  # fmt: skip
    return {}
