"""What servers do not run, or run slowly, of a model that its format holds. Each is a warning: rule, then layers.

The rules are those of vLLM and SGLang, whose fast kernels (Marlin) and loaders agree: MARLIN_SUPPORTED_GROUP_SIZES,
GPTQ_MARLIN_MIN_THREAD_N and _K, one scheme for the parts of a fused layer, the bits of CompressedTensorsWNA16. Servers change;
what is said here is what to look at when one refuses a model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from compress.checkpoint.names import compact
from compress.export.formats import Model
from compress.export.fused import fused_linears
from compress.export.gptq import dynamic_rules
from compress.models.architecture import Architecture
from compress.modules.quantized_spec import QuantizedSpec

MARLIN_GROUPS = (-1, 32, 64, 128)
MARLIN_OUT, MARLIN_IN = 64, 128  # every part that a GPU holds must be divisible by these
MARLIN_BITS = (4, 8)
N_SHOWN = 4  # patterns of names that a warning shows
GPTQMODEL = "GPTQModel 7.6"
UNREAD = {  # family -> why that release does not load GPTQ and AWQ files of it under the names on disk
    "mixtral": "it looks for mlp.experts.N.gate_proj where the files, as the original, have block_sparse_moe.experts.N.w1",
    "phi3": "it looks for gate_proj and up_proj where the files, as the original, have gate_up_proj",
    "gpt_neox": "it looks for lm_head where the files, as the original, have embed_out",
}

Scheme = tuple[int, int, bool] | None


def server_warnings(format_: str, model: Model) -> list[str]:
    """What to know before serving this model in this format; nothing for dense weights."""
    specs = {name: spec for name, spec in model.specs.items() if isinstance(spec, QuantizedSpec)}
    if format_ == "dense" or not specs:
        return []
    outside = {*model.architecture.head.linears, *model.architecture.embeddings}
    inside = {name: spec for name, spec in specs.items() if name not in outside}
    found = [
        *_mixed(model.architecture, specs),
        *_groups(inside),
        *_bits(format_, inside),
        *_shapes(model.architecture, inside),
    ]
    heads = [name for name in specs if name in outside]
    if heads and format_ in ("gptq", "awq"):
        found.append(
            f"quantized head: GPTQModel and vLLM read it by lm_head=true; transformers fills it with random numbers and goes on, "
            f"other servers may too: {named(heads)}"
        )
    elif heads:
        found.append(f"quantized head: transformers reads it; servers may take heads for dense: {named(heads)}")
    if format_ == "gptq" and dynamic_rules(model):
        found.append(
            "layers left out, or with settings of their own: GPTQModel, vLLM and SGLang read the rules (`dynamic`); transformers "
            "with optimum knows none and fails"
        )
    asymmetric = [name for name, spec in inside.items() if not spec.symmetric]
    if asymmetric and format_ == "gptq":
        found.append(
            f"asymmetric grids: Marlin runs symmetric GPTQ only; others go by checkpoint_format gptq_v2, which older servers "
            f"ignore, and then read zero points one too high; AWQ or compressed-tensors serve them better: {named(asymmetric)}"
        )
    if asymmetric and format_ == "compressed-tensors":
        found.append(
            f"asymmetric grids: stock transformers needs quantization_config=CompressedTensorsConfig(dequantize=True): "
            f"{named(asymmetric)}"
        )
    if format_ in ("gptq", "awq"):
        found += _libraries(model)
    if model.dtype not in ("F16", "BF16"):
        found.append(
            "config.json says float32: kernels for quantized weights take float16 or bfloat16; give the server --dtype"
        )
    return found


def named(names: Collection[str]) -> str:
    """Layers in few words."""
    patterns = compact(names)
    more = f" and {len(patterns) - N_SHOWN} more patterns" if len(patterns) > N_SHOWN else ""
    return f"{', '.join(patterns[:N_SHOWN])}{more}"


def _mixed(architecture: Architecture, specs: dict[str, QuantizedSpec]) -> Iterable[str]:
    mixed: list[str] = []
    for parts in fused_linears(architecture).values():
        schemes = {_scheme(specs.get(name)) for name in parts}
        if len(schemes) > 1:
            mixed += parts
    if mixed:
        yield (
            f"mixed settings inside layers that servers fuse (q, k, v; gate, up; experts): vLLM and SGLang want one scheme for "
            f"all parts: {named(mixed)}"
        )


def _scheme(spec: QuantizedSpec | None) -> Scheme:
    if spec is None:
        return None
    return spec.bits, -1 if spec.group_size == spec.in_features else spec.group_size, spec.symmetric


def _groups(specs: dict[str, QuantizedSpec]) -> Iterable[str]:
    by_size: dict[int, list[str]] = {}
    for name, spec in specs.items():
        if spec.group_size not in MARLIN_GROUPS and spec.group_size != spec.in_features:
            by_size.setdefault(spec.group_size, []).append(name)
    for size, names in sorted(by_size.items()):
        yield f"groups of {size}: Marlin kernels run 32, 64, 128 or whole rows: {named(names)}"


def _bits(format_: str, specs: dict[str, QuantizedSpec]) -> Iterable[str]:
    by_bits: dict[int, list[str]] = {}
    for name, spec in specs.items():
        if spec.bits not in MARLIN_BITS:
            by_bits.setdefault(spec.bits, []).append(name)
    slow = (
        "the slower GPTQ kernels of vLLM read it, newer servers may not"
        if format_ == "gptq"
        else "servers may not read it"
    )
    for bits, names in sorted(by_bits.items()):
        yield f"{bits} bits: the fast kernels of servers run {' and '.join(map(str, MARLIN_BITS))}; {slow}: {named(names)}"


def _libraries(model: Model) -> Iterable[str]:
    """What GPTQModel leaves out, or fills with random numbers and no word (AWQ)."""
    architecture = model.architecture
    reason = UNREAD.get(architecture.family)
    dense = [s for s in architecture.block_sites if all(site.expert is None for site in s)]
    if reason is None and architecture.experts is not None and dense:
        reason = "it takes every block for a mixture of experts, and some are not"
    if reason is not None:
        yield f"{GPTQMODEL} does not load this family ({architecture.family}): {reason}; servers and compress.load do"


def _shapes(architecture: Architecture, specs: dict[str, QuantizedSpec]) -> Iterable[str]:
    """Marlin's tiles, for layers as they are fused."""
    whole = {
        part: sum(specs[name].out_features for name in parts)
        for parts in fused_linears(architecture).values()
        if all(name in specs for name in parts) and not any(".experts." in name for name in parts)
        for part in parts
    }
    odd = [
        name
        for name, spec in specs.items()
        if whole.get(name, spec.out_features) % MARLIN_OUT or spec.in_features % MARLIN_IN
    ]
    if odd:
        yield (
            f"shapes: Marlin kernels want out divisible by {MARLIN_OUT} and in by {MARLIN_IN} on every GPU that shares a layer; "
            f"servers fall back on slower kernels or refuse: {named(odd)}"
        )
