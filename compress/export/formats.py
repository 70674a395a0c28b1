"""What an export format is, and the list of them. A new format is a file, and a line in `FORMATS`."""

from __future__ import annotations

import difflib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from compress.checkpoint.reader import TORCH_DTYPES, CheckpointReader
from compress.checkpoint.stream import load_module
from compress.errors import RecipeError
from compress.models.architecture import Architecture
from compress.models.families import architecture_of, disk_name, module_name
from compress.modules.base import CompressedModule
from compress.modules.spec import ModuleSpec

Tensors = dict[str, tuple[str, tuple[int, ...]]]  # suffix -> (safetensors dtype, shape)


@dataclass(frozen=True)
class Model:
    """A compressed checkpoint that is to be exported. `name`: as the user wrote it."""

    name: str
    folder: Path
    config: Mapping[str, Any]
    architecture: Architecture
    specs: Mapping[str, ModuleSpec]
    reader: CheckpointReader
    _fitting: dict[tuple[str, str], bool] = field(default_factory=dict)

    @cached_property
    def dtype(self) -> str:
        """The dtype that the model is loaded in, as safetensors calls it: by config.json, else that of the token table."""
        names = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
        said = str(self.config.get("dtype") or self.config.get("torch_dtype")).removeprefix("torch.")
        table = f"{self.architecture.embeddings[0]}.weight"
        return names.get(said) or (self.reader.info(table).dtype if table in self.reader else "F32")

    def float_dtype(self, name: str) -> str:
        """The dtype in which a module's floats are stored; that of the model if it has none."""
        floats = [suffix for suffix, (dtype, _) in self.specs[name].tensors("FLOAT").items() if dtype == "FLOAT"]
        return self.reader.info(f"{name}.{floats[0]}").dtype if floats else self.dtype

    def fits(self, name: str, dtype: str) -> bool:
        """Whether a module's scales are the same in `dtype`; they are read for it."""
        stored = self.float_dtype(name)
        if stored != dtype and (name, dtype) not in self._fitting:
            scale = self.reader.read(f"{name}.weight_scale")
            self._fitting[name, dtype] = torch.equal(scale.to(TORCH_DTYPES[dtype]).to(scale.dtype), scale)
        return stored == dtype or self._fitting[name, dtype]

    def module(self, name: str, dtype: str | None = None) -> CompressedModule:
        """A module with its tensors; its floats as they are stored, or in `dtype`."""
        return load_module(name, self.specs[name], self.reader, TORCH_DTYPES[dtype or self.float_dtype(name)])

    def is_transposed(self, name: str) -> bool:
        """Whether the weight is a Conv1D's, stored [in, out]."""
        outside = (*self.architecture.embeddings, *self.architecture.head.linears)
        return self.architecture.transposed and name not in outside

    @cached_property
    def _saved(self) -> Architecture:
        return architecture_of(self.config)

    def full_name(self, name: str) -> str:
        """A name on disk with the base model's prefix, which the original GPT-2 leaves out."""
        if self._saved.embeddings == self.architecture.embeddings:
            return name
        return disk_name(self._saved, module_name(self.architecture, name))


class Format(ABC):
    """How modules are stored, and what config.json says of them."""

    name: ClassVar[str]
    full_names: ClassVar[bool] = False  # its readers do without renaming: names must have the base model's prefix

    @abstractmethod
    def obstacles(self, model: Model) -> dict[str, str]:
        """The layers that it cannot hold, with the reason; torch is not needed for it."""

    @abstractmethod
    def tensors(self, model: Model, name: str) -> Tensors:
        """What is stored of a module, without the bias."""

    @abstractmethod
    def convert(self, model: Model, name: str) -> dict[str, Tensor]:
        """The tensors themselves."""

    @abstractmethod
    def quantization_config(self, model: Model) -> dict[str, Any] | None:
        """What config.json says under `quantization_config`; None: nothing."""

    def scale_dtype(self, model: Model, name: str) -> str | None:
        """The dtype that scales are converted to; None if they stay as they are."""
        return None

    def files(self, model: Model) -> dict[str, Any]:
        """JSON files beside config.json."""
        return {}


FORMATS = {  # name -> where it lives
    "compressed-tensors": "compress.export.compressed_tensors:CompressedTensors",
    "gptq": "compress.export.gptq:GPTQ",
    "awq": "compress.export.awq:AWQ",
    "dense": "compress.export.dense:Dense",
}


def find_format(name: str) -> Format:
    """Raises: RecipeError naming the nearest format if there is none of that name."""
    if name not in FORMATS:
        near = difflib.get_close_matches(name, FORMATS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(FORMATS)}"
        raise RecipeError(f"format {name!r} is not one that can be exported to; {hint}")
    module, _, cls = FORMATS[name].partition(":")
    return getattr(importlib.import_module(module), cls)()


def check_held(format_: Format, model: Model) -> None:
    """Raises: RecipeError naming the first layer that the format cannot hold, the reason, and the formats that can."""
    obstacles = format_.obstacles(model)
    if not obstacles:
        return
    name, reason = next(iter(obstacles.items()))
    others = [n for n in FORMATS if n != format_.name and not find_format(n).obstacles(model)]
    more = f" (and {len(obstacles) - 1} more layers)" if len(obstacles) > 1 else ""
    remedy = (
        f"formats that can hold this model: {', '.join(others)}" if others else "no other format can hold it either"
    )
    raise RecipeError(f"{name}: {format_.name} cannot hold it{more}: {reason}; {remedy}")


def half_precision(scale: Tensor) -> Tensor:
    """float16, in which GPTQ and AWQ files hold scales."""
    return scale.to(torch.float16)
