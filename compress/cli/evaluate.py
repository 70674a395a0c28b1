"""`compress eval`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli.options import (
    ActivationMemory,
    Debug,
    Device,
    IncludePath,
    Json,
    MemoryBudget,
    ModelFolder,
    Quiet,
    RemoteCode,
    Revision,
    check_device,
    parse_size,
    refuse_unfinished,
)
from compress.cli.report import check_page
from compress.cli.task_options import (
    Arithmetic,
    BatchSize,
    Cache,
    ChatTemplate,
    Dtype,
    Limit,
    LogSamples,
    NumFewshot,
    Output,
    Tasks,
    TaskSeed,
    UnsafeCode,
    task_settings,
)

if TYPE_CHECKING:
    from compress.cli.progress import Display
    from compress.evaluation.zeroshot import TaskSettings
    from compress.pipeline.run import Machine
    from compress.recipe import Evaluation

Reference = Annotated[
    str | None,
    typer.Option(
        "--reference",
        metavar="ORIGINAL",
        help="beside this model: KL divergence and top-1 agreement; of tasks, the difference and which answers changed",
    ),
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data", help="a Hub data set, files or `shipped` (repeatable)  [default: shipped]", show_default=False
    ),
]
Split = Annotated[
    str | None, typer.Option("--split", help="split of a Hub data set  [default: test]", show_default=False)
]
Subset = Annotated[str | None, typer.Option("--subset", help="configuration of a Hub data set")]
Column = Annotated[str | None, typer.Option("--column", help="the column that holds the text")]
Length = Annotated[
    int | None,
    typer.Option("--length", help="tokens per window  [default: 2048, or the model's limit]", show_default=False),
]
Stride = Annotated[
    int | None,
    typer.Option("--stride", help="tokens between windows  [default: length: no overlap]", show_default=False),
]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", help="use the head of the text only")]


Speed = Annotated[
    bool,
    typer.Option(
        "--speed", help="also tokens per second and memory, each model whole in memory, as compress bench has it"
    ),
]
Html = Annotated[
    Path | None, typer.Option("--html", metavar="FILE", help="also write what was found as a page to look at")
]


def evaluate(
    model: ModelFolder,
    reference: Reference = None,
    data: Data = None,
    split: Split = None,
    subset: Subset = None,
    column: Column = None,
    length: Length = None,
    stride: Stride = None,
    max_tokens: MaxTokens = None,
    speed: Speed = False,
    html: Html = None,
    tasks: Tasks = None,
    include_path: IncludePath = None,
    num_fewshot: NumFewshot = None,
    limit: Limit = None,
    batch_size: BatchSize = None,
    apply_chat_template: ChatTemplate = False,
    seed: TaskSeed = None,
    dtype: Dtype = "auto",
    arithmetic: Arithmetic = "reference",
    cache: Cache = None,
    output: Output = None,
    log_samples: LogSamples = False,
    confirm_run_unsafe_code: UnsafeCode = False,
    memory_budget: MemoryBudget = None,
    device: Device = "auto",
    activation_memory: ActivationMemory = None,
    revision: Revision = None,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure perplexity on held-out text, and fidelity to the original; or run benchmarks of lm-eval (--tasks).

    For perplexity, blocks are streamed: a whole model is never in memory. For tasks it is, packed if it is compressed.

    \b
    Example:  compress eval out/demo --reference shipped
              compress eval out/demo --reference shipped --tasks arc_easy,hellaswag --limit 200
    """
    text = {
        "data": tuple(data) if data else None, "split": split, "subset": subset, "column": column, "length": length,
        "stride": stride, "max_tokens": max_tokens,
    }  # fmt: skip
    text = {key: value for key, value in text.items() if value is not None}
    wanted = task_settings(
        tasks,
        {
            "include_path": include_path, "num_fewshot": num_fewshot, "limit": limit, "batch_size": batch_size,
            "apply_chat_template": apply_chat_template, "seed": seed, "dtype": dtype, "cache": cache, "output": output,
            "arithmetic": arithmetic, "log_samples": log_samples, "confirm_run_unsafe_code": confirm_run_unsafe_code,
        },
    )  # fmt: skip
    for folder in filter(None, (model, reference)):
        refuse_unfinished(folder)
    if memory_budget is not None and (wanted or speed):
        from compress.errors import RecipeError

        raise RecipeError(
            "--memory-budget: chooses what perplexity is measured of; tasks and speed take the whole model: export it first"
        )
    if html is not None:
        check_page(html)
    from compress.cli.progress import Display
    from compress.cli.show import print_json
    from compress.evaluation.processes import is_main_process
    from compress.pipeline.run import Machine

    activation_bytes = None if activation_memory is None else parse_size(activation_memory, "--activation-memory")
    machine = Machine(check_device(device), activation_bytes)
    places: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    with Display(quiet or not is_main_process()) as display:
        settings = None if wanted and not text else _checked(text)
        scores = _run_tasks(model, reference, wanted, machine, display, places, output) if wanted else {}
        if not is_main_process():
            return
        budget = {**places, "memory_budget": memory_budget}
        found = _perplexity(model, reference, settings, machine, display, budget) if settings else {}
        if speed:
            found["speed"] = _speed(model, reference, machine, display, places)
    if html is not None:
        _write_page(model, reference, places, found, scores, html)
    if output is not None:
        _save(scores, output, log_samples)
    print_json(_for_programs(found, scores, log_samples)) if as_json else print_evaluation(found, scores)


def _checked(text: dict[str, Any]) -> Evaluation:
    from compress.calibration.data import check_data

    with _flags_named():
        settings = _settings(text)
        check_data(settings, "evaluation")
    return settings


def _perplexity(
    model: str, reference: str | None, settings: Evaluation, machine: Machine, display: Display, places: dict[str, Any]
) -> dict[str, Any]:
    from compress.evaluation.evaluate import evaluate as measure

    with _flags_named():
        return measure(model, reference=reference, settings=settings, machine=machine, progress=display, **places)


def _speed(
    model: str, reference: str | None, machine: Machine, display: Display, places: dict[str, Any]
) -> dict[str, Any]:
    from compress.evaluation.speed import measure_speed

    return measure_speed(model, reference=reference, machine=machine, progress=display, **places)


def _write_page(
    model: str, reference: str | None, places: dict[str, Any], found: dict[str, Any], scores: dict[str, Any], html: Path
) -> None:
    from compress.cli.show import note
    from compress.report.write import write_page

    tasks = {"tasks": scores} if scores else {}
    framed = found if "kind" in found else {**_framed(model, reference, places["revision"]), **found}
    write_page({**framed, **tasks}, html)
    note(f"page: {html}")


def _framed(model: str, reference: str | None, revision: str | None) -> dict[str, Any]:
    """What a report without perplexity begins with."""
    from compress.checkpoint.source import find_source
    from compress.evaluation.size import sizes
    from compress.report.frame import frame

    size = sizes(find_source(model, revision), find_source(reference) if reference is not None else None)
    beside = {} if reference is None else {"reference": {"path": reference}}
    return {**frame("evaluation"), "model": {"path": model}, **beside, "size": size}


def _run_tasks(
    model: str, reference: str | None, settings: TaskSettings, machine: Machine, display: Display, places: dict[str, Any],
    output: Path | None,
) -> dict[str, Any]:  # fmt: skip
    from compress.cli.show import note
    from compress.cli.signals import Ended
    from compress.evaluation.zeroshot import check_writable, evaluate_tasks

    if output is not None:
        check_writable(output, "--output")
    try:
        with _flags_named():
            return evaluate_tasks(model, settings, reference=reference, machine=machine, progress=display, **places)
    except Ended:
        display.stop()
        if settings.cache is not None:
            note(f"the answers so far are kept in {settings.cache}; give the same command again to go on")
        raise


def _save(scores: dict[str, Any], output: Path, log_samples: bool) -> None:
    from compress.cli.show import note
    from compress.evaluation.zeroshot import save_results

    for role in ("reference", "model"):
        if role in scores:
            beside = output.with_name(f"{output.stem}_reference.json") if output.suffix == ".json" else output
            place = beside if role == "reference" else output
            note(f"saved {save_results(scores[role], place, log_samples)}")


def _for_programs(found: dict[str, Any], scores: dict[str, Any], log_samples: bool) -> dict[str, Any]:
    """Of perplexity what `compress.evaluate` returns; with tasks lm-eval's own dictionary, and what it has no place for
    under "compress"."""
    if not scores:
        return found
    kept = {
        role: {key: value for key, value in scores[role].items() if key != "samples" or log_samples}
        for role in ("model", "reference")
        if role in scores
    }
    more: dict[str, Any] = {"perplexity": found} if found else {}
    if "comparison" in scores:
        more |= {"reference": kept["reference"], "comparison": scores["comparison"]}
    return {**kept["model"], **({"compress": more} if more else {})}


@contextmanager
def _flags_named() -> Iterator[None]:
    """Errors that speak of a recipe's `evaluation.max_tokens` speak of --max-tokens instead."""
    from compress.errors import RecipeError

    try:
        yield
    except RecipeError as error:
        text = re.sub(r"--set evaluation\.(\w+)=", r"evaluation.\1 ", str(error))
        text = re.sub(r"evaluation\.(\w+)", lambda field: "--" + field[1].replace("_", "-"), text)
        raise RecipeError(text) from error


def _settings(given: dict[str, Any]) -> Evaluation:
    from pydantic import ValidationError

    from compress.errors import RecipeError
    from compress.recipe import Evaluation
    from compress.recipe_errors import one_line

    try:
        return Evaluation(**given)
    except ValidationError as error:
        raise RecipeError(f"evaluation.{one_line(error, Evaluation)}") from None


def print_evaluation(found: dict[str, Any], scores: dict[str, Any]) -> None:
    """Tables on stdout, an empty line between them. `scores`: of tasks."""
    from compress.cli.bench import show_speed
    from compress.cli.scores import comparison_table, scores_table
    from compress.cli.show import out, show

    parts: list[Callable[[], None]] = []
    if "text" in found:
        parts.append(lambda: _print_perplexity(found))
    if "speed" in found:
        parts.append(lambda: show_speed(found["speed"]))
    if scores:
        parts.append(
            lambda: show(comparison_table(scores) if "comparison" in scores else scores_table(scores["model"]))
        )
    for number, part in enumerate(parts):
        if number:
            out("")
        part()


def _print_perplexity(found: dict[str, Any]) -> None:
    from compress.cli.blocks import block_rows, block_table
    from compress.cli.show import human_bytes, out, pairs, show, table
    from compress.cli.summary import described, fidelity_rows

    rows = []
    for role in ("reference", "model"):
        if role in found:
            scores, size = found[role], found["size"][role]
            rows.append((
                scores["path"], f"{scores['perplexity']:.4f}", f"{scores['nll_per_token']:.5f}",
                f"{scores['bits_per_byte']:.5f}", human_bytes(size["bytes_tensors"]), human_bytes(size["bytes_in_memory"]),
            ))  # fmt: skip
    columns = (">perplexity per token", ">nats per token", ">bits per byte", ">weights", ">in memory")
    show(table(("model", *columns), rows))
    out("")
    text = found["text"]
    measured = [
        ("measured on", described(found)),
        ("text", f"{text['text_bytes']:,} bytes, {text['text_tokens']:,} tokens"),
    ]
    if "fidelity" not in found:
        show(pairs(measured))
        return
    show(pairs([*fidelity_rows(found["fidelity"]), *block_rows(found["hidden_states"]), *measured]))
    by_block = block_table(found["hidden_states"])
    if by_block is not None:
        out("")
        show(by_block)
