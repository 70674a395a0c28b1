"""Safetensors files that appear whole or not at all.

A file is written under a temporary name, flushed to the disk, and renamed; tensors that do not change are copied from
the source as bytes, piece by piece, so that a large embedding is never in memory. The header holds nothing that differs
from run to run: same tensors, same bytes.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from compress.checkpoint.reader import COPY_CHUNK, SAFETENSORS_DTYPES, TORCH_DTYPES, CheckpointReader
from compress.errors import CheckpointError, NumericsError
from compress.modules.spec import DTYPE_BYTES

PARTIAL = ".partial"  # suffix of files that are still being written
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Stored:
    """One tensor to write: its header entry and the pieces of its bytes, in order."""

    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Any]]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


def from_tensor(tensor: Tensor) -> Stored:
    """A tensor in memory, to be written as it is."""
    tensor = tensor.detach().cpu().contiguous()

    def pieces() -> Iterable[Any]:
        if tensor.numel() == 0:
            return []
        flat = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
        return [flat[i : i + COPY_CHUNK] for i in range(0, len(flat), COPY_CHUNK)]

    return Stored(SAFETENSORS_DTYPES[tensor.dtype], tuple(tensor.shape), pieces)


def from_source(reader: CheckpointReader, name: str, dtype: torch.dtype | None = None) -> Stored:
    """A tensor of another checkpoint, copied byte by byte, or cast to `dtype` if it is a float of another one.

    Its pieces raise CheckpointError if it holds NaN or infinity, and NumericsError if only the cast makes them.
    """
    info = reader.info(name)
    if dtype is None or info.dtype not in FLOATS or SAFETENSORS_DTYPES[dtype] == info.dtype:
        return Stored(info.dtype, info.shape, lambda: finite_chunks(reader, name))

    def cast() -> Iterable[Any]:
        for chunk in finite_chunks(reader, name):
            tensor = torch.frombuffer(chunk, dtype=TORCH_DTYPES[info.dtype]).to(dtype)
            if not torch.isfinite(tensor).all():
                raise NumericsError(
                    f"{info.file}: tensor {name} has values beyond the range of {str(dtype).removeprefix('torch.')}; use "
                    f"--set model.dtype=bfloat16 or model.dtype=auto"
                )
            yield from from_tensor(tensor).pieces()

    return Stored(SAFETENSORS_DTYPES[dtype], info.shape, cast)


def finite_chunks(reader: CheckpointReader, name: str) -> Iterator[memoryview]:
    """The stored bytes of a tensor, piece by piece. Raises: CheckpointError if it is a float with NaN or infinity in it."""
    info = reader.info(name)
    for chunk in reader.chunks(name):
        if info.dtype in FLOATS and not torch.isfinite(torch.frombuffer(chunk, dtype=TORCH_DTYPES[info.dtype])).all():
            raise CheckpointError(
                f"{info.file}: tensor {name} holds NaN or infinity; the checkpoint is damaged: fetch it again"
            )
        yield chunk


def write_safetensors(path: Path, tensors: dict[str, Stored], in_order: bool = False) -> int:
    """Write `tensors` to `path`, durably and atomically. Returns the file's size in bytes.

    Args:
        in_order: as they stand in `tensors`; else by name.

    Raises: CheckpointError naming the file and what to do if the disk is full or the folder cannot be written.
    """
    names = list(tensors) if in_order else sorted(tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        stored = tensors[name]
        header[name] = {
            "dtype": stored.dtype,
            "shape": list(stored.shape),
            "data_offsets": [offset, offset + stored.nbytes],
        }
        offset += stored.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)

    def write(stream: IO[bytes]) -> None:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in names:
            for piece in tensors[name].pieces():
                stream.write(piece)

    replace_file(path, write)
    return 8 + len(encoded) + offset


def write_text(path: Path, text: str) -> None:
    """Write a text file durably and atomically. Raises: CheckpointError as `write_safetensors`."""
    replace_file(path, lambda stream: stream.write(text.encode()))


def write_json(path: Path, content: object) -> None:
    """Write JSON durably and atomically, indented. Raises: CheckpointError as `write_safetensors`."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def replace_file(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let `write` fill a temporary file, flush it to the disk and put it in the place of `path`."""
    partial = path.with_name(path.name + PARTIAL)
    with writing(path):
        try:
            with open(partial, "wb") as stream:
                write(stream)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: Path):  # type: ignore[no-untyped-def]
    """Turns an OSError met while writing `path` into a CheckpointError that says what to do."""
    try:
        yield
    except OSError as error:
        remedy = {
            errno.ENOSPC: "the disk is full; free some space and run the same command again: finished blocks are kept",
            errno.EDQUOT: "the disk quota is used up; free some space and run the same command again",
            errno.EFBIG: "the file size limit is reached; raise it (ulimit -f) and run the same command again",
            errno.EROFS: "the file system is read-only; choose another folder with --out",
            errno.EACCES: "no permission to write there; choose another folder with --out",
            errno.EPERM: "no permission to write there; choose another folder with --out",
            errno.ENOTDIR: "a file stands where a folder should be; choose another folder with --out",
        }.get(error.errno or 0, f"{error.strerror}; mend it and run the same command again")
        raise CheckpointError(f"{path}: cannot be written: {remedy}") from None
