"""What `config.json` says in the compressed-tensors format (`pack-quantized`), written and read.

A group of the config holds one scheme and the modules it applies to: by name, by `re:` pattern (matched from the start
of the name) or by class ("Linear"). Names are those of modules in the stock model, not of tensors on disk.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from compress.checkpoint.names import expressions
from compress.errors import CheckpointError, CompressError
from compress.models.architecture import Architecture
from compress.models.families import architecture_of, module_name
from compress.modules.quantized_spec import MAX_BITS, MIN_BITS, QuantizedSpec, n_words
from compress.modules.spec import ModuleSpec

if TYPE_CHECKING:
    from compress.checkpoint.headers import TensorInfo

STANDARD = "compressed-tensors"
FORMAT = "pack-quantized"
VERSION = "0.20.0"  # of compressed-tensors, whose fields these are
EXPLICIT = 8  # names written out; more become patterns

Scheme = tuple[int, int, bool]  # bits, group_size, symmetric


def standard_holds(specs: Mapping[str, ModuleSpec], architecture: Architecture) -> str | None:
    """Why compressed-tensors, as stock transformers loads it, cannot hold these modules; None if it can.

    Args:
        specs: replaced modules by name on disk.
    """
    found = standard_obstacle(specs, architecture)
    return None if found is None else found[1]


def standard_obstacle(specs: Mapping[str, ModuleSpec], architecture: Architecture) -> tuple[str, str] | None:
    """As `standard_holds`, with the layer that stands in the way before the reason."""
    for name, spec in specs.items():
        if not isinstance(spec, QuantizedSpec):
            return name, f"{name} is stored as {spec.representation}, which compressed-tensors does not know"
    schemes = {name: _scheme(spec) for name, spec in specs.items() if isinstance(spec, QuantizedSpec)}
    outside = {*architecture.head.linears, *architecture.embeddings}
    inside = [name for name in schemes if name not in outside]
    if architecture.transposed and inside:
        return inside[0], f"{inside[0]} is a Conv1D, and compressed-tensors holds nn.Linear only"
    tables = [name for name in schemes if name in architecture.embeddings]
    if tables:
        return tables[0], f"{tables[0]} is a quantized table, which stock transformers cannot load in this format"
    symmetric = {scheme[2] for scheme in schemes.values()}
    if symmetric != {True} and len(set(schemes.values())) > 1:
        usual = Counter(schemes.values()).most_common(1)[0][0]
        reason = "of asymmetric modules stock transformers reads one setting for all layers, and here there are several"
        return next(name for name, scheme in schemes.items() if scheme != usual), reason
    return _experts_held(schemes, architecture)


def standard_config(specs: Mapping[str, ModuleSpec], architecture: Architecture) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint with these modules, which `standard_holds`."""
    schemes = {name: _scheme(spec) for name, spec in specs.items() if isinstance(spec, QuantizedSpec)}
    by_scheme: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        by_scheme.setdefault(scheme, []).append(name)
    linears = linear_names(architecture)
    ignored = [name for name in linears if name not in schemes]
    groups = {}
    for number, (scheme, names) in enumerate(sorted(by_scheme.items())):
        tables = [name for name in names if name in architecture.embeddings]
        if len(by_scheme) == 1:
            targets = ["Linear"] if len(tables) < len(names) else []
        else:
            targets = _selectors([name for name in names if name not in tables], linears, architecture)
        targets += [module_name(architecture, name) for name in tables]
        groups[f"group_{number}"] = _group(scheme, targets)
    return {
        "quant_method": STANDARD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "version": VERSION,
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
        "ignore": _selectors(ignored, linears, architecture),
        "config_groups": groups,
    }


def standard_modules(config: Mapping[str, Any], infos: Mapping[str, TensorInfo]) -> dict[str, QuantizedSpec]:
    """The modules of a compressed-tensors checkpoint by name on disk, whoever wrote it.

    Args:
        config: the contents of config.json.
        infos: the tensors on disk.

    Raises: CheckpointError naming what we cannot run, or where config and tensors disagree.
    """
    groups, ignore = _read_groups(config["quantization_config"])
    try:
        architecture: Architecture | None = architecture_of(config, infos.keys())
    except CompressError:
        architecture = None  # a family without a table: names on disk are taken for those of modules
    specs = {}
    for tensor in infos:
        name, _, suffix = tensor.rpartition(".")
        if suffix == "weight_g_idx":
            raise CheckpointError(f"{tensor}: columns are reordered (actorder 'group'), which cannot be run here")
        if suffix != "weight_packed":
            continue
        is_table = architecture is not None and name in architecture.embeddings
        names = (name,) if architecture is None else (module_name(architecture, name), name)
        classes = ("Embedding",) if is_table else ("Linear",)
        scheme = next(
            (s for test in (_by_name, _by_pattern, _by_class) for t, s in groups if test(t, names, classes)), None
        )
        if scheme is None or any(test(t, names, classes) for t in ignore for test in (_by_name, _by_pattern)):
            raise CheckpointError(
                f"config.json: quantization_config has no scheme for {name}, which is stored quantized"
            )
        specs[name] = _spec_on_disk(name, scheme, "embedding" if is_table else "linear", infos)
    if not specs:
        raise CheckpointError("config.json describes pack-quantized modules, but no tensor *.weight_packed is stored")
    return specs


def _scheme(spec: QuantizedSpec) -> Scheme:
    whole_row = spec.group_size == spec.in_features
    return spec.bits, -1 if whole_row else spec.group_size, spec.symmetric


def _experts_held(schemes: Mapping[str, Scheme], architecture: Architecture) -> tuple[str, str] | None:
    """Stock transformers decodes the experts as it merges them: all of them, symmetric, with one scheme."""
    experts = [name for site in architecture.all_sites() if site.expert is not None for name in site.linears]
    used = {schemes.get(name) for name in experts}
    if not experts or not schemes:
        return None
    if None in used:
        kept = next(name for name in experts if name not in schemes)
        return kept, f"{kept} is not quantized, and stock transformers loads this format only where all experts are"
    if len(used) > 1:
        odd = next(name for name in experts if schemes[name] != schemes[experts[0]])
        return odd, "the experts have several settings, and stock transformers reads one for all of them"
    if not all(scheme[2] for scheme in used if scheme is not None):
        return experts[0], "the experts are asymmetric, and stock transformers decodes symmetric ones only"
    return None


def linear_names(architecture: Architecture) -> list[str]:
    """Every linear by name on disk: those that can be replaced, routers, and what OPT has outside its blocks."""
    sites = (architecture.head,) if architecture.transposed else architecture.all_sites()  # a Conv1D is no nn.Linear
    names = [n for site in sites if site.kind != "embedding" for n in site.linears]
    if architecture.experts is not None:
        for block, of_block in zip(architecture.blocks, architecture.block_sites, strict=True):
            if any(site.expert is not None for site in of_block):
                names.append(f"{block}.{architecture.experts.router}")
    if architecture.family == "opt":
        names += [architecture.embeddings[0].replace("embed_tokens", f"project_{way}") for way in ("in", "out")]
    return names


def _selectors(names: list[str], among: list[str], architecture: Architecture) -> list[str]:
    """How a config names these modules: written out where they are few, else as patterns.

    Where a module is called otherwise on disk both names are given: stock transformers goes by the first, others by the
    second.
    """
    both = {name: {module_name(architecture, name), name} for name in among}
    wanted = {alias for name in names for alias in both[name]}
    if len(wanted) <= EXPLICIT:
        return sorted(wanted)
    return [f"re:{e}" for e in expressions(wanted, {alias for aliases in both.values() for alias in aliases})]


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    bits, group_size, symmetric = scheme
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group_size == -1 else "group",
        "group_size": None if group_size == -1 else group_size,
        "actorder": None,
        "dynamic": False,
        "block_structure": None,
        "observer": "memoryless_minmax",
        "observer_kwargs": {},
        "scale_dtype": None,
        "zp_dtype": None if symmetric else "torch.int8",
    }
    return {
        "format": FORMAT,
        "targets": targets,
        "input_activations": None,
        "output_activations": None,
        "weights": weights,
    }


def _read_groups(quantization: Any) -> tuple[list[tuple[str, Scheme]], list[str]]:
    """Targets with their schemes in the order of the config, and what is ignored."""
    where = "config.json: quantization_config"
    if not isinstance(quantization, dict) or not isinstance(quantization.get("config_groups"), dict):
        raise CheckpointError(f"{where}: config_groups is missing; the checkpoint is not complete")
    if quantization.get("kv_cache_scheme"):
        raise CheckpointError(f"{where}: the key-value cache is quantized (kv_cache_scheme), which cannot be run here")
    for key in ("sparsity_config", "transform_config"):
        content = quantization.get(key) or {}
        if not isinstance(content, dict) or content.get("format", "dense") != "dense" or content.get("config_groups"):
            raise CheckpointError(f"{where}: {key} is not empty: sparse or rotated weights cannot be run here")
    status = quantization.get("quantization_status", "compressed")
    if status != "compressed":
        raise CheckpointError(f"{where}: quantization_status is {status!r}; only 'compressed' checkpoints can be run")
    pairs = []
    for name, group in quantization["config_groups"].items():
        if not isinstance(group, dict):
            raise CheckpointError(f"{where}: {name} is {group!r}, not a scheme")
        scheme = _read_scheme(group, quantization.get("format"), f"{where}: {name}")
        pairs += [(target, scheme) for target in _strings(group.get("targets"), f"{where}: {name}: targets")]
    return pairs, _strings(quantization.get("ignore") or [], f"{where}: ignore")


def _read_scheme(group: dict[str, Any], outer_format: object, where: str) -> Scheme:
    format_ = group.get("format") or outer_format
    if format_ != FORMAT:
        raise CheckpointError(f"{where}: format {format_!r} cannot be run here; only {FORMAT!r} can")
    for key in ("input_activations", "output_activations"):
        if group.get(key) is not None:
            raise CheckpointError(f"{where}: {key} are quantized; only weights can be")
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise CheckpointError(f"{where}: weights={weights!r} describes no scheme")
    bits, strategy, symmetric = weights.get("num_bits"), weights.get("strategy"), weights.get("symmetric", True)
    if weights.get("type", "int") != "int" or type(bits) is not int or not MIN_BITS <= bits <= MAX_BITS:
        raise CheckpointError(
            f"{where}: {weights.get('type')} of {bits!r} bits cannot be run here; int of 1 to 8 bits can"
        )
    if weights.get("dynamic"):
        raise CheckpointError(f"{where}: dynamic={weights['dynamic']!r} makes no sense for stored weights")
    if weights.get("actorder") in ("group", "dynamic", True):
        raise CheckpointError(
            f"{where}: actorder={weights['actorder']!r} cannot be run here; 'static' and 'weight' can"
        )
    if not isinstance(symmetric, bool):
        raise CheckpointError(f"{where}: symmetric={symmetric!r} is neither true nor false")
    group_size = weights.get("group_size")
    if strategy is None:
        strategy = "channel" if group_size in (None, -1) else "group"
    if strategy == "channel":
        return bits, -1, symmetric
    if strategy != "group" or type(group_size) is not int or group_size < 1:
        raise CheckpointError(
            f"{where}: strategy={strategy!r}, group_size={group_size!r} cannot be run here; 'group' and 'channel' can"
        )
    return bits, group_size, symmetric


def _strings(value: object, where: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise CheckpointError(f"{where}: a list of names is expected, found {value!r:.200}")
    for item in value:
        if item.startswith("re:"):
            try:
                re.compile(item.removeprefix("re:"))
            except re.error as error:
                raise CheckpointError(f"{where}: {item!r} is no regular expression: {error}") from None
    return value


def _by_name(target: str, names: tuple[str, ...], classes: tuple[str, ...]) -> bool:
    return target in names


def _by_pattern(target: str, names: tuple[str, ...], classes: tuple[str, ...]) -> bool:
    return target.startswith("re:") and any(re.match(target.removeprefix("re:"), name) for name in names)


def _by_class(target: str, names: tuple[str, ...], classes: tuple[str, ...]) -> bool:
    return target in classes


def _spec_on_disk(name: str, scheme: Scheme, kind: Any, infos: Mapping[str, TensorInfo]) -> QuantizedSpec:
    bits, group_size, symmetric = scheme
    packed, scale = infos[f"{name}.weight_packed"], infos.get(f"{name}.weight_scale")
    if len(packed.shape) != 2 or scale is None or len(scale.shape) != 2:
        raise CheckpointError(f"{name}: weight_packed or weight_scale is missing or no matrix; fetch the model again")
    in_features = scale.shape[1] * group_size if group_size != -1 else _row_length(name, packed, bits, infos)
    spec = QuantizedSpec(in_features, packed.shape[0], bits, group_size, symmetric, kind)
    try:
        spec.validate()
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}; config.json and the tensors do not fit together") from None
    return spec


def _row_length(name: str, packed: TensorInfo, bits: int, infos: Mapping[str, TensorInfo]) -> int:
    """Columns of a matrix with one group per row: padding hides them in the packed shape, so they are stored apart."""
    info = infos.get(f"{name}.weight_shape")
    if info is not None and info.shape == (2,) and info.dtype == "I64" and info.file.is_file():
        with open(info.file, "rb") as stream:
            stream.seek(info.offset + 8)
            length = int.from_bytes(stream.read(8), "little", signed=True)
        if n_words(length, bits) != packed.shape[1]:
            raise CheckpointError(
                f"{name}: weight_shape says {length} columns, weight_packed has {packed.shape[1]} words"
            )
        return length
    return packed.shape[1] * 32 // bits  # of a file that is not here; exact wherever rows fill their words
