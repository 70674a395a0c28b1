"""Integer codes; a scale, and a zero point if asymmetric, per row and group: exactly what compressed-tensors stores.

weight_packed      int32 [out, ceil(in * bits / 32)]       codes 0 .. 2^bits - 1, one dense bit stream per row, low bits
                                                           first, each row padded to whole words
weight_scale       float [out, groups]                     in the dtype of the model
weight_zero_point  int32 [ceil(out * bits / 32), groups]   asymmetric only: packed in the same way, but along out
weight_shape       int64 [2]                               (out, in)

weight = (code - zero_point) * scale,  zero_point = 2^(bits-1) where none is stored
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from compress.errors import CheckpointError
from compress.modules.spec import MAX_FEATURES, ModuleSpec, check_whole

MIN_BITS, MAX_BITS = 1, 8  # what compressed-tensors can pack


@dataclass(frozen=True)
class QuantizedSpec(ModuleSpec):
    """A linear, or a lookup table of `out_features` rows, in integer codes. `group_size` -1: one group per row."""

    representation: ClassVar[str] = "quantized"
    module: ClassVar[str] = "compress.modules.quantized:QuantizedModule"
    bits: int
    group_size: int
    symmetric: bool = True
    kind: Literal["linear", "embedding"] = "linear"

    @property
    def n_groups(self) -> int:
        return 1 if self.group_size == -1 else self.in_features // self.group_size

    def tensors(self, float_dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        out, groups = self.out_features, self.n_groups
        tensors: dict[str, tuple[str, tuple[int, ...]]] = {
            "weight_packed": ("I32", (out, n_words(self.in_features, self.bits))),
            "weight_scale": (float_dtype, (out, groups)),
            "weight_shape": ("I64", (2,)),
        }
        if not self.symmetric:
            tensors["weight_zero_point"] = ("I32", (n_words(out, self.bits), groups))
        return tensors

    def validate(self) -> None:
        for name in ("in_features", "out_features"):
            check_whole(name, getattr(self, name), 1, MAX_FEATURES)
        check_whole("bits", self.bits, MIN_BITS, MAX_BITS)
        if self.group_size != -1:
            check_whole("group_size", self.group_size, 1, self.in_features)
            if self.in_features % self.group_size:
                raise CheckpointError(f"group_size={self.group_size} does not divide in_features={self.in_features}")
        if not isinstance(self.symmetric, bool):
            raise CheckpointError(f"symmetric={self.symmetric!r} is neither true nor false")
        if self.kind not in ("linear", "embedding"):
            raise CheckpointError(f"kind={self.kind!r} is neither 'linear' nor 'embedding'")


def n_words(n_codes: int, bits: int) -> int:
    """32-bit words that hold `n_codes` codes of `bits` bits."""
    return -(-n_codes * bits // 32)
