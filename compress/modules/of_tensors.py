"""Modules whose parameters are the tensors of their spec, as they lie on disk."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from compress.modules.base import CompressedModule
from compress.modules.spec import ModuleSpec

INTEGERS = {"I8": torch.int8, "I32": torch.int32, "I64": torch.int64}


class ModuleOfTensors(CompressedModule):
    """Holds the tensors of its spec, and a bias if there is one; `optional` are those that some specs lack."""

    optional: ClassVar[tuple[str, ...]] = ()

    def __init__(self, spec: ModuleSpec, stored: dict[str, Tensor]):
        """`stored`: the tensors of the spec, and "bias" if there is one."""
        super().__init__()
        self.spec = spec
        for name, tensor in stored.items():  # parameters, so that offloading moves them like any weight
            self.register_parameter(name, nn.Parameter(tensor.detach(), requires_grad=False))
        for name in (*self.optional, "bias"):
            if name not in stored:
                self.register_parameter(name, None)

    @classmethod
    def class_of(cls, spec: ModuleSpec) -> type[ModuleOfTensors]:
        """What stands for `spec`."""
        return cls

    @classmethod
    def from_spec(
        cls, spec: ModuleSpec, bias: bool, dtype: torch.dtype, device: torch.device | str = "meta"
    ) -> ModuleOfTensors:
        stored = {
            name: torch.empty(shape, dtype=INTEGERS.get(kind, dtype), device=device)
            for name, (kind, shape) in spec.tensors("F32").items()
        }
        if bias:
            stored["bias"] = torch.empty(spec.out_features, dtype=dtype, device=device)
        return cls.class_of(spec)(spec, stored)


class LinearOfTensors(ModuleOfTensors):
    """One that stands in for a linear."""

    def __init__(self, spec: ModuleSpec, stored: dict[str, Tensor]):
        super().__init__(spec, stored)
        self.in_features, self.out_features = spec.in_features, spec.out_features
