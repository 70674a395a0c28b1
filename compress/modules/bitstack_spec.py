"""A linear as a stack of blocks, each a matrix of signs times a magnitude of low rank; any first blocks are a module.

block_0.signs    U8 [out, ceil(in / 8)]     bit j % 8 of byte j // 8 is the sign of column j, 1 for +1; bits behind the last are 0
block_0.left     F16 [out, rank]            the magnitude is left @ right.T
block_0.right    F16 [in, rank]
block_1.signs …
scale            F16 [in]                   of the columns, where the inputs' scale could not be folded into their producer

weight = (sum_b signs_b * (left_b @ right_b.T)) * scale.  A block takes out ceil(in / 8) + 2 rank (out + in) bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from compress.errors import CheckpointError
from compress.modules.spec import MAX_FEATURES, ModuleSpec, check_whole

MAX_BLOCKS = 64  # of a module; 16 are more than the original's bits


@dataclass(frozen=True)
class BitStackSpec(ModuleSpec):
    """The first `blocks` blocks, magnitudes of `rank`. `scaled`: the columns have a scale of their own."""

    representation: ClassVar[str] = "bitstack"
    module: ClassVar[str] = "compress.modules.bitstack:BitStackLinear"
    scales_rows: ClassVar[bool] = True
    rank: int
    blocks: int
    scaled: bool = False

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        n_in, n_out = self.in_features, self.out_features
        return n_out * -(-n_in // 8) + 2 * self.rank * (n_out + n_in)

    @property
    def n_levels(self) -> int:
        return self.blocks

    def first(self, n_levels: int) -> BitStackSpec:
        return replace(self, blocks=n_levels)

    def level(self, number: int, float_dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        if number == 0:
            return self.first(1).tensors(float_dtype)
        return {f"{block_name(number)}.{part}": tensor for part, tensor in self.block_tensors().items()}

    def block_tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The tensors of one block, by the last part of their names."""
        return {
            "signs": ("U8", (self.out_features, -(-self.in_features // 8))),
            "left": ("F16", (self.out_features, self.rank)),
            "right": ("F16", (self.in_features, self.rank)),
        }

    def tensors(self, float_dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        found = {
            f"{block_name(block)}.{part}": tensor
            for block in range(self.blocks)
            for part, tensor in self.block_tensors().items()
        }
        return {**found, "scale": ("F16", (self.in_features,))} if self.scaled else found

    def validate(self) -> None:
        for name in ("in_features", "out_features"):
            check_whole(name, getattr(self, name), 1, MAX_FEATURES)
        check_whole("rank", self.rank, 1, min(self.in_features, self.out_features))
        check_whole("blocks", self.blocks, 1, MAX_BLOCKS)
        if type(self.scaled) is not bool:
            raise CheckpointError(f"scaled={self.scaled!r} is neither true nor false")


def block_name(block: int) -> str:
    """The prefix of the tensors of a block."""
    return f"block_{block}"
