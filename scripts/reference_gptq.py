"""The original GPTQ code as a method of our pipeline, so that both see the same inputs: see bench_faithful_model.py.

The code itself is not here: it is loaded from a checkout, whose folder stands in the environment variable REFERENCE.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from bench_faithful import Problem, Setting, load_reference, original
from torch import Tensor, nn

from compress.calibration.statistics import Request, SecondMoment, SiteStatistics
from compress.methods.base import LayerShape, MethodConfig, Outcome, SiteMethod, SiteTask
from compress.modules.base import CompressedModule
from compress.modules.spec import ModuleSpec


@dataclass(frozen=True)
class DenseSpec(ModuleSpec):
    """The rounded weight as it is, in float32: the original code returns no codes."""

    representation: ClassVar[str] = "dense_float32"
    module: ClassVar[str] = "reference_gptq:DenseLinear"

    def tensors(self, float_dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {"weight_dense": ("F32", (self.out_features, self.in_features))}

    def validate(self) -> None:
        return


class DenseLinear(CompressedModule):
    def __init__(self, spec: DenseSpec, dense: Tensor):
        super().__init__()
        self.spec = spec
        self.weight_dense = nn.Parameter(dense, requires_grad=False)

    @classmethod
    def from_spec(cls, spec: Any, bias: bool, dtype: torch.dtype, device: Any = "meta") -> DenseLinear:
        return cls(spec, torch.empty(spec.out_features, spec.in_features, dtype=torch.float32, device=device))

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.weight_dense.to(dtype or torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dense(x.dtype))


class ReferenceConfig(MethodConfig):
    bits: int = 4
    group_size: int = 128
    order: str = "none"


class ReferenceGPTQ(SiteMethod):
    name = "gptq_reference"
    summary = "the original code"
    Config = ReferenceConfig

    @classmethod
    def plan(cls, shape: LayerShape, config: ReferenceConfig) -> DenseSpec:
        return DenseSpec(shape.in_features, shape.out_features)

    @classmethod
    def statistics(cls, config: ReferenceConfig) -> tuple[Request, ...]:
        return (SecondMoment(),)

    @classmethod
    def compress(
        cls, site: SiteTask, statistics: SiteStatistics | None, generator: torch.Generator
    ) -> dict[str, Outcome]:
        assert statistics is not None
        reference = load_reference(Path(os.environ["REFERENCE"]))
        hessian = 2 / statistics.n_tokens * statistics[SecondMoment()]
        outcomes = {}
        for layer in site.layers:
            setting = Setting(
                layer.config.bits, layer.config.group_size, True, layer.config.order, layer.config.order == "act"
            )
            rounded = original(reference, Problem(layer.name, layer.weight, hessian), setting)
            spec = DenseSpec(layer.weight.shape[1], layer.weight.shape[0])
            outcomes[layer.name] = Outcome(DenseLinear(spec, rounded))
        return outcomes
