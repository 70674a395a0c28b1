"""A linear as three: weight = columns @ link @ rows, columns [out, rank], link [rank, rank], rows [rank, in].

rows.weight      float [rank, in]     in the dtype of the model
link.weight      float [rank, rank]
columns.weight   float [out, rank]

A factor that a later step compressed stores its own tensors instead, under the same prefix (rows.weight_packed, …), as the
spec in `rows`, `link` or `columns` says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from compress.modules.factored_spec import FactoredSpec
from compress.modules.spec import ModuleSpec


@dataclass(frozen=True)
class CURSpec(FactoredSpec):
    """Three factors of `rank`. `rows`, `link`, `columns`: how a factor is stored where it is not plain floats."""

    representation: ClassVar[str] = "cur"
    module: ClassVar[str] = "compress.modules.cur:CURLinear"
    factors: ClassVar[tuple[str, ...]] = ("rows", "link", "columns")
    rows: ModuleSpec | None = None
    link: ModuleSpec | None = None
    columns: ModuleSpec | None = None

    def leaf_shapes(self) -> dict[str, tuple[int, int]]:
        return {
            "rows": (self.rank, self.in_features),
            "link": (self.rank, self.rank),
            "columns": (self.out_features, self.rank),
        }
