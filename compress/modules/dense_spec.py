"""An ordinary weight that a method changed: stored as the layer itself stores it, so that loaders see an ordinary layer.

weight   float [out, in]    in the dtype of the model; in a Conv1D [in, out], as that has it
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from compress.modules.spec import MAX_FEATURES, ModuleSpec, check_whole


@dataclass(frozen=True)
class DenseSpec(ModuleSpec):
    """A linear with another weight."""

    representation: ClassVar[str] = "dense"
    module: ClassVar[str] = "compress.modules.dense:DenseLinear"
    plain: ClassVar[bool] = True

    def tensors(self, float_dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {"weight": (float_dtype, (self.out_features, self.in_features))}

    def validate(self) -> None:
        for name in ("in_features", "out_features"):
            check_whole(name, getattr(self, name), 1, MAX_FEATURES)
