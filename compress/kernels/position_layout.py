"""How the places of the weights that a pruned row keeps are written down; the number of bits is known without torch.

    indices   2:4: for each group of 4 weights the two places, 2 bits each, the smaller first: what hardware reads
    ranks     any other N:M with no more than 256 sets of N places among M: the number of the group's set,
              ceil(log2 C(M, N)) bits. Sets {p_1 < ... < p_N} are numbered by sum_i C(p_i, i)
    bits      all else: one bit per weight, 1 where it is kept

Codes lie in int32 words, row by row, as compress/kernels/packing.py packs them.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb
from typing import Literal

MAX_SETS = 256  # a code has no more than 8 bits


@dataclass(frozen=True)
class PositionLayout:
    """`bits` of a code, and how many of them a group of `group` weights takes."""

    kind: Literal["indices", "ranks", "bits"]
    bits: int
    per_group: int
    group: int

    def n_words(self, in_features: int) -> int:
        """32-bit words per row."""
        return -(-(in_features // self.group) * self.per_group * self.bits // 32)


def position_layout(n: int, m: int) -> PositionLayout:
    """The layout for `n` of `m` kept; 0 of 0: any number, anywhere."""
    if (n, m) == (2, 4):
        return PositionLayout("indices", 2, 2, 4)
    if m and comb(m, n) <= MAX_SETS:
        return PositionLayout("ranks", max(1, (comb(m, n) - 1).bit_length()), 1, m)
    return PositionLayout("bits", 1, 1, 1)
