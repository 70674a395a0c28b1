"""Benchmarks of lm-eval (the EleutherAI harness) on a model, original or compressed, alone or beside another.

Prompts, metrics and standard errors are the harness's own, and so is the form of the results. The model is the whole of
it in memory, compressed ones packed, loaded by `compress.load`; of two models, one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint.source import Source, find_source
from compress.errors import RecipeError
from compress.evaluation.harness.results import check_writable, save_results
from compress.evaluation.harness.runner import Harness, TaskSettings, check_template
from compress.pipeline.progress import Progress

if TYPE_CHECKING:
    from compress.pipeline.run import Machine
    from compress.recipe import Evaluation

__all__ = ["TaskSettings", "check_tasks", "check_writable", "evaluate_tasks", "evaluate_tasks_of_run", "save_results"]

REPORTED = (  # of the harness's results, in the report of a run: neither questions nor anything about the machine
    "results", "groups", "group_subtasks", "versions", "n-shot", "higher_is_better", "n-samples", "lm_eval_version",
    "chat_template_sha",
)  # fmt: skip


def evaluate_tasks(
    model: str | Path,
    tasks: Sequence[str] | TaskSettings,
    *,
    reference: str | Path | None = None,
    machine: Machine | None = None,
    progress: Progress | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Run tasks on `model`, and on `reference` if there is one.

    Args:
        model, reference: folders, Hub ids or "shipped", original or compressed.
        tasks: names of lm-eval's tasks, groups or tags, or YAML files; or all settings.

    Returns: {"model": results in the form of lm-eval, "samples" (every question) included, and with a reference
        "reference": the same, "comparison": `compress.evaluation.paired.compare`}. In a process that is not the first of
        several: {}.
    Raises: RecipeError, CheckpointError, NumericsError with the remedy.
    """
    settings = tasks if isinstance(tasks, TaskSettings) else TaskSettings(tuple(tasks))
    if not settings.tasks:
        raise RecipeError("evaluation.tasks: names no task; list them with: compress tasks")
    if settings.cache is not None:
        check_writable(settings.cache, "--cache")
    sources = [(model, revision)] if reference is None else [(model, revision), (reference, None)]
    found = [find_source(str(path), wanted) for path, wanted in sources]
    harness = Harness(settings, machine, progress, trust_remote_code)
    loaded = harness.load(str(model))
    try:
        return _together([harness.run(source, loaded) for source in found])
    finally:
        harness.part()


def evaluate_tasks_of_run(
    settings: Evaluation, model: Path, reference: Path, machine: Machine, progress: Progress, trust_remote_code: bool
) -> dict[str, Any]:
    """The tasks of a recipe on the result and the original: what of it belongs into a report."""
    found = evaluate_tasks(
        model, TaskSettings.of_recipe(settings), reference=reference, machine=machine, progress=progress,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    reported = {
        role: {key: found[role][key] for key in REPORTED if key in found[role]} for role in ("model", "reference")
    }
    return {**reported, "comparison": found["comparison"]}


def check_tasks(settings: Evaluation, model: Source, progress: Progress, trust_remote_code: bool) -> None:
    """Load the tasks of a recipe, before hours are spent on what they are to measure. Raises: RecipeError."""
    wanted = TaskSettings.of_recipe(settings)
    harness = Harness(wanted, None, progress, trust_remote_code)
    harness.load(model.name)
    if wanted.apply_chat_template:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(
                str(model.folder or model.name), revision=model.revision, trust_remote_code=trust_remote_code
            )
        except Exception:  # what is wrong with its files is said when they are fetched
            return
        check_template(tokenizer, model.name)


def _together(results: list[dict[str, Any]]) -> dict[str, Any]:
    if not results[0]:
        return {}
    if len(results) == 1:
        return {"model": results[0]}
    from compress.evaluation.paired import compare

    return {"model": results[0], "reference": results[1], "comparison": compare(*results)}
