"""Checkpoints in the GPTQ and AWQ formats, ours or others': which modules are quantized, on which grid, in which tensors.

Read from `config.json` and headers, without torch. A module of theirs is a `QuantizedLinear` of ours whose tensors lie in
another order on disk; `translated` lists the tensors as ours, and `translate.py` brings their bytes into our order.

GPTQ   X.qweight  int32 [in * bits / 32, out]    codes, a dense bit stream along in, low bits first
       X.qzeros   int32 [groups, out * bits / 32]  zero points, a stream along out; less one in `gptq`, as they are in `gptq_v2`
       X.scales   float [groups, out]
       X.g_idx    int32 [in]                     the group of each column; may be missing
AWQ    X.qweight  int32 [in, out / 8]            codes of 4 bits along out, in the order 0 2 4 6 1 3 5 7 within a word
       X.qzeros   int32 [groups, out / 8]        zero points in the same order, as they are
       X.scales   float [groups, out]
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from compress.errors import CheckpointError, CompressError
from compress.models.families import architecture_of, module_name
from compress.modules.quantized_spec import QuantizedSpec, n_words

if TYPE_CHECKING:
    from compress.checkpoint.headers import TensorInfo

GPTQ: Literal["gptq"] = "gptq"
AWQ: Literal["awq"] = "awq"
FOREIGN = (GPTQ, AWQ)
GPTQ_V1, GPTQ_V2 = "gptq", "gptq_v2"  # of `checkpoint_format`: zero points less one, or as they are
GPTQ_BITS = (2, 3, 4, 8)
AWQ_BITS = 4
TRANSLATED = -1  # the offset of a tensor that stands in no file as it is listed
FLOATS = ("F16", "BF16", "F32")
WHERE = "config.json: quantization_config"


@dataclass(frozen=True)
class Layout:
    """How the tensors of one module lie on disk, and the module they stand for."""

    method: Literal["gptq", "awq"]
    spec: QuantizedSpec
    stored: tuple[str, ...]  # suffixes of its tensors on disk, without the bias
    less_one: bool = False  # zero points are stored less one
    whole_words: bool = False  # ... and were taken less one as 32-bit words, so that a zero borrows from its neighbour


class Translated(dict[str, "TensorInfo"]):
    """The tensors of a GPTQ or AWQ checkpoint, listed as ours. `stored`: as they are on disk."""

    def __init__(self, infos: Mapping[str, TensorInfo], layouts: Mapping[str, Layout]):
        self.stored = dict(infos)
        self.layouts = dict(layouts)
        super().__init__({n: i for n, i in infos.items() if n.rpartition(".")[0] not in layouts or n.endswith(".bias")})
        for name, layout in self.layouts.items():
            weight = infos[f"{name}.qweight"]
            for suffix, (dtype, shape) in layout.spec.tensors(infos[f"{name}.scales"].dtype).items():
                nbytes = {"I32": 4, "I64": 8, "F32": 4}.get(dtype, 2)
                for length in shape:
                    nbytes *= length
                tensor = f"{name}.{suffix}"
                self[tensor] = replace(
                    weight, name=tensor, dtype=dtype, shape=shape, offset=TRANSLATED, nbytes=nbytes
                )  # fmt: skip


def quantization_of(config: Mapping[str, Any]) -> Any:
    """The `quantization_config` of a config.json, under whichever name; None if there is none."""
    return config.get("quantization_config") or config.get("compression_config")


def translated(config: Mapping[str, Any], infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """`infos` as they are, or listed as ours if the config says GPTQ or AWQ.

    Raises: CheckpointError naming what we cannot run, or where config and tensors disagree.
    """
    quantization = quantization_of(config)
    if isinstance(infos, Translated) or not isinstance(quantization, dict):
        return infos  # type: ignore[return-value]
    if quantization.get("quant_method") not in FOREIGN:
        return infos  # type: ignore[return-value]
    return Translated(infos, foreign_layouts({**config, "quantization_config": quantization}, infos))


def foreign_layouts(config: Mapping[str, Any], infos: Mapping[str, TensorInfo]) -> dict[str, Layout]:
    """The quantized modules of a GPTQ or AWQ checkpoint by name on disk."""
    quantization = config["quantization_config"]
    try:
        architecture = architecture_of(config, infos.keys())
    except CompressError:
        architecture = None  # a family without a table: names on disk are taken for those of modules
    found = {}
    for tensor in infos:
        name, _, suffix = tensor.rpartition(".")
        if suffix == "qweight":
            names = (name,) if architecture is None else (name, module_name(architecture, name))
            read = _gptq_layout if quantization["quant_method"] == GPTQ else _awq_layout
            found[name] = read(name, names, quantization, infos)
    if not found:
        raise CheckpointError(
            f"{WHERE} describes {quantization['quant_method']} modules, but no tensor *.qweight is stored; fetch it again"
        )
    for tensor in infos:
        name, _, suffix = tensor.rpartition(".")
        if suffix in ("qzeros", "scales", "g_idx") and name not in found:
            raise CheckpointError(f"{name}.qweight: is in no file, though {tensor} is; fetch the missing shards")
    if architecture is not None:
        known = {linear for site in architecture.all_sites() for linear in site.linears}
        tables = set(architecture.embeddings)
        for name in found:
            if name in tables or (name not in known and any(name.startswith(f"{b}.") for b in architecture.blocks)):
                raise CheckpointError(
                    f"{name}: is stored quantized, and the family {architecture.family!r} has no such linear"
                )
    return found


def _gptq_layout(
    name: str, names: tuple[str, ...], quantization: Mapping[str, Any], infos: Mapping[str, TensorInfo]
) -> Layout:
    form = quantization.get("checkpoint_format") or quantization.get("format") or GPTQ_V1
    if quantization.get("is_marlin_format"):
        form = "marlin"
    if form not in (GPTQ_V1, GPTQ_V2):
        raise CheckpointError(
            f"{WHERE}: checkpoint_format {form!r} cannot be run here; {GPTQ_V1!r} and {GPTQ_V2!r} can"
        )
    if quantization.get("pack_dtype", "int32") != "int32":
        raise CheckpointError(f"{WHERE}: pack_dtype {quantization['pack_dtype']!r} cannot be run here; 'int32' can")
    settings = {key: quantization.get(key) for key in ("bits", "group_size", "sym")}
    rule = _override(names, quantization.get("dynamic"))
    if rule is False:
        raise CheckpointError(f"{name}: is stored quantized, though a rule '-:' of {WHERE}.dynamic leaves it out")
    settings.update({key: rule[key] for key in settings.keys() & rule.keys()})
    bits, group_size = settings["bits"], settings["group_size"]
    symmetric = True if settings["sym"] is None else settings["sym"]
    if type(bits) is not int or bits not in GPTQ_BITS:
        raise CheckpointError(f"{name}: {bits!r} bits of GPTQ cannot be run here; {', '.join(map(str, GPTQ_BITS))} can")
    weight, index = _int32(name, "qweight", infos), infos.get(f"{name}.g_idx")
    out = weight.shape[1]
    in_features = weight.shape[0] * 32 // bits
    if weight.shape[0] != n_words(in_features, bits) or in_features * bits % 32:
        raise CheckpointError(
            f"{name}.qweight: {weight.shape[0]} rows hold no whole number of {bits}-bit codes; fetch it again"
        )
    spec = _spec(name, in_features, out, bits, group_size, symmetric)
    stored = ("qweight", "qzeros", "scales", *(("g_idx",) if index is not None else ()))
    _check(name, "qzeros", ("I32",), (spec.n_groups, n_words(out, bits)), infos)
    _check(name, "scales", FLOATS, (spec.n_groups, out), infos)
    if index is not None:
        _check(name, "g_idx", ("I32",), (in_features,), infos)
    less_one = form == GPTQ_V1
    return Layout(GPTQ, spec, stored, less_one, less_one and _by_gptqmodel(quantization))


def _awq_layout(
    name: str, names: tuple[str, ...], quantization: Mapping[str, Any], infos: Mapping[str, TensorInfo]
) -> Layout:
    version = str(quantization.get("version", "gemm")).lower()
    if version != "gemm":
        raise CheckpointError(f"{WHERE}: version {version!r} of AWQ cannot be run here; 'gemm' can")
    bits = quantization.get("bits", quantization.get("w_bit"))
    if bits != AWQ_BITS:
        raise CheckpointError(f"{WHERE}: {bits!r} bits of AWQ cannot be run here; {AWQ_BITS} can")
    left_out = quantization.get("modules_to_not_convert") or []
    if not isinstance(left_out, list) or any(n == x or n.endswith(f".{x}") for n in names for x in map(str, left_out)):
        raise CheckpointError(
            f"{name}: is stored quantized, though {WHERE}.modules_to_not_convert={left_out!r:.100} names it"
        )
    weight = _int32(name, "qweight", infos)
    group_size = quantization.get("group_size", quantization.get("q_group_size"))
    spec = _spec(name, weight.shape[0], weight.shape[1] * 8, AWQ_BITS, group_size, False)
    _check(name, "qzeros", ("I32",), (spec.n_groups, weight.shape[1]), infos)
    _check(name, "scales", FLOATS, (spec.n_groups, weight.shape[1] * 8), infos)
    return Layout(AWQ, spec, ("qweight", "qzeros", "scales"))


def _spec(name: str, in_features: int, out: int, bits: int, group_size: object, symmetric: object) -> QuantizedSpec:
    if group_size == in_features:
        group_size = -1
    if type(group_size) is not int or not isinstance(symmetric, bool):
        raise CheckpointError(f"{name}: {WHERE} has group_size={group_size!r}, sym={symmetric!r}; mend it there")
    spec = QuantizedSpec(in_features, out, bits, group_size, symmetric)
    try:
        spec.validate()
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}; config.json and the tensors do not fit together") from None
    return spec


def _int32(name: str, suffix: str, infos: Mapping[str, TensorInfo]) -> TensorInfo:
    info = infos[f"{name}.{suffix}"]
    if info.dtype != "I32" or len(info.shape) != 2 or 0 in info.shape:
        raise CheckpointError(
            f"{info.file}: tensor {info.name}: {info.dtype} {list(info.shape)} is stored, a matrix of I32 is expected"
        )
    return info


def _check(
    name: str, suffix: str, dtypes: tuple[str, ...], shape: tuple[int, ...], infos: Mapping[str, TensorInfo]
) -> None:
    info = infos.get(f"{name}.{suffix}")
    if info is None:
        raise CheckpointError(f"{name}.{suffix}: is in no file, though {name}.qweight is; fetch the missing shards")
    if info.dtype not in dtypes or info.shape != shape:
        raise CheckpointError(
            f"{info.file}: tensor {info.name}: {info.dtype} {list(info.shape)} is stored, but config.json describes "
            f"{' or '.join(dtypes)} {list(shape)}; the checkpoint is damaged"
        )


def _override(names: tuple[str, ...], rules: object) -> Any:
    """What the first rule of GPTQModel's `dynamic` that matches says: settings, or False (left out); {} if none does."""
    if rules is None:
        return {}
    if not isinstance(rules, dict):
        raise CheckpointError(f"{WHERE}: dynamic={rules!r:.100} is not an object")
    for pattern, settings in rules.items():
        expression = pattern[2:] if pattern[:2] in ("-:", "+:") else pattern
        try:
            matched = any(re.match(expression, name) for name in names)
        except re.error as error:
            raise CheckpointError(f"{WHERE}: dynamic: {pattern!r:.100} is no regular expression: {error}") from None
        if matched:
            if pattern.startswith("-:"):
                return False
            if not isinstance(settings, dict):
                raise CheckpointError(
                    f"{WHERE}: dynamic: {pattern!r:.100} has {settings!r:.100}, an object is expected"
                )
            return settings
    return {}


def _by_gptqmodel(quantization: Mapping[str, Any]) -> bool:
    """Whether GPTQModel wrote it: it takes one from the packed words as a whole, so that nothing is lost."""
    meta = quantization.get("meta")
    makers = meta.get("quantizer") if isinstance(meta, dict) else None
    makers = makers if isinstance(makers, list) else [makers]
    return any(isinstance(maker, str) and maker.startswith("gptqmodel:") for maker in makers)
