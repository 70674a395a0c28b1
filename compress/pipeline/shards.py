"""The files of a result: a shard for what comes before the blocks, one for each block, one for the head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from compress.checkpoint.headers import TensorInfo, read_header
from compress.checkpoint.names import owner
from compress.checkpoint.reader import TORCH_DTYPES, CheckpointReader
from compress.checkpoint.stream import read_lender
from compress.checkpoint.writer import Stored, from_source, from_tensor, write_safetensors
from compress.methods.base import Outcome
from compress.modules.spec import ModuleSpec
from compress.pipeline.folding import scaled
from compress.pipeline.journal import BlockEntry, Journal, sha256_of
from compress.pipeline.layers import as_stored
from compress.pipeline.meter import Stopwatch
from compress.pipeline.output import WORK_FOLDER
from compress.pipeline.plan import Plan
from compress.pipeline.plan_result import OWN

ENTRY = -1  # journal number of the part before block 0; the head's is the number of blocks


def shard_name(plan: Plan, number: int) -> str:
    """The file of part `number`: 0 is everything before block 0, then the blocks, then the head."""
    stem = "compress" if plan.format == OWN else "model"
    return f"{stem}-{number + 1:05d}-of-{n_shards(plan):05d}.safetensors"


def staged_name(plan: Plan, number: int) -> str:
    """Where the pass leaves part `number`: in the work folder, where the result is made from these files behind the pass."""
    name = shard_name(plan, number)
    return f"{WORK_FOLDER}/{name}" if plan.staged else name


def staged_infos(plan: Plan, out: Path) -> dict[str, TensorInfo]:
    """Every tensor that the pass left."""
    infos: dict[str, TensorInfo] = {}
    for number in range(n_shards(plan)):
        infos.update(read_header(out / staged_name(plan, number)))
    return infos


def finished_files(plan: Plan, journal: Journal, note: Callable[[str], None]) -> bool:
    """Whether all files that were made behind the pass are as the journal knows them."""
    noted = journal.finished(len(plan.stages))
    return bool(noted) and len(journal.trusted(len(plan.stages), range(len(noted)), note)) == len(noted)


def drop_staged(plan: Plan, out: Path) -> None:
    """The model is whole: what the pass left is not needed any more."""
    for number in range(n_shards(plan)):
        with suppress(FileNotFoundError):
            (out / staged_name(plan, number)).unlink()


def n_shards(plan: Plan) -> int:
    return plan.architecture.n_blocks + (2 if stores_head(plan) else 1)


def part_numbers(plan: Plan) -> range:
    """The parts of a finished stage, by their numbers in the journal."""
    return range(ENTRY, ENTRY + n_shards(plan))


def stores_head(plan: Plan) -> bool:
    """Whether the result holds tensors of a head of its own."""
    head = plan.architecture.head.linears[0]
    return plan.untied or head in plan.layers or any(name.startswith(f"{head}.") for name in plan.source.infos)


class Shards:
    """Writes the shards of a stage: compressed modules from memory, the rest copied from `reader`."""

    def __init__(self, plan: Plan, number: int, out: Path, reader: CheckpointReader, watch: Stopwatch):
        self.plan, self.number, self.out, self.reader, self.watch = plan, number, out, reader, watch

    def write_block(self, index: int, outcomes: dict[str, Outcome], scales: dict[str, Tensor]) -> BlockEntry:
        """`scales`: what the outputs of modules that were not compressed are multiplied by (`folding.py`)."""
        inside = self.plan.architecture.blocks[index] + "."
        names = [name for name in self.reader.infos if name.startswith(inside)]
        folded = {name: scales[name.rpartition(".")[0]] for name in names if name.rpartition(".")[0] in scales}
        extra = {name: self._scaled(name, scale) for name, scale in folded.items() if owner(name, outcomes) is None}
        return self.write(index, names, outcomes, extra)

    def _scaled(self, name: str, scale: Tensor) -> Stored:
        tensor = scaled(self.reader.read(name), scale, self.plan.architecture.transposed)
        return from_tensor(tensor.to(self._cast() or tensor.dtype))

    def open_block(self, index: int, entries: Mapping[int, BlockEntry]) -> CheckpointReader:
        """The tensors of block `index` as it was written, and of what its modules borrow from blocks before it."""
        inside = self.plan.architecture.blocks[index] + "."
        infos = read_header(self.out / entries[index].file)
        for name, spec in self.plan.specs.items():
            if name.startswith(inside):
                infos |= self._lent(spec, entries)
        return CheckpointReader(self.out, infos)

    def lender(self, spec: ModuleSpec, entries: Mapping[int, BlockEntry]) -> nn.Module | None:
        """What a module of `spec` borrows, as it was written, in the dtype in which it is stored; None: nothing."""
        if spec.lender() is None:
            return None
        with CheckpointReader(self.out, self._lent(spec, entries)) as reader:
            return read_lender(spec, reader, TORCH_DTYPES[self.plan.float_dtype])

    def _lent(self, spec: ModuleSpec, entries: Mapping[int, BlockEntry]) -> dict[str, TensorInfo]:
        """The headers of the tensors that a module of `spec` borrows."""
        lender = spec.lender()
        if lender is None:
            return {}
        blocks = self.plan.architecture.blocks
        index = next(i for i, prefix in enumerate(blocks) if lender.startswith(f"{prefix}."))
        written = read_header(self.out / entries[index].file)
        return {name: written[name] for name in (f"{lender}.{suffix}" for suffix in spec.borrowed("F32"))}

    def write(
        self, part: int, names: list[str], outcomes: dict[str, Outcome], extra: dict[str, Stored] | None = None
    ) -> BlockEntry:
        """Write one shard: compressed modules from memory, the rest copied from the source, but for `extra`."""
        tensors: dict[str, Stored] = {}
        for name in names:
            if owner(name, outcomes) is None:
                tensors[name] = from_source(self.reader, name, self._cast())
        tensors.update(extra or {})
        layers = {}
        for name, outcome in outcomes.items():
            for suffix, tensor in outcome.module.stored().items():
                if outcome.module.spec.plain and suffix == "weight":
                    tensor = as_stored(self.plan.architecture, name, tensor)
                if suffix == "bias":
                    tensor = tensor.to(self._cast() or TORCH_DTYPES[self.reader.info(f"{name}.bias").dtype])
                tensors[f"{name}.{suffix}"] = from_tensor(tensor)
            self._check_bytes(name, tensors)
            layers[name] = {**outcome.report, "notes": outcome.notes}
        file = staged_name(self.plan, part + 1)
        with self.watch("write"):
            nbytes = write_safetensors(self.out / file, tensors)
        return BlockEntry(self.number, part, file, nbytes, sha256_of(self.out / file), layers)

    def dense_table(self) -> Stored:
        """The token table of the source, to become the weight of a head that was tied to it."""
        table = self.plan.architecture.embedding.linears[0]
        return from_source(self.reader, f"{table}.weight", self._cast())

    def _cast(self) -> torch.dtype | None:
        return None if self.plan.recipe.model.dtype == "auto" else TORCH_DTYPES[self.plan.float_dtype]

    def _check_bytes(self, name: str, tensors: dict[str, Stored]) -> None:
        prefix = name + "."
        written = sum(t.nbytes for n, t in tensors.items() if n.startswith(prefix) and n != f"{prefix}bias")
        planned = self.plan.layers[name].bytes_after
        assert written == planned, f"{name}: {written} bytes where the plan has {planned}"
