"""GPTQ, as AutoGPTQ began it and GPTQModel, vLLM, SGLang and transformers read it.

Symmetric models are written with `checkpoint_format: gptq`, which every reader knows. It stores zero points less one and
so cannot hold a zero point of 0, and readers differ over it; models with zero points are written as `gptq_v2`, which
stores them as they are. Columns keep their places: `g_idx` is the plain one.

Where layers differ in bits or group size, or are left as they were, `dynamic` says so, in the rules of GPTQModel: a regular
expression from the start of the module's name, `-:` for "left out", the first that matches holds. Servers that fuse q, k, v
and gate, up look for the fused name, so rules match that too where all its parts are alike.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar

from torch import Tensor

from compress.checkpoint.foreign import GPTQ as METHOD
from compress.checkpoint.foreign import GPTQ_BITS, GPTQ_V1, GPTQ_V2
from compress.checkpoint.names import expressions
from compress.checkpoint.translate import to_gptq
from compress.export.formats import Format, Model, Tensors, half_precision
from compress.export.fused import all_linears, fused_linears
from compress.models.families import module_name
from compress.modules.quantized_spec import QuantizedSpec, n_words

Setting = tuple[int, int]  # bits, group size; -1: one group per row


class GPTQ(Format):
    name: ClassVar[str] = METHOD
    full_names: ClassVar[bool] = True

    def obstacles(self, model: Model) -> dict[str, str]:
        found = {name: _obstacle(spec) for name, spec in model.specs.items()}
        return {name: why for name, why in found.items() if why is not None}

    def tensors(self, model: Model, name: str) -> Tensors:
        spec = _quantized(model, name)
        return {
            "qweight": ("I32", (n_words(spec.in_features, spec.bits), spec.out_features)),
            "qzeros": ("I32", (spec.n_groups, n_words(spec.out_features, spec.bits))),
            "scales": ("F16", (spec.n_groups, spec.out_features)),
            "g_idx": ("I32", (spec.in_features,)),
        }

    def convert(self, model: Model, name: str) -> dict[str, Tensor]:
        spec = _quantized(model, name)
        stored = model.module(name).stored()
        stored["weight_scale"] = half_precision(stored["weight_scale"])
        return to_gptq(stored, spec.bits, spec.group_size, less_one=is_symmetric(model))

    def scale_dtype(self, model: Model, name: str) -> str | None:
        return "F16"

    def quantization_config(self, model: Model) -> dict[str, Any]:
        form = GPTQ_V1 if is_symmetric(model) else GPTQ_V2
        bits, group_size = base_setting(model)
        rules = dynamic_rules(model)
        return {
            "quant_method": METHOD,
            "checkpoint_format": form,
            "format": form,
            "method": METHOD,
            "bits": bits,
            "group_size": group_size,
            "sym": is_symmetric(model),
            "desc_act": False,
            "lm_head": model.architecture.head.linears[0] in model.specs,
            "pack_dtype": "int32",
            **({"dynamic": rules} if rules else {}),
            "meta": {"quantizer": [f"compress-llm:{_version()}"], "true_sequential": True, "static_groups": False},
        }

    def files(self, model: Model) -> dict[str, Any]:
        return {"quantize_config.json": self.quantization_config(model)}


def is_symmetric(model: Model) -> bool:
    return all(getattr(spec, "symmetric", False) for spec in model.specs.values())


def base_setting(model: Model) -> Setting:
    """Bits and group size of most layers."""
    counts = Counter((spec.bits, spec.group_size) for spec in model.specs.values() if isinstance(spec, QuantizedSpec))
    return max(counts, key=lambda setting: (counts[setting], setting))


def dynamic_rules(model: Model) -> dict[str, dict[str, int]]:
    """Rules for what is not as the base setting says."""
    base = base_setting(model)
    head = model.architecture.head.linears[0]
    others: dict[Setting, list[str]] = {}
    for name in model.specs:
        if not _follows(_quantized(model, name), base):
            spec = _quantized(model, name)
            others.setdefault((spec.bits, spec.group_size), []).append(name)
    left = [name for name in all_linears(model.architecture) if name not in model.specs and name != head]
    rules: dict[str, dict[str, int]] = {f"-:{e}": {} for e in name_expressions(model, left)}
    for (bits, group_size), names in sorted(others.items()):
        rules.update({f"+:{e}": {"bits": bits, "group_size": group_size} for e in name_expressions(model, names)})
    return rules


def name_expressions(model: Model, names: list[str]) -> list[str]:
    """Regular expressions for modules by all the names that readers have for them, and for no other linear."""
    aliases = {name: _aliases(model, name) for name in all_linears(model.architecture)}
    fused = {whole: set(parts) for whole, parts in fused_linears(model.architecture).items()}
    wanted = {alias for name in names for alias in aliases[name]}
    wanted |= {model.full_name(whole) for whole, parts in fused.items() if parts <= set(names)}
    among = {alias for known in aliases.values() for alias in known} | {model.full_name(whole) for whole in fused}
    return expressions(wanted, among)


def _aliases(model: Model, name: str) -> set[str]:
    return {model.full_name(name), module_name(model.architecture, name)}


def _follows(spec: QuantizedSpec, base: Setting) -> bool:
    bits, group_size = base
    return (
        spec.bits == bits and spec.n_groups * (group_size if group_size != -1 else spec.in_features) == spec.in_features
    )


def _quantized(model: Model, name: str) -> QuantizedSpec:
    spec = model.specs[name]
    assert isinstance(spec, QuantizedSpec)
    return spec


def _obstacle(spec: object) -> str | None:
    if not isinstance(spec, QuantizedSpec):
        return f"it is stored as {getattr(spec, 'representation', spec)}, and GPTQ holds integer codes"
    if spec.kind != "linear":
        return "it is a token table, and GPTQ holds linears"
    if spec.bits not in GPTQ_BITS:
        return f"it has {spec.bits} bits, and GPTQ holds {', '.join(map(str, GPTQ_BITS))}"
    period = 32 if spec.bits == 3 else 32 // spec.bits
    for what, n in (("in_features", spec.in_features), ("out_features", spec.out_features)):
        if n % period:
            return f"{what}={n} is not divisible by {period}, which {spec.bits} bits need to fill whole words"
    return None


def _version() -> str:
    from compress import __version__

    return __version__
