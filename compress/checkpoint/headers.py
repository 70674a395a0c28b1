"""What a checkpoint folder holds, from its index and shard headers alone: no torch, no weights read.

safetensors layout: 8 bytes little-endian header length, the header (JSON: name -> dtype, shape, [begin, end)), the data.
A header comes from a stranger: every number is checked against the file before anything is believed.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import CheckpointError
from compress.modules.spec import DTYPE_BYTES

if TYPE_CHECKING:
    from compress.checkpoint.budget import Budget

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
MAX_NAME = 500  # characters
MAX_DIMENSIONS = 16
MAX_NUMBER = 2**63 - 1
SAMPLED_PIECES, SAMPLED_BYTES = 64, 4096  # of a file, to tell whether it is another one
STANDARD_STEM = "model"
OWN_STEM = "compress"  # our format keeps its weights where stock loaders do not look: it must not load as random layers


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor: where its bytes lie. `dtype` is the safetensors name ("BF16"), `offset` counts from the file's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


def parse_header(data: bytes, file: Path, file_bytes: int) -> dict[str, TensorInfo]:
    """The tensors that a header announces.

    Args:
        data: the first bytes of the file, at least the whole header.
        file_bytes: the size of the file, for the check that nothing is missing.

    Raises: CheckpointError naming the file if the header is no header, or tensors lie outside the file.
    """
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: not a safetensors file (its header is unreadable); fetch it again")
    header.pop("__metadata__", None)
    infos = {name: _tensor_info(name, entry, file, 8 + length) for name, entry in header.items()}
    _check_layout(infos, file, 8 + length, file_bytes)
    return infos


def _tensor_info(name: str, entry: object, file: Path, data_start: int) -> TensorInfo:
    if len(name) > MAX_NAME or not name.isprintable():
        raise CheckpointError(f"{file}: its header names a tensor {name!r:.200}, which no model has; fetch it again")
    if not _well_formed(entry):
        raise CheckpointError(f"{file}: tensor {name}: its header entry {entry!r:.200} is impossible; fetch it again")
    assert isinstance(entry, dict)
    dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if dtype not in DTYPE_BYTES:
        raise CheckpointError(
            f"{file}: tensor {name} has dtype {dtype!r:.40}, which is not known here ({', '.join(DTYPE_BYTES)}); convert it"
        )
    nbytes = prod(shape) * DTYPE_BYTES[dtype]
    if end - begin != nbytes:
        raise CheckpointError(
            f"{file}: tensor {name}: {dtype} {list(shape)!s:.100} takes {nbytes:,} bytes, its header entry gives it "
            f"{end - begin:,}; fetch it again"
        )
    return TensorInfo(name, dtype, shape, file, data_start + begin, nbytes)


def _well_formed(entry: object) -> bool:
    if not isinstance(entry, dict):
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    numbers = (
        isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2 and len(shape) <= MAX_DIMENSIONS
    )
    return (
        numbers
        and isinstance(entry.get("dtype"), str)
        and all(type(x) is int and 0 <= x <= MAX_NUMBER for x in (*shape, *offsets))  # type: ignore[misc]
    )


def _check_layout(infos: dict[str, TensorInfo], file: Path, data_start: int, file_bytes: int) -> None:
    """Tensors lie one behind the other, from the header to the end of the file: the rule of safetensors."""
    announced = max((info.offset + info.nbytes for info in infos.values()), default=data_start)
    if announced > file_bytes:
        raise CheckpointError(
            f"{file}: truncated: the header announces {announced:,} bytes, the file has {file_bytes:,}; fetch it again"
        )
    end = data_start
    for info in sorted(infos.values(), key=lambda info: (info.offset, info.nbytes)):
        if info.offset != end:
            wrong = "overlaps the one before it" if info.offset < end else "does not follow the one before it"
            raise CheckpointError(f"{file}: tensor {info.name} {wrong}, by the header; fetch it again")
        end = info.offset + info.nbytes
    if end != file_bytes:
        raise CheckpointError(
            f"{file}: {file_bytes - end:,} bytes follow its last tensor; the file is damaged: fetch it again"
        )


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file. Raises: CheckpointError naming the file."""
    try:
        size = os.path.getsize(file)
        with open(file, "rb") as stream:
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(f"{file}: truncated or not a safetensors file ({size:,} bytes); fetch it again")
            return parse_header(start + stream.read(length), file, size)
    except FileNotFoundError:
        raise CheckpointError(f"{file}: missing; the checkpoint is incomplete: fetch it again") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}; check the file and the disk") from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the checkpoint in `folder`, by its index or by name.

    Raises: CheckpointError if there are none, saying what was found instead.
    """
    for stem in (STANDARD_STEM, OWN_STEM):
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            return sorted({folder / Path(name).name for name in _weight_map(index).values()})
        if (folder / f"{stem}.safetensors").is_file():
            return [folder / f"{stem}.safetensors"]
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; check the path")
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise CheckpointError(
            f"{folder}: holds pickled weights only, which are not loaded because a pickle can run code; "
            f"convert them to safetensors first (for example: AutoModel.from_pretrained(dir).save_pretrained(new_dir))"
        )
    if any(folder.glob("*.gguf")):
        raise CheckpointError(f"{folder}: holds a GGUF file; start from the original safetensors checkpoint")
    raise CheckpointError(
        f"{folder}: no model.safetensors and no model.safetensors.index.json in it; name the folder that holds the weights"
    )


def sampled_digest(folder: Path) -> str:
    """Checksum of pieces of the weight files in `folder`, spread evenly: other weights under the same names have another one.

    Some milliseconds a file, whatever its size. Raises: CheckpointError naming a file that cannot be read.
    """
    digest = hashlib.sha256()
    for file in [*weight_files(folder), *sorted(folder.glob("stack-*.safetensors"))]:
        try:
            size = os.path.getsize(file)
            digest.update(f"{file.name} {size}".encode())
            with open(file, "rb") as stream:
                for piece in range(SAMPLED_PIECES):
                    stream.seek(piece * max(size - SAMPLED_BYTES, 0) // (SAMPLED_PIECES - 1))
                    digest.update(stream.read(SAMPLED_BYTES))
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read: {error.strerror}; check the file and the disk") from None
    return digest.hexdigest()


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor -> file, as the index says it."""
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) and name for name in found.values()):
        raise CheckpointError(f"{index}: its weight_map does not say which file holds which tensor; fetch it again")
    return found


def read_headers(folder: Path, budget: Budget | None = None) -> dict[str, TensorInfo]:
    """Every tensor of a checkpoint folder, name -> where it lies. Of a stack: what of it is there, or fits `budget`.

    Raises: CheckpointError naming file (and tensor) if a shard is missing, truncated or damaged, or the index names a
    tensor that no shard holds.
    """
    infos = read_base_headers(folder)
    from compress.checkpoint.stack import stack_of

    stack = stack_of(folder, infos, budget)
    return infos if stack is None else {**infos, **stack.infos(stack.prefix_for(budget))}


def read_base_headers(folder: Path) -> dict[str, TensorInfo]:
    """`read_headers`, less the stack: what the index names."""
    infos: dict[str, TensorInfo] = {}
    for file in weight_files(folder):
        for name, info in read_header(file).items():
            if name in infos:
                raise CheckpointError(
                    f"{file}: tensor {name} is also in {infos[name].file.name}; fetch the model again"
                )
            infos[name] = info
    for stem in (STANDARD_STEM, OWN_STEM):
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            for name, file_name in _weight_map(index).items():
                if name not in infos:
                    raise CheckpointError(
                        f"{folder / Path(file_name).name}: tensor {name!r:.200} of the index is not in it; fetch it again"
                    )
            break
    if not infos:
        raise CheckpointError(f"{folder}: its safetensors files hold no tensor; fetch the model again")
    return infos


def read_json(file: Path) -> dict:
    """A JSON object from a file. Raises: CheckpointError naming the file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: missing; is {file.parent} a model folder?") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}; check the file and the disk") from None
    except ValueError as error:
        raise CheckpointError(f"{file}: not JSON: {error}; mend it or fetch it again") from None
    except RecursionError:
        raise CheckpointError(f"{file}: not JSON that can be read (nested too deep); fetch it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: a JSON object is expected, found {type(content).__name__}; fetch it again")
    return content
