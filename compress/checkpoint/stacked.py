"""A model and the stack that it was loaded from: how much of it is there, and what is still on disk."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.checkpoint.budget import Budget
from compress.checkpoint.headers import TensorInfo, read_json
from compress.checkpoint.names import owner
from compress.checkpoint.reader import SAFETENSORS_DTYPES
from compress.checkpoint.resize import Gate, make_resizable
from compress.checkpoint.stack import STACK, StackTable, parse_table
from compress.errors import CheckpointError
from compress.modules.bitstack import BitStackLinear
from compress.modules.spec import DTYPE_BYTES, ModuleSpec

FLOATS = ("F64", "F32", "F16", "BF16")
_SNAPSHOT = re.compile(r"models--([\w.-]+?)--([\w.-]+)")


@dataclass
class LoadedStack:
    """`model.stack`: the first `n_entries` of `table` are in the model.

    `modules`: those that have levels, by name on disk. `gate`: forward passes go through it; it is closed while they change.
    """

    table: StackTable
    n_entries: int
    modules: Mapping[str, BitStackLinear]
    gate: Gate = field(default_factory=Gate)

    @property
    def nbytes(self) -> int:
        """Bytes of the model's tensors."""
        return self.table.nbytes(self.n_entries)

    @property
    def bits(self) -> float:
        """Per weight of the stacked modules."""
        return self.table.bits(self.n_entries)

    def grow(self, n_entries: int) -> None:
        """Read entries from the disk until there are `n_entries`. If that fails, the model stays as large as it was."""
        read: list[tuple[str, dict[str, Tensor]]] = []
        for entry, tensors in self.table.read(self.n_entries, n_entries):
            if entry.module not in self.modules:
                continue
            device = self.modules[entry.module].block_0.signs.device  # type: ignore[union-attr]
            read.append((entry.module, {key.rpartition(".")[2]: t.to(device) for key, t in tensors.items()}))  # type: ignore[arg-type]
        with self.gate.closed():
            for name, parts in read:
                self.modules[name].append_block(**parts)
            self.n_entries = max(self.n_entries, n_entries)

    def shrink(self, n_entries: int) -> None:
        """Let go of all entries behind the first `n_entries`."""
        with self.gate.closed():
            for entry in reversed(self.table.entries[n_entries : self.n_entries]):
                if entry.module in self.modules:
                    self.modules[entry.module].drop_block()
            self.n_entries = min(self.n_entries, n_entries)


def load_stack(model: Any, table: StackTable, n_entries: int, places: Mapping[str, str]) -> None:
    """Bring `model`, loaded from the index's files, to the first `n_entries` of the stack; it keeps it as `model.stack`.

    Args:
        places: name of a module on disk -> in the module tree of `model`; those that it lacks (no head) are left out.
    """
    modules: dict[str, BitStackLinear] = {}
    for name in (name for name in table.specs if name in places):
        module: nn.Module = model.get_submodule(places[name])
        assert isinstance(module, BitStackLinear), (name, type(module))
        if module.block_0.signs.device.type == "meta":  # type: ignore[union-attr]
            raise CheckpointError(
                f"{name}: is to stay on the disk, which a stack cannot; give the model more memory, or a smaller memory_budget"
            )
        modules[name] = module
    stack = LoadedStack(table, 0, modules)
    stack.grow(n_entries)
    model.stack = stack
    make_resizable(model)


def loaded_bytes(stored: Mapping[str, TensorInfo], specs: Mapping[str, ModuleSpec], dtype: torch.dtype) -> int:
    """Bytes of tensors once they are loaded in `dtype`: floats of ordinary modules are cast."""
    stacked = {name: spec for name, spec in specs.items() if spec.n_levels > 1}
    float_bytes = DTYPE_BYTES[SAFETENSORS_DTYPES[dtype]]
    total = 0
    for name, info in stored.items():
        cast = info.dtype in FLOATS and (owner(name, stacked) is None or name.endswith(".bias"))
        total += prod(info.shape) * float_bytes if cast else info.nbytes
    return total


def fetch_stack(
    folder: Path,
    specs: Mapping[str, ModuleSpec],
    stored: Mapping[str, TensorInfo],
    budget: Budget | None,
) -> None:
    """Where `folder` is of the Hub's cache, bring the files of the stack that `budget` needs; transformers knows of those of the
    index only.

    Raises: CheckpointError if the Hub does not give them.
    """
    found = _SNAPSHOT.fullmatch(folder.parent.parent.name)
    if found is None or folder.parent.name != "snapshots" or all(spec.n_levels == 1 for spec in specs.values()):
        return
    from compress.checkpoint.hub import fetch_file

    repo, commit = f"{found[1]}/{found[2]}", folder.name
    if not (folder / STACK).is_file() and not fetch_file(repo, commit, STACK):
        return
    table = parse_table(folder, read_json(folder / STACK), specs, sum(info.nbytes for info in stored.values()))
    for name in table.files_for(table.fits(budget)):
        if not (folder / name).is_file() and not fetch_file(repo, commit, name):
            return  # the Hub has no more: what is there is loaded, and the loss is told
