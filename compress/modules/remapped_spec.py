"""A linear as two thin ones whose singular vectors are mostly in 8 bits: bytes and rank correspond one to one.

With s = min(out, in), l = max(out, in), weight = left @ right, left [out, rank], right [rank, in]:

left_code      I8 [s, rank]      rows 0 .. s of left, times left_scale
left_scale     float [rank]
right_code     I8 [rank, s]      columns 0 .. s of right, times right_scale
right_scale    float [rank]
rest           float             what is left of the longer factor: rows s .. of left [out - s, rank], or columns s .. of
                                 right [rank, in - s]; absent where out = in

2 l rank + 4 rank bytes with 16-bit floats, so rank min(out, in) takes the bytes of the 16-bit weight: every ratio between
0 and 1 is a rank between 0 and full. Two factors of 16 bits reach the weight's bytes at rank out in / (out + in) already.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from compress.modules.spec import MAX_FEATURES, ModuleSpec, check_whole


@dataclass(frozen=True)
class RemappedSpec(ModuleSpec):
    """Factors of `rank`, the shared length in 8 bits per singular vector, the remainder of the longer one in floats."""

    representation: ClassVar[str] = "remapped_low_rank"
    module: ClassVar[str] = "compress.modules.remapped:RemappedLinear"
    rank: int

    @property
    def shared(self) -> int:
        """s: so long is the part of every singular vector that is in 8 bits."""
        return min(self.in_features, self.out_features)

    @property
    def thin(self) -> bool:
        """Whether two thin products take fewer multiplications than the dense one."""
        return self.rank * (self.in_features + self.out_features) < self.in_features * self.out_features

    def tensors(self, float_dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        short, rank = self.shared, self.rank
        tensors: dict[str, tuple[str, tuple[int, ...]]] = {
            "left_code": ("I8", (short, rank)),
            "left_scale": (float_dtype, (rank,)),
            "right_code": ("I8", (rank, short)),
            "right_scale": (float_dtype, (rank,)),
        }
        if self.out_features > short:
            tensors["rest"] = (float_dtype, (self.out_features - short, rank))
        if self.in_features > short:
            tensors["rest"] = (float_dtype, (rank, self.in_features - short))
        return tensors

    def validate(self) -> None:
        for name in ("in_features", "out_features"):
            check_whole(name, getattr(self, name), 1, MAX_FEATURES)
        check_whole("rank", self.rank, 1, self.shared)
