"""A linear in few bits and a correction of low rank: weight = base + left @ right, left [out, rank], right [rank, in].

base.…         the linear in few bits: tensors of its own representation (base.weight_packed, base.weight_scale, …)
right.weight   float [rank, in]     in the dtype of the model
left.weight    float [out, rank]

A factor in integer codes stores right.weight_packed, …, as the spec in `right` or `left` says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from compress.errors import CheckpointError
from compress.modules.factored_spec import FactoredSpec
from compress.modules.spec import ModuleSpec

BASE, FACTORS = "base", ("right", "left")


@dataclass(frozen=True)
class CorrectedSpec(FactoredSpec):
    """`base` in few bits; `right`, `left` of `rank`: how a factor is stored where it is not plain floats."""

    representation: ClassVar[str] = "corrected"
    module: ClassVar[str] = "compress.modules.corrected:CorrectedLinear"
    factors: ClassVar[tuple[str, ...]] = (BASE, *FACTORS)
    base: ModuleSpec
    right: ModuleSpec | None = None
    left: ModuleSpec | None = None

    def leaf_shapes(self) -> dict[str, tuple[int, int]]:
        return {
            BASE: (self.out_features, self.in_features),
            "right": (self.rank, self.in_features),
            "left": (self.out_features, self.rank),
        }

    def validate(self) -> None:
        if not isinstance(self.base, ModuleSpec):
            raise CheckpointError(f"base={self.base!r:.200} is not how the base can be stored")
        super().validate()
