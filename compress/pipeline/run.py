"""The whole run: plan, stages, finished folder, evaluation, report."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint.headers import sampled_digest
from compress.errors import CheckpointError, RecipeError, naming
from compress.pipeline.estimate import PROBE_TOKENS, available_memory, spilled_bytes
from compress.pipeline.journal import DEVICE, DTYPE, Journal, check_free, folder_lock, open_journal
from compress.pipeline.meter import Meter
from compress.pipeline.output import (
    CONFIG,
    PAGE,
    WORK_FOLDER,
    check_output,
    discard,
    finished_report,
    leave,
    note_files,
)
from compress.pipeline.plan import Plan, plan
from compress.pipeline.progress import Progress, Silent
from compress.pipeline.report import build_report, evaluation_differs, measured_again, write_page_of, write_report
from compress.recipe import Recipe

if TYPE_CHECKING:
    from compress.publish.hub import Pushed

ACTIVATION_SHARE = 4  # a quarter of the available memory may hold activations; more goes to disk
DISK_SLACK = 4 * 2**20  # for all that is not weights …
DISK_SHARE = 0.01  # … and this share of the weights, for what a file system needs itself


@dataclass(frozen=True)
class Machine:
    """What describes the machine and not the result. `device` "auto": cuda if there is one.

    `activation_bytes`: memory for activations between computations, beyond which they go to disk (in the output folder);
    by default a quarter of what is available.
    """

    device: str = "auto"
    activation_bytes: int | None = None


@dataclass(frozen=True)
class RunResult:
    """Where the result lies, what was planned, what was measured, and where it was published."""

    folder: Path
    plan: Plan
    report: dict[str, Any]
    already_finished: bool = False
    evaluated_again: bool = False  # it was finished, but the recipe asked for other measurements
    pushed: Pushed | None = None


def run(
    recipe: Recipe | str | Path,
    out: str | Path | None = None,
    *,
    machine: Machine | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    on_plan: Callable[[Plan], None] | None = None,
) -> RunResult:
    """Compress a model as the recipe says, or go on with a run that was interrupted.

    Args:
        recipe: a Recipe, a file, or the name of a shipped recipe.
        out: the folder of the result; by default the recipe's `output.path`.
        overwrite: discard what an earlier run of ours left in `out`.
        on_plan: called with the plan before anything is written.

    Raises: RecipeError, CheckpointError, NumericsError: one line with the remedy. Finished blocks are kept.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    machine, progress = machine or Machine(), progress or Silent()
    folder = Path(out or recipe.output.path or Path("out") / "compressed").expanduser()
    meter = Meter()
    try:
        with meter.phase("plan"):
            check_output(folder, recipe.model.path)
            check_free(folder)
            planned = plan(recipe)
            stored = None if overwrite else finished_report(folder, work_header(planned))
            if stored is None:
                check_room(planned, folder, machine, progress)
            _check_push(planned)
            if stored is None or evaluation_differs(planned, stored):
                _check_tasks(planned, progress)
        if on_plan is not None:
            on_plan(planned)
        measured = stored is not None and not evaluation_differs(planned, stored)
        if stored is not None and measured and not (folder / WORK_FOLDER).exists():
            result = RunResult(folder, planned, stored, already_finished=True)
        else:
            with folder_lock(folder):
                result = _run_locked(planned, folder, machine, overwrite, progress, meter)
        return replace(result, pushed=_push(planned, folder, progress))
    finally:
        meter.stop()


def _check_push(planned: Plan) -> None:
    """A run of hours must not end at a wrong token or a name that is taken. Raises: CheckpointError, RecipeError."""
    wanted = planned.recipe.output.push_to_hub
    if wanted is not None:
        from compress.publish.hub import check_push

        base = wanted.base_model or planned.source.published["id"]
        with naming("output.push_to_hub"):
            check_push(wanted.repo, wanted.revision, base, work_header(planned)["weights"], wanted.overwrite)


def _check_tasks(planned: Plan, progress: Progress) -> None:
    """Nor at a benchmark that does not exist, or whose questions are out of reach. Raises: RecipeError."""
    wanted = planned.recipe.evaluation
    if wanted and wanted.tasks:
        from compress.evaluation.zeroshot import check_tasks

        check_tasks(wanted, planned.source, progress, planned.recipe.model.trust_remote_code)


def _push(planned: Plan, folder: Path, progress: Progress) -> Pushed | None:
    """Publish the finished folder, if the recipe says so."""
    wanted = planned.recipe.output.push_to_hub
    if wanted is None:
        return None
    from compress.publish.hub import push

    with naming(f"{folder} is finished, but could not be pushed"):
        return push(folder, **wanted.model_dump(), note=progress.note)


def _run_locked(
    planned: Plan, folder: Path, machine: Machine, overwrite: bool, progress: Progress, meter: Meter
) -> RunResult:
    from compress.pipeline.finish import result_files
    from compress.pipeline.stacking import stack_files

    header = work_header(planned)
    stored = None if overwrite else finished_report(folder, header)
    with meter.phase("fetch"):
        source = planned.source.fetch(progress.note)
    if stored is not None:
        return _measure_again(planned, source, folder, stored, machine, progress, meter)
    with meter.phase("compress"):
        place = compute_place(planned, machine)  # all that can be refused is, before anything is discarded
        batches = calibration_batches(planned, source)
        if overwrite:
            discard(folder)
        content = {"calibration text": _fingerprint(batches), "content of the model": sampled_digest(source)}
        journal = open_journal(folder, {**header, **content, **place_header(*place)})
    with meter.phase("observe"):
        planned = _settle(planned, source, folder, journal, batches, machine, progress)
    with meter.phase("compress"):
        note_files(folder, result_files(planned, source))
        details = _finished_details(planned, folder, journal, progress)
        if details is None:
            details = _compress(planned, source, folder, journal, batches, machine, progress)
    details["calibration_tokens"] = sum(ids.numel() for ids in batches) if planned.needs_data else 0
    evaluation = _evaluate(planned, source, folder, machine, progress, meter)
    names = [*result_files(planned, source), *stack_files(folder)]
    report = build_report(planned, folder, header, details, evaluation, meter, names)
    write_report(folder, report, progress)
    leave(folder)
    return RunResult(folder, planned, report)


def _evaluate(
    planned: Plan, source: Path, folder: Path, machine: Machine, progress: Progress, meter: Meter
) -> dict[str, Any]:
    if not planned.recipe.evaluation:
        return {}
    from compress.evaluation.evaluate import evaluate_run

    with meter.phase("evaluate"):
        return evaluate_run(planned, source, folder, machine, progress)


def _measure_again(
    planned: Plan,
    source: Path,
    folder: Path,
    stored: dict[str, Any],
    machine: Machine,
    progress: Progress,
    meter: Meter,
) -> RunResult:
    """A finished run whose recipe now asks for other measurements; until they are there, the old report stays."""
    again = evaluation_differs(planned, stored)
    if again:
        compute_place(planned, machine)
        evaluation = _evaluate(planned, source, folder, machine, progress, meter)
        stored = measured_again(planned, folder, stored, evaluation, meter)
        write_report(folder, stored, progress)
    elif not (folder / PAGE).exists():
        write_page_of(folder, stored, progress)
    leave(folder)
    return RunResult(folder, planned, stored, already_finished=True, evaluated_again=again)


def _finished_details(planned: Plan, folder: Path, journal: Journal, progress: Progress) -> dict[str, Any] | None:
    """What the journal knows of a model that was finished before the run was interrupted (in its evaluation); None if it
    is not, or no longer, whole."""
    from compress.pipeline.shards import finished_files, part_numbers

    config = folder / CONFIG
    if not config.exists():
        return None
    parts, last = part_numbers(planned), len(planned.stages) - 1
    if planned.staged:  # what the pass left is gone by now
        trusted = journal.finished(last) if finished_files(planned, journal, progress.note) else {}
    else:
        trusted = journal.trusted(last, parts, progress.note)
    if len(trusted) < len(parts):
        config.unlink()
        return None
    layers = {name: figures for entry in trusted.values() for name, figures in entry.layers.items()}
    return {"layers": layers, "activities": {}, "replayed_blocks": 0, "tuning": _tuning_figures(folder)}


def _tuning_figures(folder: Path) -> dict[str, float] | None:
    from compress.pipeline.memory import Memory
    from compress.pipeline.tuning import FIGURES

    file = folder / WORK_FOLDER / FIGURES
    return Memory(file).values.get("figures") if file.is_file() else None


def _settle(
    planned: Plan,
    source: Path,
    folder: Path,
    journal: Journal,
    batches: list[Any],
    machine: Machine,
    progress: Progress,
) -> Plan:
    """The plan with all settled that depends on the whole model."""
    from compress.pipeline.model_view import Looking, settle_rewrites
    from compress.pipeline.observe import settle
    from compress.pipeline.stage import Stage

    device, dtype = compute_place(planned, machine)
    work = folder / WORK_FOLDER
    planned = settle_rewrites(
        planned, Looking(source, work, batches, dtype, device, activation_limit(machine), progress)
    )

    def stage() -> Stage:
        return Stage(planned, 0, source, folder, journal, batches, dtype, device, activation_limit(machine), progress)

    return settle(planned, stage, source, work, progress)


def _compress(
    planned: Plan,
    source: Path,
    folder: Path,
    journal: Journal,
    batches: list[Any],
    machine: Machine,
    progress: Progress,
) -> dict[str, Any]:
    from compress.pipeline.finish import check_logits, finish, finished_config
    from compress.pipeline.shards import drop_staged
    from compress.pipeline.stacking import write_stack
    from compress.pipeline.stage import Stage
    from compress.pipeline.tuning import drop_tuning, tune

    device, dtype = compute_place(planned, machine)
    rows = _rows_to_order_by(planned, source)  # before the pass: there may be too few
    limit = activation_limit(machine)
    stage = Stage(planned, 0, source, folder, journal, batches, dtype, device, limit, progress)
    result = stage.run()
    config = finished_config(planned)
    if planned.stacked:
        with stage.watch("order and stack"):
            write_stack(planned, config, folder, journal, rows, result.layers, dtype, device, limit, progress)
    model, hidden, figures = stage.model, stage.probe_hidden, None
    if planned.tuning is not None:
        with stage.watch(planned.tuning.method.name):
            model, hidden, figures = tune(
                planned, config, source, folder, journal, batches, stage.probe_ids, dtype, device, limit, progress
            )
    progress.begin("check", 1, "model")
    with stage.watch("final check"):
        check_logits(planned, config, folder, stage.probe_ids, hidden, model)
    finish(planned, source, folder, config)
    progress.end()
    stage.model.close()
    if planned.staged:
        drop_staged(planned, folder)
    if planned.tuning is not None:
        model.close()
        drop_tuning(folder)
    return {
        "layers": result.layers,
        "activities": result.seconds,
        "replayed_blocks": result.replayed_blocks,
        "tuning": figures,
    }


def _rows_to_order_by(planned: Plan, source: Path) -> list[Any]:
    """Rows of another draw than the calibration's, for a stack whose order is found on data."""
    from compress.pipeline.stacking import stack_method

    if not planned.stacked:
        return []
    method, configs = stack_method(planned)
    rows = method.order_rows(configs)
    if not rows:
        return []
    calibration = planned.recipe.calibration
    other = calibration.model_copy(update={"seed": calibration.seed + 1, "samples": rows})
    with naming(f"{method.name}: the rows that the order is found on"):
        return calibration_batches(
            replace(planned, recipe=planned.recipe.model_copy(update={"calibration": other})), source
        )


def _fingerprint(batches: list[Any]) -> str:
    """Checksum of the token ids."""
    digest = hashlib.sha256()
    for ids in batches:
        digest.update(repr(tuple(ids.shape)).encode() + ids.contiguous().numpy().tobytes())
    return digest.hexdigest()


def calibration_batches(planned: Plan, source: Path) -> list[Any]:
    """Token ids [batch, length]: rows of one length together, nothing padded. Without data, one probe of random tokens."""
    import torch

    if not planned.needs_data:
        generator = torch.Generator().manual_seed(planned.recipe.seed)
        length = min(PROBE_TOKENS, planned.architecture.max_positions or PROBE_TOKENS)
        return [torch.randint(planned.architecture.vocab_size, (1, length), generator=generator)]
    from compress.calibration.data import load_tokenizer, load_tokens

    calibration = planned.recipe.calibration
    tokenizer = load_tokenizer(source, trust_remote_code=planned.recipe.model.trust_remote_code)
    tokens = load_tokens(calibration, tokenizer, vocab_size=planned.architecture.vocab_size)
    by_length: dict[int, list[torch.Tensor]] = {}
    for row in tokens.rows:
        by_length.setdefault(len(row), []).append(row)
    return [
        torch.stack(rows[i : i + calibration.rows_per_batch])
        for rows in by_length.values()
        for i in range(0, len(rows), calibration.rows_per_batch)
    ]


def compute_place(planned: Plan, machine: Machine) -> tuple[Any, Any]:
    """(device, dtype) of the arithmetic."""
    import torch

    device = compute_device(machine)
    wanted: str = planned.recipe.calibration.dtype
    if wanted == "auto":
        if device.type == "cpu":
            return device, torch.float32
        wanted = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[planned.float_dtype]
    return device, getattr(torch, wanted)


def compute_device(machine: Machine) -> Any:
    """The torch device that `machine` names. Raises: RecipeError if it cannot be used."""
    import torch

    name = machine.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(f"--device {name}: cannot be used ({str(error).splitlines()[0]}); use --device cpu") from None
    return device


def activation_limit(machine: Machine) -> int:
    if machine.activation_bytes is not None:
        return machine.activation_bytes
    return available_memory() // ACTIVATION_SHARE


def check_room(planned: Plan, folder: Path, machine: Machine, progress: Progress) -> None:
    """Enough disk for the result and for what lies beside it while the run lasts; a warning where memory may not suffice.

    Raises: CheckpointError if the disk has too little room.
    """
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    found = [*folder.glob("*.safetensors"), *(folder / WORK_FOLDER).glob("*.safetensors")]
    present = sum(f.stat().st_size for f in found)
    copies = 2 if planned.staged else 1  # the result is written from the files of the pass
    needed = int(copies * planned.bytes_total_after * (1 + DISK_SHARE)) + DISK_SLACK - present
    spilled = spilled_bytes(planned, activation_limit(machine))
    needed += planned.bytes_kept + spilled
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise CheckpointError(
            f"{folder}: the result needs {needed / 2**20:,.0f} MiB{_beside(planned.bytes_kept, spilled)}, the disk has "
            f"{free / 2**20:,.0f} MiB free; free some space, {'raise --activation-memory, ' if spilled else ''}"
            f"or choose another --out"
        )
    available = available_memory()
    if planned.peak_bytes > available:
        progress.note(
            f"about {planned.peak_bytes / 2**30:.1f} GiB of memory are needed, {available / 2**30:.1f} GiB are available; "
            f"if it fails, use fewer calibration.samples or a smaller --activation-memory"
        )


def _beside(kept: int, spilled: int) -> str:
    """What of the bytes needed is not the result, as part of a sentence."""
    parts = [(kept, "for matrices that are kept"), (spilled, "for activations that do not fit into memory")]
    shown = [f"{nbytes / 2**20:,.0f} {what}" for nbytes, what in parts if nbytes]
    return f" ({', '.join(shown)} while it runs)" if shown else ""


def place_header(device: Any, dtype: Any) -> dict[str, Any]:
    """Where a run computes: its blocks are not continued elsewhere, whose numbers differ in the last bits."""
    return {DEVICE: device.type, DTYPE: str(dtype).removeprefix("torch.")}


def work_header(planned: Plan) -> dict[str, Any]:
    """What identifies a run: another header on the same folder is another run."""
    import json

    import torch

    from compress import __version__

    tensors = sorted((i.name, i.dtype, list(i.shape)) for i in planned.original.infos.values())
    digest = hashlib.sha256(json.dumps([planned.original.config, tensors], sort_keys=True).encode()).hexdigest()
    return {
        "recipe": planned.recipe.hash(),
        "model": planned.source.name,
        "weights": digest,
        "version of compress-llm": __version__,
        "version of torch": torch.__version__,
    }
