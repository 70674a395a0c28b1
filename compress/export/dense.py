"""Plain weights under their original names, as if nothing had been compressed: any compressed module can become one.

The weight is what the module stands for in the model's dtype, bit for bit what it computes with when loaded.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from compress.checkpoint.reader import TORCH_DTYPES
from compress.export.formats import Format, Model, Tensors


class Dense(Format):
    name: ClassVar[str] = "dense"

    def obstacles(self, model: Model) -> dict[str, str]:
        return {}

    def tensors(self, model: Model, name: str) -> Tensors:
        spec = model.specs[name]
        shape = (spec.out_features, spec.in_features)
        return {"weight": (model.dtype, shape[::-1] if model.is_transposed(name) else shape)}

    def convert(self, model: Model, name: str) -> dict[str, Tensor]:
        weight = model.module(name, model.dtype).dense(TORCH_DTYPES[model.dtype])
        return {"weight": weight.T.contiguous() if model.is_transposed(name) else weight}

    def quantization_config(self, model: Model) -> dict[str, Any] | None:
        return None

    def scale_dtype(self, model: Model, name: str) -> str | None:
        return model.dtype
