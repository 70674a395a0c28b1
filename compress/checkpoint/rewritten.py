"""A checkpoint that is read as though it had been rewritten: each tensor is made when it is asked for.

Nothing is written in between, so a rewrite costs no disk, and memory stays near the largest tensor, or `cache_bytes` where
a block is read twice (to be run, then to be written).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor

from compress.checkpoint.headers import TensorInfo
from compress.checkpoint.reader import TORCH_DTYPES, CheckpointReader
from compress.errors import CheckpointError, NumericsError
from compress.models.derived import Derived

ROWS_BYTES = 64 * 2**20  # of a table that is made piece by piece


class RewrittenReader(CheckpointReader):
    """The tensors of a rewritten model.

    Args:
        base: the model before, which this reader closes.
        infos: the tensors of the result; where they lie is of no meaning.
        tensors: each of them: a function of tensors of `base`, or the name of the one that it is.
        cache_bytes: of tensors that were made and may be asked for again.
    """

    def __init__(
        self,
        base: CheckpointReader,
        infos: dict[str, TensorInfo],
        tensors: Mapping[str, Derived | str],
        cache_bytes: int,
    ):
        super().__init__(base.folder, infos, sealed=False)
        self.base, self._tensors = base, tensors
        self._cache: OrderedDict[str, Tensor] = OrderedDict()
        self._cache_bytes = cache_bytes
        self._last_tile: tuple[tuple[str, int], Tensor] = (("", 0), torch.empty(0))

    def close(self) -> None:
        self._cache.clear()
        self.base.close()

    def _bytes(self, info: TensorInfo, begin: int, nbytes: int) -> Tensor:
        source = self._tensors[info.name]
        if isinstance(source, str):
            stored = self.base.info(source)
            if self.base._unchecked(stored):
                self.base._hold(stored, self.base.pieces(stored))
            return self.base._bytes(stored, begin, nbytes)
        row_bytes = info.nbytes // max(info.shape[0], 1) if info.shape else info.nbytes
        if source.by_rows and row_bytes:
            first, last = begin // row_bytes, -(-(begin + nbytes) // row_bytes)
            size = self._tile_rows(info, source)
            tiles = [self._tile(info, source, number) for number in range(first // size, -(-last // size))]
            rows = torch.cat(tiles) if len(tiles) != 1 else tiles[0]
            return rows.reshape(-1).view(torch.uint8)[begin - first // size * size * row_bytes :][:nbytes]
        return self._made(info, source).reshape(-1).view(torch.uint8)[begin : begin + nbytes]

    def _made(self, info: TensorInfo, source: Derived) -> Tensor:
        if info.name in self._cache:
            self._cache.move_to_end(info.name)
            return self._cache[info.name]
        inputs = [self.base.read(name) for name in source.inputs]
        made = self._checked_result(info, source, inputs, info.shape)
        self._cache[info.name] = made
        while sum(tensor.nbytes for tensor in self._cache.values()) > self._cache_bytes and len(self._cache) > 1:
            self._cache.popitem(last=False)
        return made

    def read_rows(self, name: str, rows: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        source = self._tensors.get(name)
        if not isinstance(source, Derived) or not source.by_rows:
            return super().read_rows(name, rows, dtype)
        made = self._rows(self.info(name), source, rows)
        return made if dtype is None else made.to(dtype)

    def _tile_rows(self, info: TensorInfo, source: Derived) -> int:
        widest = max(self.base.info(source.inputs[0]).nbytes, info.nbytes) // max(info.shape[0], 1)
        return max(ROWS_BYTES // (8 * max(widest, 1)), 1)

    def _tile(self, info: TensorInfo, source: Derived, number: int) -> Tensor:
        """Rows of a table, in the same tiles whoever asks for which: a product of other rows may differ in the last bit."""
        if self._last_tile[0] != (info.name, number):
            size = self._tile_rows(info, source)
            rows = torch.arange(number * size, min((number + 1) * size, info.shape[0]))
            self._last_tile = (info.name, number), self._rows(info, source, rows)
        return self._last_tile[1]

    def _rows(self, info: TensorInfo, source: Derived, rows: Tensor) -> Tensor:
        inputs = [self.base.read_rows(source.inputs[0], rows), *(self.base.read(name) for name in source.inputs[1:])]
        return self._checked_result(info, source, inputs, (len(rows), *info.shape[1:]))

    def _checked_result(
        self, info: TensorInfo, source: Derived, inputs: list[Tensor], shape: tuple[int, ...]
    ) -> Tensor:
        """What `source` makes of its inputs, in the dtype in which it is stored.

        Raises: CheckpointError naming an input with NaN or infinity; NumericsError if the dtype cannot hold the result.
        """
        made = source.make(*inputs)
        assert tuple(made.shape) == shape, f"{info.name}: {tuple(made.shape)} where {shape} was planned"
        if not torch.isfinite(made).all():
            for name, tensor in zip(source.inputs, inputs, strict=True):
                if not torch.isfinite(tensor).all():
                    raise CheckpointError(
                        f"{self.folder}: tensor {name} holds NaN or infinity; the checkpoint is damaged: fetch it again"
                    )
        stored = made.to(TORCH_DTYPES[info.dtype]).contiguous()
        if not torch.isfinite(stored).all():
            raise NumericsError(
                f"{info.name}: rewritten, has values beyond the range of {info.dtype}; use --set model.dtype=bfloat16 or "
                f"model.dtype=float32"
            )
        return stored
