"""Behind the pass, of methods that stack: levels are put in order and written as files of their own.

The pass leaves its shards, with all levels, in the work folder. From there tensors are copied piece by piece: first the files
of the stack, in stack order; then the shards of the index, which hold the rest; then the table. Each file is noted in the
journal, so that an interrupted run goes on with the next one, and the order is remembered. What lay in the work folder goes
when the model is whole.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.checkpoint.headers import read_header
from compress.checkpoint.reader import CheckpointReader
from compress.checkpoint.stack import STACK, Entry, StackFile, open_stack, stack_name, table_json
from compress.checkpoint.writer import Stored, from_source, write_json, write_safetensors
from compress.errors import naming
from compress.methods.base import SiteMethod
from compress.pipeline.journal import BlockEntry, Journal, sha256_of
from compress.pipeline.memory import Memory
from compress.pipeline.output import CONFIG, WORK_FOLDER
from compress.pipeline.plan import Plan
from compress.pipeline.progress import Progress
from compress.pipeline.shards import n_shards, shard_name, staged_infos, staged_name
from compress.pipeline.stack_view import FinishedView

ORDER = "order.jsonl"


def stack_method(plan: Plan) -> tuple[type[SiteMethod], dict[str, Any]]:
    """The method whose modules the plan stacks, and the settings of each of them."""
    found: dict[str, tuple[type[SiteMethod], Any]] = {}
    for step in (step for stage in plan.stages for step in stage):
        found.update({name: (step.method, config) for name, config in step.configs.items() if name in plan.stacked})
    methods = {method for method, _ in found.values()}
    assert len(methods) == 1, f"{methods}: a stack is of one method"
    return methods.pop(), {name: config for name, (_, config) in found.items()}


def write_stack(
    plan: Plan,
    config: dict[str, Any],
    out: Path,
    journal: Journal,
    batches: Sequence[Tensor],
    figures: dict[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    activation_bytes: int,
    progress: Progress,
) -> None:
    """Order the levels and write the files of the result, but for config.json and what lies beside the weights.

    Args:
        config: config.json of the result.
        batches: rows that the order is found on, where the method asks for some.
        figures: of each layer, for the report.
    """
    method, configs = stack_method(plan)
    work = out / WORK_FOLDER
    infos = staged_infos(plan, out)
    memory = Memory(work / ORDER)

    def ordered() -> list[tuple[str, int]]:
        write_json(work / CONFIG, config)
        view = FinishedView(
            plan, work, infos, batches, figures, memory, dtype, device, activation_bytes, progress
        )  # fmt: skip
        with naming(method.name):
            return list(method.order(view, configs))

    order = [(str(name), int(level)) for name, level in memory.remember("order", ordered)]
    expected = {(name, level) for name, spec in plan.stacked.items() for level in range(1, spec.n_levels)}
    assert set(order) == expected and len(order) == len(expected), f"{method.name}: left levels out of its order"
    with CheckpointReader(out, infos) as reader:
        _write_files(plan, out, journal, reader, order, method, configs, progress)


def _write_files(
    plan: Plan,
    out: Path,
    journal: Journal,
    reader: CheckpointReader,
    order: list[tuple[str, int]],
    method: type[SiteMethod],
    configs: dict[str, Any],
    progress: Progress,
) -> None:
    levels = {place: [f"{place[0]}.{key}" for key in plan.stacked[place[0]].level(place[1], "F32")] for place in order}
    sizes = {place: sum(reader.info(name).nbytes for name in names) for place, names in levels.items()}
    cut = files_of(order, sizes, method.stack_file_bytes(configs))
    stacked = {name for names in levels.values() for name in names}
    number, total = len(plan.stages), len(cut) + n_shards(plan)
    done = journal.trusted(number, range(total), progress.note)
    progress.begin("stack", total, "file")
    table: list[tuple[StackFile, list[Entry]]] = []
    modules = list(plan.stacked)
    for index, places in enumerate(cut):
        name = stack_name(index, len(cut))
        if index not in done:
            sums = dict.fromkeys(places, 0)
            tensors = {t: _summed(reader, t, place, sums) for place in places for t in levels[place]}
            nbytes = write_safetensors(out / name, tensors, in_order=True)
            done[index] = BlockEntry(
                number, index, name, nbytes, sha256_of(out / name), {"crc32": [sums[place] for place in places]}
            )
            journal.add(done[index])
        header = read_header(out / name)
        entries = [
            Entry(place[0], place[1], index, header[levels[place][0]].offset, sizes[place], crc)
            for place, crc in zip(places, done[index].layers["crc32"], strict=True)
        ]
        table.append((StackFile(name, done[index].nbytes), entries))
        progress.advance(1, name)
    for part in range(n_shards(plan)):
        name, index = shard_name(plan, part), len(cut) + part
        if index not in done:
            inside = [t for t in read_header(out / staged_name(plan, part)) if t not in stacked]
            nbytes = write_safetensors(out / name, {t: from_source(reader, t) for t in inside})
            journal.add(BlockEntry(number, index, name, nbytes, sha256_of(out / name)))
        progress.advance(1, name)
    write_json(out / STACK, table_json(modules, table, method.name))
    found = open_stack(out, plan.specs)
    assert found is not None
    for _ in found.read(0, len(found.entries)):  # each held to its checksum
        pass
    progress.end()


def files_of(
    order: Iterable[tuple[str, int]], sizes: dict[tuple[str, int], int], file_bytes: int
) -> list[list[tuple[str, int]]]:
    """The order, cut where a file would become larger than `file_bytes`; each has one entry at least."""
    files: list[list[tuple[str, int]]] = []
    filled = 0
    for place in order:
        if not files or filled + sizes[place] > file_bytes:
            files.append([])
            filled = 0
        files[-1].append(place)
        filled += sizes[place]
    return files


def _summed(reader: CheckpointReader, name: str, place: tuple[str, int], sums: dict[tuple[str, int], int]) -> Stored:
    """A tensor of the pass's shards, whose bytes are added to the checksum of its entry as they are written."""
    stored = from_source(reader, name)

    def pieces() -> Iterable[Any]:
        for piece in stored.pieces():
            sums[place] = zlib.crc32(piece, sums[place])
            yield piece

    return Stored(stored.dtype, stored.shape, pieces)


def stack_files(out: Path) -> list[str]:
    """The stack's files in a folder that is finished."""
    return sorted([STACK, *(file.name for file in out.glob("stack-*.safetensors"))]) if (out / STACK).is_file() else []
