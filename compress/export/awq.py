"""AWQ, version `gemm`: 4 bits, packed along `out`, eight columns to a word in the order 0 2 4 6 1 3 5 7.

The format has one group size for all layers. Zero points are always stored, 8 where the grid is symmetric.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Any, ClassVar

from torch import Tensor

from compress.checkpoint.foreign import AWQ as METHOD
from compress.checkpoint.foreign import AWQ_BITS
from compress.checkpoint.translate import PER_WORD, to_awq
from compress.export.formats import Format, Model, Tensors, half_precision
from compress.export.fused import all_linears
from compress.export.gptq import base_setting, name_expressions
from compress.modules.quantized_spec import QuantizedSpec


class AWQ(Format):
    name: ClassVar[str] = METHOD
    full_names: ClassVar[bool] = True

    def obstacles(self, model: Model) -> dict[str, str]:
        found = {name: _obstacle(spec) for name, spec in model.specs.items()}
        if any(found.values()):
            return {name: why for name, why in found.items() if why is not None}
        _, group_size = base_setting(model)
        odd = {}
        for name, spec in model.specs.items():
            assert isinstance(spec, QuantizedSpec)
            if spec.n_groups * (group_size if group_size != -1 else spec.in_features) != spec.in_features:
                odd[name] = (
                    f"it has groups of {spec.group_size}, and AWQ has one group size for all, {group_size} for most"
                )
            elif model.is_transposed(name):
                odd[name] = "it is a Conv1D, and readers of AWQ take linears only"
        return odd or _taken_for(model)

    def tensors(self, model: Model, name: str) -> Tensors:
        spec = model.specs[name]
        assert isinstance(spec, QuantizedSpec)
        return {
            "qweight": ("I32", (spec.in_features, spec.out_features // PER_WORD)),
            "qzeros": ("I32", (spec.n_groups, spec.out_features // PER_WORD)),
            "scales": ("F16", (spec.n_groups, spec.out_features)),
        }

    def convert(self, model: Model, name: str) -> dict[str, Tensor]:
        stored = model.module(name).stored()
        stored["weight_scale"] = half_precision(stored["weight_scale"])
        return to_awq(stored)

    def scale_dtype(self, model: Model, name: str) -> str | None:
        return "F16"

    def quantization_config(self, model: Model) -> dict[str, Any]:
        _, group_size = base_setting(model)
        left = _left_out(model)
        head = model.architecture.head.linears[0]
        rules: dict[str, dict[str, int]] = {
            f"-:{e}": {} for e in name_expressions(model, [name for name in left if name != head])
        }
        return {
            "quant_method": METHOD,
            "version": "gemm",
            "bits": AWQ_BITS,
            "group_size": group_size,
            "zero_point": True,
            "lm_head": head in model.specs,
            "modules_to_not_convert": [model.full_name(name) for name in left] or None,
            **({"dynamic": rules} if rules else {}),  # the same for GPTQModel, which goes by this key
        }


def _left_out(model: Model) -> list[str]:
    """Linears that are not quantized."""
    return [name for name in all_linears(model.architecture) if name not in model.specs]


def _taken_for(model: Model) -> dict[str, str]:
    """Quantized layers that readers would leave out: they look for `modules_to_not_convert` inside names."""
    quantized = sorted(model.specs)
    found = {}
    for left in _left_out(model):
        place = bisect_left(quantized, left)
        if place < len(quantized) and quantized[place].startswith(left):
            found[quantized[place]] = (
                f"{left} is not quantized, and readers of AWQ take its name for a part of this one"
            )
    return found


def _obstacle(spec: object) -> str | None:
    if not isinstance(spec, QuantizedSpec):
        return f"it is stored as {getattr(spec, 'representation', spec)}, and AWQ holds integer codes"
    if spec.kind != "linear":
        return "it is a token table, and AWQ holds linears"
    if spec.bits != AWQ_BITS:
        return f"it has {spec.bits} bits, and AWQ holds {AWQ_BITS}"
    if spec.in_features % PER_WORD:
        return f"in_features={spec.in_features} is not divisible by {PER_WORD}"
    if spec.out_features % PER_WORD:
        return f"out_features={spec.out_features} is not divisible by {PER_WORD}, the columns of a word"
    return None
