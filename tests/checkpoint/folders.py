"""Compressed checkpoint folders written by hand, without the pipeline, and their dense twins."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from compress.checkpoint.description import GUARD, OWN, OWN_INDEX, STANDARD, quantization_config
from compress.models.architecture import Architecture, Site
from compress.models.families import architecture_of
from compress.modules.quantized import QuantizedModule
from compress.modules.quantized_spec import QuantizedSpec


@dataclass(frozen=True)
class Folder:
    path: Path
    twin: Path  # the same model with dense weights, in its original format
    specs: dict[str, QuantizedSpec]
    architecture: Architecture


def in_blocks(name: str, site: Site) -> bool:
    return site.kind not in ("head", "embedding")


def quantize_folder(
    source: Path,
    path: Path,
    bits: int | Callable[[str], int] = 4,
    group_size: int = 16,
    symmetric: bool = True,
    own: bool = False,
    dtype: torch.dtype = torch.float32,
    select: Callable[[str, Site], bool] = in_blocks,
) -> Folder:
    """Random codes and scales of about the size of the weights, in the place of the weights of `source`."""
    config = json.loads((source / "config.json").read_text())
    tensors = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in load_file(source / "model.safetensors").items()
    }
    architecture = architecture_of(config, tensors.keys())
    table, head = architecture.embeddings[0], architecture.head.linears[0]
    dense = dict(tensors)
    specs: dict[str, QuantizedSpec] = {}
    generator = torch.Generator().manual_seed(0)
    for site in architecture.all_sites():
        for name in site.linears:
            if not select(name, site):
                continue
            weight = dense[f"{name}.weight" if f"{name}.weight" in dense else f"{table}.weight"]
            flipped = architecture.transposed and in_blocks(name, site)
            out, n = weight.T.shape if flipped else weight.shape
            kind = "embedding" if site.kind == "embedding" else "linear"
            spec = QuantizedSpec(n, out, bits(name) if callable(bits) else bits, group_size, symmetric, kind)
            codes = torch.randint(0, 2**spec.bits, (out, n), generator=generator)
            scale = (torch.rand(out, spec.n_groups, generator=generator) + 0.5) / (2**spec.bits * n**0.5)
            zero = torch.randint(0, 2**spec.bits, scale.shape, generator=generator) if not symmetric else None
            module = QuantizedModule.from_codes(codes, scale.to(dtype), zero, spec)
            tensors.pop(f"{name}.weight", None)
            tensors |= {f"{name}.{suffix}": tensor.detach().clone() for suffix, tensor in module.stored().items()}
            dense[f"{name}.weight"] = module.dense().T.contiguous() if flipped else module.dense()
            specs[name] = spec
    if architecture.tied and not specs.keys().isdisjoint((table, head)):
        config["tie_word_embeddings"] = False
        if head not in specs:
            tensors[f"{head}.weight"] = load_file(source / "model.safetensors")[f"{table}.weight"].to(dtype)
            dense[f"{head}.weight"] = tensors[f"{head}.weight"]
    config["dtype"] = str(dtype).removeprefix("torch.")
    _write(path.with_name(f"{path.name}-twin"), config, dense, "model")
    config["quantization_config"] = quantization_config(OWN if own else STANDARD, specs, architecture)
    if own:
        config["transformers_weights"] = GUARD
    _write(path, config, tensors, "compress-00001-of-00001" if own else "model")
    if own:
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "compress-00001-of-00001.safetensors")}
        (path / OWN_INDEX).write_text(json.dumps(index))
    return Folder(path, path.with_name(f"{path.name}-twin"), specs, architecture)


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, whatever its shards are called."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_tensors(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name


def _write(path: Path, config: dict[str, object], tensors: dict[str, torch.Tensor], stem: str) -> None:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / f"{stem}.safetensors", metadata={"format": "pt"})
