"""The options of `compress eval` that are about tasks, checked before anything slow is imported."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli.options import check_arithmetic
from compress.errors import RecipeError

if TYPE_CHECKING:
    from compress.evaluation.zeroshot import TaskSettings

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEFAULTS = {"dtype": "auto", "arithmetic": "reference"}  # the others' are nothing
N_SEEDS = 4  # python, numpy, torch, few-shot


Tasks = Annotated[
    list[str] | None,
    typer.Option(
        "--tasks",
        metavar="NAME,…",
        help="run these benchmarks of lm-eval, or YAML files of tasks, instead of perplexity; with --data (or another "
        "option of the text) perplexity as well; `compress tasks` lists the names (repeatable)",
    ),
]
NumFewshot = Annotated[
    int | None,
    typer.Option(
        "--num-fewshot",
        min=0,
        help="solved examples in front of each question  [default: as the task says]",
        show_default=False,
    ),
]
Limit = Annotated[
    float | None,
    typer.Option(
        "--limit", help="so many questions of each task; below 1 a share of them  [default: all]", show_default=False
    ),
]
BatchSize = Annotated[
    str | None,
    typer.Option(
        "--batch-size",
        metavar="N|auto",
        help="requests of tasks that run together  [default: auto on a GPU, 8 on a CPU]",
        show_default=False,
    ),
]
ChatTemplate = Annotated[
    bool, typer.Option("--apply-chat-template", help="put the questions of tasks as messages of a chat")
]
TaskSeed = Annotated[
    str | None,
    typer.Option(
        "--seed",
        metavar="N|N,N,N,N",
        help="of tasks: one, or those of python, numpy, torch, few-shot; `none` leaves one unset  [default: 0,1234,1234,1234]",
        show_default=False,
    ),
]
Dtype = Annotated[
    str,
    typer.Option("--dtype", help="of the arithmetic of tasks: auto (as in the checkpoint), float32, bfloat16, float16"),
]
Arithmetic = Annotated[
    str,
    typer.Option(
        "--arithmetic",
        metavar="reference|float|int8",
        help="of quantized layers in tasks, on a CPU: torch alone, or native kernels; perplexity is always measured exactly",
    ),
]
Cache = Annotated[
    Path | None,
    typer.Option("--cache", metavar="DIR", help="keep the answers to tasks there; an interrupted evaluation goes on"),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output", metavar="DIR|FILE.json", help="save the results of tasks there, as lm-eval does (--output_path)"
    ),
]
LogSamples = Annotated[
    bool, typer.Option("--log-samples", help="save each question and answer beside the results of --output")
]
UnsafeCode = Annotated[
    bool, typer.Option("--confirm-run-unsafe-code", help="run tasks that execute what the model writes")
]


def task_settings(tasks: Sequence[str] | None, given: dict[str, Any]) -> TaskSettings | None:
    """What the command line asks of tasks; None if it names none.

    Raises: RecipeError for a value that makes no sense, or an option of tasks where there are none.
    """
    if not tasks:
        idle = [key for key, value in given.items() if value not in (None, False, DEFAULTS.get(key))]
        if idle:
            raise RecipeError(f"--{idle[0].replace('_', '-')}: is about tasks, and there are none; add --tasks NAME")
        return None
    names = tuple(name.strip() for listed in tasks for name in listed.split(",") if name.strip())
    if not names:
        raise RecipeError("--tasks: names no task; list them with: compress tasks")
    limit = given["limit"]
    if limit is not None and (limit <= 0 or (limit > 1 and limit != int(limit))):
        raise RecipeError(f"--limit {limit:g}: use a whole number of questions, or a share between 0 and 1")
    if given["dtype"] not in DTYPES:
        raise RecipeError(f"--dtype {given['dtype']}: choose one of {', '.join(DTYPES)}")
    check_arithmetic(given["arithmetic"])
    if given["log_samples"] and given["output"] is None:
        raise RecipeError("--log-samples: needs a place to write to; add --output DIR")
    seeds, size = _seeds(given["seed"]), _batch_size(given["batch_size"])
    from compress.evaluation.zeroshot import TaskSettings

    return TaskSettings(
        names, tuple(given["include_path"] or ()), given["num_fewshot"], limit, size, given["apply_chat_template"],
        **({} if seeds is None else {"seeds": seeds}), dtype=given["dtype"], cache=given["cache"], arithmetic=given["arithmetic"],
        confirm_run_unsafe_code=given["confirm_run_unsafe_code"],
    )  # fmt: skip


def _batch_size(text: str | None) -> int | str | None:
    if text is None or re.fullmatch(r"auto(:[1-9]\d*)?", text):
        return text
    if not re.fullmatch(r"[1-9]\d*", text):
        raise RecipeError(f"--batch-size {text}: use a number from 1 on, auto, or auto:N to look for one N times")
    return int(text)


def _seeds(text: str | None) -> Any:
    """As lm-eval reads its --seed: one number for all four, or four with `none` for those to leave alone."""
    if text is None:
        return None
    parts = [part.strip().lower() for part in text.split(",")]
    if len(parts) not in (1, N_SEEDS) or not all(re.fullmatch(r"none|\d+", part) for part in parts):
        raise RecipeError(
            f"--seed {text}: use one whole number, or four (python, numpy, torch, few-shot): 0,1234,1234,1234"
        )
    seeds = [None if part == "none" else int(part) for part in parts]
    return tuple(seeds * N_SEEDS if len(seeds) == 1 else seeds)
