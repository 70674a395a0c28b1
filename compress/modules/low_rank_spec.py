"""A linear as two thin ones: weight = left @ right, left [out, rank], right [rank, in].

right.weight   float [rank, in]     in the dtype of the model
left.weight    float [out, rank]

A factor that a later step compressed stores its own tensors instead, under the same prefix (right.weight_packed, …), as the
spec in `right` or `left` says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from compress.modules.factored_spec import FactoredSpec
from compress.modules.spec import ModuleSpec


@dataclass(frozen=True)
class LowRankSpec(FactoredSpec):
    """Two factors of `rank`. `right`, `left`: how a factor is stored where it is not plain floats."""

    representation: ClassVar[str] = "low_rank"
    module: ClassVar[str] = "compress.modules.low_rank:LowRankLinear"
    factors: ClassVar[tuple[str, ...]] = ("right", "left")
    right: ModuleSpec | None = None
    left: ModuleSpec | None = None

    def leaf_shapes(self) -> dict[str, tuple[int, int]]:
        return {"right": (self.rank, self.in_features), "left": (self.out_features, self.rank)}
