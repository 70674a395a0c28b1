"""A linear whose weights are values of small tables: codes, and what they stand for.

weight_packed  int32 [out, ceil(in * bits / 32)]     codes 0 .. 2^bits - 1, packed as in quantized_spec

and either one table, with scales per row and group (group_size of inputs, or -1: the row),

weight_table   float [2^bits]                        in the dtype of the model, as all floats here
weight_scale   float [out, groups]                   may be negative

weight = table[code] * scale

or a table per row (group_size 0)

weight_table   float [out, 2^bits]

weight = table[row, code]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from compress.errors import CheckpointError
from compress.modules.quantized_spec import n_words
from compress.modules.spec import MAX_FEATURES, ModuleSpec, check_whole

MIN_BITS, MAX_BITS = 2, 4


@dataclass(frozen=True)
class LUTSpec(ModuleSpec):
    """`group_size`: inputs that share a scale, -1: all of a row; 0: no scales, but a table per row."""

    representation: ClassVar[str] = "lut"
    module: ClassVar[str] = "compress.modules.lut:LUTLinear"
    bits: int
    group_size: int

    @property
    def n_groups(self) -> int:
        """Scales per row."""
        if self.group_size == 0:
            return 0
        return 1 if self.group_size == -1 else self.in_features // self.group_size

    def tensors(self, float_dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        out, size = self.out_features, 2**self.bits
        packed = ("I32", (out, n_words(self.in_features, self.bits)))
        if not self.n_groups:
            return {"weight_packed": packed, "weight_table": (float_dtype, (out, size))}
        return {
            "weight_packed": packed,
            "weight_table": (float_dtype, (size,)),
            "weight_scale": (float_dtype, (out, self.n_groups)),
        }

    def validate(self) -> None:
        for name in ("in_features", "out_features"):
            check_whole(name, getattr(self, name), 1, MAX_FEATURES)
        check_whole("bits", self.bits, MIN_BITS, MAX_BITS)
        check_whole("group_size", self.group_size, -1, self.in_features)
        if self.group_size > 0 and self.in_features % self.group_size:
            raise CheckpointError(f"group_size={self.group_size} does not divide in_features={self.in_features}")
