"""The weights of an export: which tensors go into which file, converted module by module as they are written."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from compress.checkpoint.names import owner
from compress.checkpoint.seal import Checksum
from compress.checkpoint.writer import Stored, from_source, from_tensor, write_json, write_safetensors
from compress.export.formats import Format, Model
from compress.models.families import is_ignored

MAX_SHARD_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Part:
    """The tensors of one module, or of what is copied unchanged from one place, by their names in the export."""

    tensors: dict[str, Stored]

    @property
    def nbytes(self) -> int:
        return sum(stored.nbytes for stored in self.tensors.values())


def parts_of(model: Model, format_: Format, converted: Callable[[str], None]) -> list[Part]:
    """Everything that will be written. Nothing is read or converted before its bytes are asked for.

    Args:
        converted: told the name of each compressed module when it has been converted.
    """
    owned: dict[str, dict[str, Stored]] = {}
    for name in model.specs:
        owned[name] = _module_tensors(model, format_, name, converted)
    for tensor in model.reader.infos:
        module, _, suffix = tensor.rpartition(".")
        inside = owner(tensor, model.specs)
        if (inside is not None and tensor != f"{inside}.bias") or is_ignored(tensor):
            continue
        owned.setdefault(module, {})[_name(model, format_, module, suffix)] = from_source(model.reader, tensor)
    return [Part(tensors) for _, tensors in sorted(owned.items(), key=lambda item: _in_order(model, item[0]))]


def _name(model: Model, format_: Format, module: str, suffix: str) -> str:
    return f"{model.full_name(module) if format_.full_names else module}.{suffix}"


def _in_order(model: Model, name: str) -> tuple[int, str]:
    """Before the blocks, block by block, behind them."""
    prefixes = {prefix: i for i, prefix in enumerate(model.architecture.blocks)}
    words = name.split(".")
    for n in range(1, len(words)):
        block = prefixes.get(".".join(words[:n]))
        if block is not None:
            return block, name
    return (len(prefixes) if name in model.architecture.head.linears else -1), name


def _module_tensors(model: Model, format_: Format, name: str, converted: Callable[[str], None]) -> dict[str, Stored]:
    """The tensors of a compressed module, which is converted once, when the first of them is written."""
    planned = format_.tensors(model, name)
    ready: dict[str, Tensor] = {}

    def pieces(suffix: str) -> Iterable[Any]:
        if not ready:
            ready.update(format_.convert(model, name))
            assert ready.keys() == planned.keys(), name
            converted(name)
        made = from_tensor(ready.pop(suffix))
        assert (made.dtype, made.shape) == planned[suffix], f"{name}.{suffix}: {made.dtype} {made.shape}"
        return made.pieces()

    return {
        _name(model, format_, name, suffix): Stored(dtype, tuple(shape), lambda suffix=suffix: pieces(suffix))  # type: ignore[misc]
        for suffix, (dtype, shape) in planned.items()
    }


def write_shards(folder: Path, parts: list[Part]) -> dict[str, str]:
    """Write the weights. Returns: tensor -> checksum.

    Raises: CheckpointError naming the file that cannot be written, or the source's tensor that cannot be read.
    """
    shards = _shards(parts)
    sums: dict[str, Checksum] = {}
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        summed = {name: _summed(name, stored, sums) for name, stored in tensors.items()}
        write_safetensors(folder / file, summed)
        weight_map.update(dict.fromkeys(tensors, file))
    if len(shards) > 1:
        total = sum(part.nbytes for part in parts)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    return {name: str(value) for name, value in sorted(sums.items())}


def _shards(parts: list[Part]) -> list[dict[str, Stored]]:
    shards: list[dict[str, Stored]] = [{}]
    filled = 0
    for part in parts:
        if filled and filled + part.nbytes > MAX_SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1].update(part.tensors)
        filled += part.nbytes
    return shards


def _summed(name: str, stored: Stored, sums: dict[str, Checksum]) -> Stored:
    """The same tensor, whose checksum is taken while it is written."""

    def pieces() -> Iterable[Any]:
        sums[name] = Checksum(name, stored.dtype, stored.shape)
        for piece in stored.pieces():
            sums[name].add(piece)
            yield piece

    return Stored(stored.dtype, stored.shape, pieces)
