"""Scores of tasks, as tables: those of one model, or of two side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from compress.cli.show import table

ARROWS = {True: "↑", False: "↓"}  # which way is better


def scores_table(results: Mapping[str, Any]) -> Table:
    """A row for each task and metric: value and standard error, as the harness gives them."""
    from compress.evaluation.paired import metrics_of

    rows: list[Sequence[str]] = []
    for task, scores in results["results"].items():
        for first, key in enumerate(metrics_of(scores)):
            metric, _, filtered = key.partition(",")
            error = scores.get(f"{metric}_stderr,{filtered}")
            rows.append((
                "" if first else _alias(scores, task), "" if first else str(results["n-shot"].get(task, "")),
                "" if first else _count(results, task), _metric(metric, filtered, task, results),
                f"{scores[key]:.4f}", _error(error),
            ))  # fmt: skip
    return table(("task", ">shots", ">questions", "metric", ">value", ">standard error"), rows)


def comparison_table(found: Mapping[str, Any]) -> Table:
    """A row for each task and metric of two models."""
    results = found["model"]
    rows: list[Sequence[str]] = []
    last = ""
    for row in found["comparison"]:
        task, metric, filtered = row["task"], row["metric"], row["filter"]
        known = row.get("flips") is not None
        rows.append((
            "" if task == last else _alias(results["results"][task], task),
            "" if task == last else str(results["n-shot"].get(task, "")),
            "" if task == last else _count(results, task), _metric(metric, filtered, task, results),
            *(_with_error(found[role], task, metric, filtered, row[role]) for role in ("reference", "model")),
            f"{row['difference']:+.4f}" + _plus_minus(row["difference_stderr"]),
            f"{100 * row['flips']:.1f} % (+{row['gained']} −{row['lost']})" if known else "–",
            f"{100 * row['same_choice']:.1f} %" if "same_choice" in row else "–",
        ))  # fmt: skip
        last = task
    columns = ("task", ">shots", ">questions", "metric", ">original", ">model", ">difference", ">flips", ">same choice")
    return table(columns, rows)


def _alias(scores: Mapping[str, Any], task: str) -> str:
    return str(scores.get("alias") or task)


def _metric(metric: str, filtered: str, task: str, results: Mapping[str, Any]) -> str:
    arrow = ARROWS.get(results["higher_is_better"].get(task, {}).get(metric), "")
    return " ".join(filter(None, [metric, "" if filtered == "none" else f"({filtered})", arrow]))


def _count(results: Mapping[str, Any], task: str) -> str:
    counted = results.get("n-samples", {}).get(task)
    return f"{counted['effective']:,}" if counted else ""


def _error(error: Any) -> str:
    return f"± {error:.4f}" if isinstance(error, float) else "–"


def _plus_minus(error: float | None) -> str:
    return "" if error is None else f" ± {error:.4f}"


def _with_error(results: Mapping[str, Any], task: str, metric: str, filtered: str, value: float) -> str:
    error = results["results"][task].get(f"{metric}_stderr,{filtered}")
    return f"{value:.4f}" + _plus_minus(error if isinstance(error, float) else None)


def task_rows(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """For the table of a run: what, before, after, after / before, remark."""
    rows: list[tuple[str, ...]] = []
    for row in found["comparison"]:
        filtered = "" if row["filter"] == "none" else f" ({row['filter']})"
        remark = f"difference {row['difference']:+.4f}{_plus_minus(row['difference_stderr'])}"
        if row.get("flips") is not None:
            remark += f", {100 * row['flips']:.1f} % of {row['questions']:,} questions changed"
        ratio = f"{100 * row['model'] / row['reference']:.1f} %" if row["reference"] else "–"
        rows.append(
            (
                f"{row['task']} {row['metric']}{filtered}",
                f"{row['reference']:.4f}",
                f"{row['model']:.4f}",
                ratio,
                remark,
            )
        )
    return rows
