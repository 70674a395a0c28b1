"""Checksums that an export carries, so that a byte that changed since is an error and not another model.

safetensors checks lengths, not contents. `compress_export.json` holds a CRC-32 of every tensor (over its name, dtype, shape
and bytes) and the SHA-256 of the files that say how tensors and text are to be read. Tensors are checked as they are
read, about 2 GB a second and core; the README, the licence and the chat template may be edited.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint.headers import read_json
from compress.errors import CheckpointError

if TYPE_CHECKING:
    from compress.checkpoint.headers import TensorInfo

SEAL = "compress_export.json"
VERSION = 1
SEALED_FILES = (
    "config.json", "quantize_config.json", "model.safetensors.index.json",
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "added_tokens.json",
)  # fmt: skip
PIECE = 1 << 24


class Checksum:
    """A tensor's CRC-32, taken piece by piece."""

    def __init__(self, name: str, dtype: str, shape: Iterable[int]):
        self.value = zlib.crc32(f"{name} {dtype} {list(shape)}".encode())

    def add(self, piece: Any) -> None:
        self.value = zlib.crc32(piece, self.value)

    def __str__(self) -> str:
        return f"{self.value:08x}"


class Seal:
    """What `compress_export.json` of a folder says its tensors and files are."""

    def __init__(self, folder: Path, content: Mapping[str, Any]):
        self.folder = folder
        self.tensors = _strings(folder, content, "tensors")
        self.files = _strings(folder, content, "sealed_files")

    def check_files(self) -> None:
        """Raises: CheckpointError naming the file that is missing or was changed."""
        for name, expected in self.files.items():
            file = self.folder / Path(name).name
            if not file.is_file():
                raise CheckpointError(f"{file}: missing; fetch or export the model again")
            if file_sha256(file) != expected:
                raise CheckpointError(f"{file}: {self._changed()}")

    def check_names(self, infos: Mapping[str, TensorInfo]) -> None:
        """Raises: CheckpointError naming a tensor that there is too much or too little of."""
        for name in sorted(self.tensors.keys() - infos.keys()):
            raise CheckpointError(f"{self.folder}: tensor {name} is in no file; fetch or export the model again")
        for name in sorted(infos.keys() - self.tensors.keys()):
            raise CheckpointError(
                f"{infos[name].file}: tensor {name} was added after the export; fetch or export the model again"
            )

    def check(self, info: TensorInfo, checksum: Checksum) -> None:
        """Raises: CheckpointError naming file and tensor if the checksum is another."""
        if self.tensors.get(info.name) != str(checksum):
            raise CheckpointError(f"{info.file}: tensor {info.name} {self._changed()}")

    def _changed(self) -> str:
        return (
            f"was changed after the export (its checksum differs from that in {SEAL}); fetch or export the model again, or "
            f"delete {SEAL} if the change is meant"
        )


def _strings(folder: Path, content: Mapping[str, Any], key: str) -> dict[str, str]:
    found = content.get(key)
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise CheckpointError(
            f"{folder / SEAL}: {key} is damaged; fetch or export the model again, or delete the file to go without its checks"
        )
    return found


def read_seal(folder: Path) -> Seal | None:
    """The seal of a folder, whose files it has been held to; None if there is none.

    Raises: CheckpointError naming the file that was changed, or the seal itself if it is damaged.
    """
    if not (folder / SEAL).is_file():
        return None
    content = read_json(folder / SEAL)
    version = content.get("format_version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise CheckpointError(
            f"{folder / SEAL}: format_version {version!r:.40} is not known here; upgrade with pip install -U compress-llm"
        )
    seal = Seal(folder, content)
    seal.check_files()
    return seal


def check_all(folder: Path, infos: Mapping[str, TensorInfo]) -> None:
    """Hold every tensor of a folder to its seal, on all cores; nothing is done where there is no seal."""
    seal = read_seal(folder)
    if seal is None:
        return
    seal.check_names(infos)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for _ in pool.map(lambda info: seal.check(info, _checksum_on_disk(info)), infos.values()):
            pass


def _checksum_on_disk(info: TensorInfo) -> Checksum:
    checksum = Checksum(info.name, info.dtype, info.shape)
    try:
        with open(info.file, "rb") as stream:
            stream.seek(info.offset)
            left = info.nbytes
            while left:
                piece = stream.read(min(PIECE, left))
                if not piece:
                    raise CheckpointError(
                        f"{info.file}: ends inside tensor {info.name}; the file was cut: fetch it again"
                    )
                checksum.add(piece)
                left -= len(piece)
    except OSError as error:
        raise CheckpointError(
            f"{info.file}: tensor {info.name} cannot be read: {error.strerror}; check the disk"
        ) from None
    return checksum


def file_sha256(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    try:
        with open(file, "rb") as stream:
            while piece := stream.read(PIECE):
                digest.update(piece)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}; check the file and the disk") from None
    return digest.hexdigest()
