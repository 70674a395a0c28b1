"""What `config.json` says about compressed modules: written for a result, read from any checkpoint.

Two forms: compressed-tensors where it can hold the modules (`standard.py`), else our own:

    "quantization_config": {"quant_method": "compress", "format_version": 1,
                            "modules": [{<fields of a spec>, "names": ["model.layers.[0-31].mlp.up_proj", …]}, …],
                            "structure": {<what else differs from the model that transformers builds>}}
    "transformers_weights": <a sentence for those who lack this package>

Nothing that stands there is believed: it is checked, and held to the tensors on disk, before anything is allocated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from compress.checkpoint.foreign import FOREIGN, Translated, quantization_of, translated
from compress.checkpoint.names import compact, expand
from compress.checkpoint.standard import STANDARD, standard_config, standard_holds, standard_modules
from compress.errors import CheckpointError, naming
from compress.models.architecture import Architecture
from compress.models.structure import Structure
from compress.modules.spec import ModuleSpec, spec_from_dict

if TYPE_CHECKING:
    from compress.checkpoint.headers import TensorInfo

__all__ = ["GUARD", "OWN", "STANDARD", "check_tensors", "guard", "modules_of", "quantization_config", "standard_holds"]

OWN = "compress"
FORMAT_VERSION = 1
OWN_INDEX = "compress.safetensors.index.json"  # always written, for one shard too
GUARD = (
    "this checkpoint is compressed in a format of its own: pip install compress-llm, and "
    "`import compress` before loading it with transformers"
)
FLOATS = ("BF16", "F16", "F32", "F64")


def guard() -> str:
    """The value of `transformers_weights` in config.json: transformers prints it, and stops, where it is no file name.

    Without it, transformers that does not know us would load our folder as a model with random weights.
    """
    return GUARD


def quantization_config(format_: str, specs: Mapping[str, ModuleSpec], architecture: Architecture) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint.

    Args:
        format_: "compressed-tensors" (which `standard_holds`) or "compress".
        specs: its replaced modules by name on disk.
    """
    return standard_config(specs, architecture) if format_ == STANDARD else own_config(specs, architecture.structure)


def own_config(specs: Mapping[str, ModuleSpec], structure: Structure) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint in our own format."""
    names: dict[ModuleSpec, list[str]] = {}
    for name, spec in specs.items():
        names.setdefault(spec, []).append(name)
    described = sorted((compact(alike), spec) for spec, alike in names.items())
    modules = [{**spec.to_dict(), "names": alike} for alike, spec in described]
    written: dict[str, Any] = {"quant_method": OWN, "format_version": FORMAT_VERSION, "modules": modules}
    return written if structure.plain else {**written, "structure": structure.to_dict()}


def modules_of(config: Mapping[str, Any], infos: Mapping[str, TensorInfo] | None = None) -> dict[str, ModuleSpec]:
    """The compressed modules of a checkpoint, by name on disk; none if it is not compressed.

    Args:
        config: the contents of config.json.
        infos: the tensors on disk. With them the modules are checked; formats other than ours cannot be read without them.

    Raises: CheckpointError naming what is impossible, unknown to us, or not what is on disk.
    """
    quantization = quantization_of(config)
    if quantization is None:
        return {}
    if not isinstance(quantization, dict):
        raise CheckpointError(f"config.json: quantization_config is {quantization!r:.200}, not an object")
    method = quantization.get("quant_method")
    specs: dict[str, ModuleSpec]
    if method == OWN:
        specs = _own_modules(quantization)
    elif method == STANDARD:
        if infos is None:
            raise CheckpointError(
                "a compressed-tensors checkpoint cannot be described without the headers of its files"
            )
        specs = dict(standard_modules({**config, "quantization_config": quantization}, infos))
    elif method in FOREIGN:
        if infos is None:
            raise CheckpointError(f"a {method} checkpoint cannot be described without the headers of its files")
        listed = translated(config, infos)
        assert isinstance(listed, Translated)
        return {name: layout.spec for name, layout in listed.layouts.items()}  # held to the headers already
    else:
        raise CheckpointError(
            f"config.json: the model is already quantized with {method!r}, which cannot be read here; "
            f"use the original model, or one in the formats {STANDARD} (pack-quantized), {', '.join(FOREIGN)} or {OWN}"
        )
    if infos is not None:
        specs = {name: _stored_levels(name, spec, infos) for name, spec in specs.items()}
        check_tensors(specs, infos)
    return specs


def _stored_levels(name: str, spec: ModuleSpec, infos: Mapping[str, TensorInfo]) -> ModuleSpec:
    """The module of the first levels that are there; of a stack, a part may be loaded, or may be all that there is.

    Raises: CheckpointError naming a tensor of a later level that is stored although one before it is not.
    """
    if spec.n_levels == 1:
        return spec
    whole = [all(f"{name}.{key}" in infos for key in spec.level(i, "F32")) for i in range(spec.n_levels)]
    n_levels = whole.index(False) if False in whole else len(whole)
    for level in range(max(n_levels, 1), spec.n_levels):
        for suffix in spec.level(level, "F32"):
            if f"{name}.{suffix}" in infos:
                raise CheckpointError(
                    f"{name}.{suffix}: is stored, and not all of what comes before it; the checkpoint is damaged: fetch it again"
                )
    return spec.first(max(n_levels, 1))


def check_tensors(specs: Mapping[str, ModuleSpec], infos: Mapping[str, TensorInfo]) -> None:
    """Hold described modules to the headers of the files. Raises: CheckpointError naming the tensor that differs."""
    for name, spec in specs.items():
        for suffix, (dtype, shape) in spec.tensors("F32").items():
            info = infos.get(f"{name}.{suffix}")
            if info is None:
                raise CheckpointError(f"{name}.{suffix}: config.json describes this tensor, and no file holds it")
            right_dtype = info.dtype in FLOATS if dtype in FLOATS else info.dtype == dtype
            if info.shape != shape or not right_dtype:
                raise CheckpointError(
                    f"{name}.{suffix}: {info.dtype} {list(info.shape)} is stored, but config.json describes "
                    f"{'a float' if dtype in FLOATS else dtype} {list(shape)}; the checkpoint is damaged"
                )


def _own_modules(quantization: Mapping[str, Any]) -> dict[str, ModuleSpec]:
    where = "config.json: quantization_config"
    version = quantization.get("format_version")
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{where}: format_version={version!r} is not a version of this format")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{where}: format_version {version} is newer than this compress-llm knows ({FORMAT_VERSION}); "
            f"upgrade with: pip install -U compress-llm"
        )
    entries = quantization.get("modules")
    if not isinstance(entries, list):
        raise CheckpointError(f"{where}: modules={entries!r:.200} is not a list")
    specs: dict[str, ModuleSpec] = {}
    for number, entry in enumerate(entries):
        here = f"{where}: modules[{number}]"
        if not isinstance(entry, dict) or not isinstance(entry.get("names"), list):
            raise CheckpointError(f"{here}: an object with a list of names is expected, found {entry!r:.200}")
        spec = spec_from_dict({key: value for key, value in entry.items() if key != "names"}, here)
        for name in expand(entry["names"]):
            if name in specs:
                raise CheckpointError(f"{here}: {name} is described twice")
            specs[name] = spec
    return {name: _borrowing(name, spec, specs) for name, spec in specs.items()}


def _borrowing(name: str, spec: ModuleSpec, specs: Mapping[str, ModuleSpec]) -> ModuleSpec:
    """`spec`, held to the module whose parts it uses. Raises: CheckpointError if that cannot lend them."""
    lender = spec.lender()
    if lender is None:
        return spec
    if lender not in specs:
        raise CheckpointError(f"config.json: {name} uses parts of {lender!r:.200}, which is not described")
    with naming(f"config.json: {name}"):
        if spec.borrowing(specs[lender]) != spec:
            raise CheckpointError(
                f"is described with other parts than {lender} stores for it; the checkpoint is damaged"
            )
    return spec
