"""How many bytes a checkpoint takes, layer by layer: in its files, and in memory once it is loaded. From the headers alone.

In memory, compressed layers stay packed, and everything else is in the dtype that config.json names; what a tied head
shares with the token table counts once. Buffers that are computed (rotary tables) do not count.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from compress.checkpoint.description import modules_of
from compress.checkpoint.headers import TensorInfo
from compress.checkpoint.names import owner
from compress.checkpoint.result import REPORT
from compress.checkpoint.source import Source
from compress.models.architecture import Architecture
from compress.models.families import architecture_of, is_ignored
from compress.modules.spec import DTYPE_BYTES, ModuleSpec
from compress.report import PAGE

FLOATS = ("F64", "F32", "F16", "BF16")
NAMED = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
OTHER = "everything else"  # norms, biases, routers, positions


@dataclass(frozen=True)
class Layer:
    """A matrix: a linear or the token table. `nbytes` as stored, the bias not counted."""

    kind: str
    block: int | None
    weights: int
    nbytes: int


class Sizes:
    """The bytes of one checkpoint, whose headers `source` has read."""

    def __init__(self, source: Source):
        self.source = source
        self.specs = modules_of(source.config, source.infos)
        self.architecture = architecture_of(source.config, source.infos.keys())
        self.layers = _layers(source.infos, self.specs, self.architecture)
        self.tensors = sum(info.nbytes for info in source.infos.values())

    def to_dict(self) -> dict[str, int | None]:
        folder = self.source.folder
        files = [f for f in folder.iterdir() if f.is_file() and f.name not in (REPORT, PAGE)] if folder else []
        on_disk = sum(f.stat().st_size for f in files) if folder else None
        return {"bytes_on_disk": on_disk, "bytes_tensors": self.tensors, "bytes_in_memory": self.in_memory()}

    def in_memory(self) -> int:
        """Bytes of the parameters of the loaded model, as `compress.load` makes them."""
        infos, dtype = self.source.infos, _loaded_dtype(self.source)
        head = self.architecture.head.linears[0] if self.architecture.tied else None
        total = sum(spec.nbytes(dtype) for spec in self.specs.values())
        for name, info in infos.items():
            module = owner(name, self.specs)
            if is_ignored(name) or owner(name, [head or ""]) or (module and name != f"{module}.bias"):
                continue
            total += prod(info.shape) * DTYPE_BYTES[dtype if info.dtype in FLOATS else info.dtype]
        return total


def _loaded_dtype(source: Source) -> str:
    """The dtype that floats are loaded in: what config.json says, else that of the first tensor of floats."""
    named = NAMED.get(str(source.config.get("dtype") or source.config.get("torch_dtype")))
    return named or next((info.dtype for info in source.infos.values() if info.dtype in FLOATS), "F32")


def _layers(infos: dict[str, TensorInfo], specs: dict[str, ModuleSpec], architecture: Architecture) -> dict[str, Layer]:
    block_of = {site.name: i for i in range(architecture.n_blocks) for site in architecture.sites(i)}
    stored: dict[str, list[TensorInfo]] = {}
    for name, info in infos.items():
        stored.setdefault(owner(name, specs) or name.rpartition(".")[0], []).append(info)
    layers = {}
    for site in architecture.all_sites():
        for name in site.linears:
            mine = [info for info in stored.get(name, ()) if not info.name.endswith(".bias")]
            if not mine or (site.kind == "head" and architecture.tied):
                continue
            spec = specs.get(name)
            weights = spec.in_features * spec.out_features if spec else sum(prod(info.shape) for info in mine)
            kind = name.rpartition(".")[2] + (" of experts" if site.expert is not None else "")
            layers[name] = Layer(kind, block_of.get(site.name), weights, sum(info.nbytes for info in mine))
    return layers


def sizes(model: Source, reference: Source | None = None) -> dict[str, Any]:
    """Bytes of a checkpoint, beside those of the one that it was made from, for JSON.

    Returns: {"model", "reference": bytes of files, tensors, loaded parameters; "kinds": bytes of all layers of a kind;
        "layers": of each}, kinds and layers in the order in which data pass through them.
    """
    ours, theirs = Sizes(model), None if reference is None else Sizes(reference)
    layers = []
    for name, layer in ours.layers.items():
        before = theirs.layers[name].nbytes if theirs and name in theirs.layers else None
        layers.append({
            "name": name, "kind": layer.kind, "block": layer.block, "weights": layer.weights, "bytes": layer.nbytes,
            "bytes_reference": before, "bits_per_weight": 8 * layer.nbytes / max(layer.weights, 1),
        })  # fmt: skip
    return {
        "model": ours.to_dict(),
        "reference": None if theirs is None else theirs.to_dict(),
        "kinds": _kinds(ours, theirs),
        "layers": layers,
    }


def _kinds(ours: Sizes, theirs: Sizes | None) -> list[dict[str, Any]]:
    kinds: dict[str, list[int]] = {}
    for layer in ours.layers.values():
        counts = kinds.setdefault(layer.kind, [0, 0, 0])
        counts[0] += 1
        counts[1] += layer.weights
        counts[2] += layer.nbytes
    before: dict[str, int] = {}
    for layer in theirs.layers.values() if theirs else ():
        before[layer.kind] = before.get(layer.kind, 0) + layer.nbytes
    rows = [
        {"kind": kind, "layers": n, "weights": weights, "bytes": nbytes, "bytes_reference": before.get(kind)}
        for kind, (n, weights, nbytes) in kinds.items()
    ]
    rest = ours.tensors - sum(layer.nbytes for layer in ours.layers.values())
    rest_before = theirs.tensors - sum(before.values()) if theirs else None
    return [*rows, {"kind": OTHER, "layers": None, "weights": None, "bytes": rest, "bytes_reference": rest_before}]
