"""compressed-tensors, `pack-quantized`: our tensors as they are; only config.json says it another way.

Scales of a GPTQ or AWQ source are float16 in a model of another dtype. Readers expect the model's, which is taken where it
holds them exactly.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from compress.checkpoint.standard import STANDARD, standard_config, standard_obstacle
from compress.export.formats import Format, Model, Tensors


class CompressedTensors(Format):
    name: ClassVar[str] = STANDARD

    def obstacles(self, model: Model) -> dict[str, str]:
        found = standard_obstacle(model.specs, model.architecture)
        return {} if found is None else {found[0]: found[1]}

    def tensors(self, model: Model, name: str) -> Tensors:
        return model.specs[name].tensors(self.scale_dtype(model, name))

    def convert(self, model: Model, name: str) -> dict[str, Tensor]:
        return {
            suffix: t
            for suffix, t in model.module(name, self.scale_dtype(model, name)).stored().items()
            if suffix != "bias"
        }

    def scale_dtype(self, model: Model, name: str) -> str:
        return model.dtype if model.fits(name, model.dtype) else model.float_dtype(name)

    def quantization_config(self, model: Model) -> dict[str, Any] | None:
        return standard_config(model.specs, model.architecture)
