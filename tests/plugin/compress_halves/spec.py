from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from compress.errors import CheckpointError
from compress.modules.spec import ModuleSpec


@dataclass(frozen=True)
class Float8Spec(ModuleSpec):
    """One float8 per weight, one scale per row."""

    representation: ClassVar[str] = "float8_rows"
    module: ClassVar[str] = "compress_halves.method:Float8Linear"

    def tensors(self, float_dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {
            "weight_float8": ("F8_E4M3", (self.out_features, self.in_features)),
            "weight_scale": (float_dtype, (self.out_features, 1)),
        }

    def validate(self) -> None:
        if self.in_features < 1 or self.out_features < 1:
            raise CheckpointError("a float8_rows module of no size")
