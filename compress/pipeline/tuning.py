"""Behind the pass, of a step that tunes: the shards that it left in the work folder become those of the result.

The method is handed the model that they are (compress/pipeline/tuner.py). What it tuned is put in the place of the stored tensors
as the shards are written; each is noted in the journal, and the figures are remembered, so that an interrupted run goes on.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.calibration.store import Allowance
from compress.checkpoint.headers import read_header
from compress.checkpoint.reader import CheckpointReader
from compress.checkpoint.source import find_source
from compress.checkpoint.stream import StreamedModel
from compress.checkpoint.writer import from_source, from_tensor, write_json, write_safetensors
from compress.errors import RecipeError, naming
from compress.pipeline.journal import BlockEntry, Journal, sha256_of
from compress.pipeline.memory import Memory
from compress.pipeline.output import CONFIG, WORK_FOLDER
from compress.pipeline.plan import Plan
from compress.pipeline.progress import Progress
from compress.pipeline.rewriting import open_source, seeded
from compress.pipeline.shards import n_shards, shard_name, staged_infos, staged_name
from compress.pipeline.tuner import STATE, Tuner

FIGURES = "tuned.jsonl"


def tune(
    plan: Plan,
    config: dict[str, Any],
    source: Path,
    out: Path,
    journal: Journal,
    batches: list[Tensor],
    probe_ids: Tensor,
    dtype: torch.dtype,
    device: torch.device,
    activation_bytes: int,
    progress: Progress,
) -> tuple[StreamedModel, Tensor, dict[str, float]]:
    """Tune what the pass left and write the files of the result, but for config.json and what lies beside the weights.

    Args:
        config: config.json of the result.
        source: the folder of the recipe's model.
    Returns: the model as it is now, what it makes of the probe behind its last block, and figures for the report.
    """
    step, work = plan.tuning, out / WORK_FOLDER
    assert step is not None
    folder = work / "tuning"
    folder.mkdir(exist_ok=True)
    write_json(folder / CONFIG, config)
    trusted = plan.recipe.model.trust_remote_code
    reader = CheckpointReader(out, staged_infos(plan, out))
    student = StreamedModel(folder, dtype, device, reader=reader, specs=plan.specs, trust_remote_code=trusted)
    if step.teacher is None:
        teacher = open_source(plan, (), source, work, dtype, device)
    else:
        with naming(f"steps.{step.number}.{step.method.name}: teacher"):
            teacher = StreamedModel(
                find_source(step.teacher).fetch(progress.note), dtype, device, trust_remote_code=trusted
            )
            if teacher.architecture.vocab_size != student.architecture.vocab_size:
                raise RecipeError(
                    f"{step.teacher} has {teacher.architecture.vocab_size} tokens, the result "
                    f"{student.architecture.vocab_size}; name the model that it was made from"
                )
    generator = seeded(plan.recipe.seed, "tune", step.number)
    with naming(step.method.name):
        tuner = Tuner(plan, student, teacher, batches, work, Allowance(activation_bytes), progress)
        progress.begin("tune", step.iterations, "iteration")
        if tuner.done:
            progress.advance(tuner.done, "by an earlier run")
        memory = Memory(work / FIGURES)
        figures = memory.remember("figures", lambda: step.method.tune(tuner, step.config, generator))
        progress.end()
        tuner.kept = bool(figures["kept"])
        if not tuner.kept:
            progress.note(f"{step.method.name}: tuning made nothing better, and the model is as it was before")
        probe_hidden = tuner.probe(probe_ids)
        _write(plan, out, journal, reader, tuner, progress)
    tuner.close()
    return student, probe_hidden, figures


def _write(plan: Plan, out: Path, journal: Journal, reader: CheckpointReader, tuner: Tuner, progress: Progress) -> None:
    number, parts = len(plan.stages), tuner.tensors()
    done = journal.trusted(number, range(n_shards(plan)), progress.note)
    for part in range(n_shards(plan)):
        if part in done:
            continue
        names = read_header(out / staged_name(plan, part))
        values: dict[str, Tensor] = {}
        for of in sorted({parts[name] for name in names if name in parts}):
            values |= tuner.values(of)
        tensors = {name: from_tensor(values[name]) if name in values else from_source(reader, name) for name in names}
        file = shard_name(plan, part)
        nbytes = write_safetensors(out / file, tensors)
        journal.add(BlockEntry(number, part, file, nbytes, sha256_of(out / file)))


def drop_tuning(out: Path) -> None:
    """The model is whole: values and optimizer's states are not needed any more."""
    for file in (out / WORK_FOLDER).glob(f"{STATE}*.safetensors"):
        with suppress(FileNotFoundError):
            file.unlink()
