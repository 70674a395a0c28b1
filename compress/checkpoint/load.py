"""`compress.load`: any checkpoint, original or compressed, as an ordinary transformers model.

Compressed ones run on our packed modules, whether they are in our own format, compressed-tensors, GPTQ or AWQ. Where
`AutoModelForCausalLM.from_pretrained` would go on with random weights and a warning, this stops.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint.budget import Budget, parse_budget
from compress.checkpoint.description import GUARD, OWN, STANDARD, modules_of
from compress.checkpoint.foreign import FOREIGN
from compress.checkpoint.headers import TensorInfo, read_base_headers, read_json
from compress.checkpoint.seal import check_all
from compress.checkpoint.source import SHIPPED, find_source
from compress.checkpoint.stack import no_stack
from compress.errors import CheckpointError
from compress.kernels.choice import Activations, Choice, Kernels, choosing
from compress.models.families import is_ignored

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def load(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | int | None = None,
    device_map: str | dict[str, Any] | None = None,
    revision: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    memory_budget: Budget | str | int | None = None,
    kernels: Kernels = "auto",
    activations: Activations = "int8",
) -> PreTrainedModel:
    """Load a causal language model to run, compressed or not.

    Args:
        path: a folder, or the id of a model on the Hub.
        dtype: of weights that are not packed, of scales and of the arithmetic; "auto" is what the checkpoint says.
        device: where the whole model goes; the CPU by default.
        device_map: instead of `device`: "auto", or modules to devices, as in transformers.
        revision: a branch, tag or commit on the Hub.
        attn_implementation: "sdpa", "eager", …, as in transformers.
        memory_budget: of a stack (bitstack), load as much as fits: "4.2GiB" of all tensors, or "2.5bits" per weight of its
            stacked layers. The model has `stack` then, which knows what is loaded. By default, all.
        kernels: "auto": quantized linears in the memory of the CPU are packed for the native kernels, where those were built
            (`compress doctor`) and the environment does not say COMPRESS_PACK=off; "reference": torch, slower and exact.
        activations: on native kernels, inputs are rounded to "int8", which is quickest, or kept as "float". docs/kernels.md
            has the error.

    Returns: a model in eval mode. `save_pretrained` writes the format that it was loaded from; of GPTQ and AWQ, which are
        brought into our order of codes, compressed-tensors where that can hold them, else our own.
    Raises: CheckpointError if the checkpoint is missing, damaged, incomplete or of a kind that cannot be run.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from compress.checkpoint.registration import install

    install()
    choice = Choice(kernels, activations)
    if device is not None and device_map is not None:
        raise CheckpointError(f"device={device} and device_map={device_map!r}: choose one")
    budget = None if memory_budget is None else parse_budget(memory_budget)
    folder = _folder(path, revision, budget)
    infos = read_base_headers(folder)
    check_all(folder, infos)
    raw = read_json(folder / "config.json")
    specs = modules_of(raw, infos)
    if raw.get("transformers_weights") == GUARD and _method(raw) != OWN:
        raise CheckpointError(
            f"{folder / 'config.json'}: it does not describe the modules that are stored; fetch it again"
        )
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if device is not None or device_map is not None:
        options["device_map"] = device_map if device is None else {"": device}

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if specs and _method(raw) == STANDARD:
        config.quantization_config = {"quant_method": OWN, "standard": _quantization(raw)}
    if specs and _method(raw) in FOREIGN:
        config.quantization_config = {"quant_method": OWN, "foreign": _quantization(raw)}
    if budget is not None:
        if _method(raw) != OWN:
            raise no_stack(folder)
        config.quantization_config = {**_quantization(raw), "memory_budget": budget.text}
    with choosing(choice):
        model, info = AutoModelForCausalLM.from_pretrained(folder, config=config, output_loading_info=True, **options)
    _check_loaded(folder, info, infos)
    return model


def _folder(path: str | Path, revision: str | None, budget: Budget | None = None) -> Path:
    if path == SHIPPED:
        from compress.shipped import model_path

        return model_path()
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    name = str(path)
    if folder.exists() or name.startswith(("/", "./", "../", "~")) or name.count("/") != 1:
        raise CheckpointError(f"{path}: no such model folder (and no Hub id, which has the form owner/name)")
    return find_source(name, revision).fetch(budget=budget)


def _quantization(raw: dict[str, Any]) -> dict[str, Any]:
    return raw.get("quantization_config") or raw.get("compression_config") or {}


def _method(raw: dict[str, Any]) -> object:
    return _quantization(raw).get("quant_method")


def _check_loaded(folder: Path, info: dict[str, Any], infos: dict[str, TensorInfo]) -> None:
    """Nothing was left as it was initialised, and nothing of the checkpoint was left aside."""
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} tensors of the model are in no file, {missing[0]} for one; fetch the model again"
        )
    unexpected = sorted(name for name in info["unexpected_keys"] if not is_ignored(name))
    if unexpected:
        raise CheckpointError(
            f"{folder}: {len(unexpected)} tensors have no place in the model that config.json describes, "
            f"{unexpected[0]} for one; config.json and the weights are not of one model"
        )
