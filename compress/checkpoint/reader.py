"""Tensors from a checkpoint folder, one at a time, by `pread`.

Not memory-mapped: a map counts the whole file against an address-space limit and its pages as resident memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from compress.checkpoint.budget import Budget
from compress.checkpoint.headers import TensorInfo, read_headers
from compress.checkpoint.seal import Checksum, read_seal
from compress.errors import CheckpointError

COPY_CHUNK = 16 * 2**20

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "U16": torch.uint16,
    "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
SAFETENSORS_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


class CheckpointReader:
    """Lazy access to the tensors of one folder. Files are opened when first needed; `close` closes them.

    Where the folder carries checksums (`seal.py`), each tensor is held to its own when it is first read.
    """

    def __init__(
        self,
        folder: Path | str,
        infos: dict[str, TensorInfo] | None = None,
        sealed: bool | None = None,
        budget: Budget | None = None,
    ):
        """`infos` replaces the folder's own headers, for a folder that is still being written: `sealed` is then False.
        `budget`: how much of a stack is to be there; by default all."""
        self.folder = Path(folder)
        self.infos = read_headers(self.folder, budget) if infos is None else infos
        self.seal = read_seal(self.folder) if (infos is None if sealed is None else sealed) else None
        if self.seal is not None:
            self.seal.check_names(self.on_disk)
        self._checked: set[str] = set()
        self._files: dict[Path, int] = {}

    @property
    def on_disk(self) -> dict[str, TensorInfo]:
        """The tensors as they are stored."""
        return self.infos

    def __contains__(self, name: str) -> bool:
        return name in self.infos

    def info(self, name: str) -> TensorInfo:
        """Raises: CheckpointError if the checkpoint has no tensor of this name."""
        if name not in self.infos:
            raise CheckpointError(
                f"{self.folder}: tensor {name} is missing; the checkpoint does not fit its config.json"
            )
        return self.infos[name]

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The whole tensor; float tensors are cast to `dtype` if one is given."""
        tensor = self._whole(self.info(name))
        return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor

    def _whole(self, info: TensorInfo) -> Tensor:
        data = self._bytes(info, 0, info.nbytes)
        if self._unchecked(info):
            self._hold(info, [memoryview(data.numpy())])
        return data.view(TORCH_DTYPES[info.dtype]).reshape(info.shape)

    def _unchecked(self, info: TensorInfo) -> bool:
        return self.seal is not None and info.name in self.on_disk and info.name not in self._checked

    def _hold(self, info: TensorInfo, pieces: Iterable[memoryview]) -> None:
        """Hold a tensor to its checksum. Raises: CheckpointError naming file and tensor."""
        assert self.seal is not None
        checksum = Checksum(info.name, info.dtype, info.shape)
        for piece in pieces:
            checksum.add(piece)
        self.seal.check(info, checksum)
        self._checked.add(info.name)

    def read_rows(self, name: str, rows: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The given rows (a sorted 1-D int tensor) of a matrix, without reading the rest."""
        info = self.info(name)
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < info.shape[0]:
            raise CheckpointError(
                f"{info.file}: row {int(rows.max())} of {name} is wanted, which has {info.shape[0]} rows; the weights do not fit "
                f"their config.json or their tokenizer"
            )
        if self._unchecked(info):
            self._hold(info, self.pieces(info))  # once: a checksum is of the whole
        row_bytes = info.nbytes // max(info.shape[0], 1)
        out = torch.empty((len(rows), *info.shape[1:]), dtype=dtype or TORCH_DTYPES[info.dtype])
        first = 0
        for begin, end in _runs(rows.tolist()):
            part = self._bytes(info, begin * row_bytes, (end - begin) * row_bytes)
            part = part.view(TORCH_DTYPES[info.dtype])
            out[first : first + end - begin] = part.reshape(end - begin, *info.shape[1:])
            first += end - begin
        return out

    def chunks(self, name: str) -> Iterator[memoryview]:
        """The stored bytes of a tensor, piece by piece, as they are."""
        info = self.info(name)
        if self._unchecked(info):
            self._hold(info, self.pieces(info))
        yield from self.pieces(info)

    def pieces(self, info: TensorInfo) -> Iterator[memoryview]:
        """The bytes of a tensor, unchecked."""
        for begin in range(0, info.nbytes, COPY_CHUNK):
            yield memoryview(self._bytes(info, begin, min(COPY_CHUNK, info.nbytes - begin)).numpy())

    def close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _bytes(self, info: TensorInfo, begin: int, nbytes: int) -> Tensor:
        buffer = torch.empty(nbytes, dtype=torch.uint8)
        view = memoryview(buffer.numpy())
        descriptor = self._open(info.file)
        done = 0
        while done < nbytes:
            try:
                n = os.preadv(descriptor, [view[done:]], info.offset + begin + done)
            except OSError as error:
                raise CheckpointError(
                    f"{info.file}: tensor {info.name} cannot be read: {error.strerror}; check the disk or fetch the file again"
                ) from None
            if n == 0:
                raise CheckpointError(f"{info.file}: ends inside tensor {info.name}; the file was cut: fetch it again")
            done += n
        return buffer

    def _open(self, file: Path) -> int:
        if file not in self._files:
            try:
                self._files[file] = os.open(file, os.O_RDONLY)
            except OSError as error:
                raise CheckpointError(f"{file}: cannot be opened: {error.strerror}; check the file") from None
        return self._files[file]


def _runs(rows: list[int]) -> Iterator[tuple[int, int]]:
    """Consecutive stretches of sorted row numbers as half-open ranges."""
    start = previous = None
    for row in rows:
        if start is None:
            start = row
        elif row != previous + 1:  # type: ignore[operator]
            yield start, previous + 1  # type: ignore[operator]
            start = row
        previous = row
    if start is not None:
        yield start, previous + 1  # type: ignore[operator]
