"""An export read back from the disk, before it is reported: it must hold what the source holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.checkpoint.description import modules_of
from compress.checkpoint.foreign import Translated, translated
from compress.checkpoint.headers import TensorInfo, read_headers
from compress.checkpoint.reader import TORCH_DTYPES, CheckpointReader
from compress.checkpoint.seal import Checksum
from compress.checkpoint.stream import load_module
from compress.checkpoint.translate import TranslatingReader
from compress.errors import CheckpointError
from compress.export.formats import Format, Model
from compress.modules.quantized import QuantizedModule
from compress.modules.spec import ModuleSpec
from compress.pipeline.progress import Progress


@dataclass
class ReadBack:
    """What was compared. `weight_change`: the largest difference of a weight, as a fraction of its layer's largest."""

    layers: int = 0
    tensors: int = 0
    weight_change: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return {"layers": self.layers, "tensors": self.tensors, "largest_weight_change": self.weight_change}


def read_back(
    model: Model, format_: Format, folder: Path, config: Mapping[str, Any], sums: Mapping[str, str], progress: Progress
) -> ReadBack:
    """Read everything that was written and compare: bytes of every tensor; codes, scales and weights of every layer.

    Raises: CheckpointError naming the tensor that differs.
    """
    stored = read_headers(folder)
    if stored.keys() != sums.keys():
        raise CheckpointError(f"{folder}: holds other tensors than were written; {_remedy()}")
    listed = translated(config, stored)
    specs = modules_of(config, listed)
    found = ReadBack()
    with _reader(folder, listed) as reader:
        for info in stored.values():
            checksum = Checksum(info.name, info.dtype, info.shape)
            for piece in reader.pieces(info):
                checksum.add(piece)
            if str(checksum) != sums[info.name]:
                raise CheckpointError(
                    f"{info.file}: tensor {info.name} was read back other than it was written; {_remedy()}"
                )
            found.tensors += 1
        progress.begin("read back", len(model.specs), "layer")
        for name in model.specs:
            new_name = model.full_name(name) if format_.full_names else name
            change = _compare(model, format_, name, new_name, specs.get(new_name), reader)
            found.weight_change = max(found.weight_change, change)
            found.layers += 1
            progress.advance(1, name)
        progress.end()
    surplus = specs.keys() - {model.full_name(name) if format_.full_names else name for name in model.specs}
    assert not surplus, surplus
    return found


def _reader(folder: Path, infos: dict[str, TensorInfo]) -> CheckpointReader:
    return (
        TranslatingReader(folder, infos, sealed=False)
        if isinstance(infos, Translated)
        else CheckpointReader(folder, infos)
    )


def _compare(
    model: Model, format_: Format, name: str, new_name: str, spec: ModuleSpec | None, reader: CheckpointReader
) -> float:
    """Hold one layer to the source. Returns: the largest change of a weight, relative to the layer's largest weight."""
    cast = format_.scale_dtype(model, name)
    if spec is None:
        source = model.module(name, model.dtype)
        weight = reader.read(f"{new_name}.weight")
        expected = source.dense(TORCH_DTYPES[model.dtype])
        if not torch.equal(weight.T if model.is_transposed(name) else weight, expected):
            raise CheckpointError(f"{new_name}.weight: {_differs()}")
        exact = model.module(name)
        return _change(expected, exact.dense(torch.float32)) if model.float_dtype(name) != model.dtype else 0.0
    source, dtype = model.module(name), TORCH_DTYPES[model.float_dtype(name)]
    written = load_module(new_name, spec, reader, dtype)
    assert isinstance(source, QuantizedModule), name
    assert isinstance(written, QuantizedModule), name
    _check_codes(new_name, source, written)
    scale = source.weight_scale if cast is None else source.weight_scale.to(TORCH_DTYPES[cast]).to(dtype)
    if not torch.equal(written.weight_scale, scale):
        raise CheckpointError(f"{new_name}: scales: {_differs()}")
    _check_bias(model, name, new_name, reader)
    left, right = written.dense(), source.dense()
    if torch.equal(scale, source.weight_scale):
        if not torch.equal(left, right):
            raise CheckpointError(f"{new_name}: weights: {_differs()}")
        return 0.0
    return _change(left, right)


def _check_codes(name: str, source: QuantizedModule, written: QuantizedModule) -> None:
    if not torch.equal(written.codes(), source.codes()):
        raise CheckpointError(f"{name}: codes: {_differs()}")
    if not torch.equal(_zero_points(written), _zero_points(source)):
        raise CheckpointError(f"{name}: zero points: {_differs()}")


def _check_bias(model: Model, name: str, new_name: str, reader: CheckpointReader) -> None:
    if f"{name}.bias" in model.reader and not torch.equal(
        reader.read(f"{new_name}.bias"), model.reader.read(f"{name}.bias")
    ):
        raise CheckpointError(f"{new_name}.bias: {_differs()}")


def _zero_points(module: QuantizedModule) -> Tensor:
    found = module.zero_points()
    return (
        torch.full_like(module.weight_scale, 2 ** (module.spec.bits - 1), dtype=torch.uint8) if found is None else found
    )


def _change(left: Tensor, right: Tensor) -> float:
    largest = right.abs().max().double().item()
    return (left.double() - right.double()).abs().max().item() / largest if largest else 0.0


def _differs() -> str:
    return f"what was read back is not what the source holds; {_remedy()}"


def _remedy() -> str:
    return "the disk or the memory is faulty: export again to another --out"
