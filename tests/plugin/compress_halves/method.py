from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from compress.calibration.statistics import SiteStatistics
from compress.errors import RecipeError
from compress.methods.base import LayerShape, MethodConfig, Outcome, SiteMethod, SiteTask
from compress.modules.base import CompressedModule
from compress_halves.spec import Float8Spec


class Float8Linear(CompressedModule):
    def __init__(self, spec: Float8Spec, weight_float8: Tensor, weight_scale: Tensor, bias: Tensor | None):
        super().__init__()
        self.spec = spec
        self.weight_float8 = nn.Parameter(weight_float8, requires_grad=False)
        self.weight_scale = nn.Parameter(weight_scale, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @classmethod
    def from_spec(cls, spec, bias, dtype, device="meta"):  # type: ignore[no-untyped-def]
        codes = torch.empty(spec.out_features, spec.in_features, dtype=torch.float8_e4m3fn, device=device)
        scale = torch.empty(spec.out_features, 1, dtype=dtype, device=device)
        return cls(spec, codes, scale, torch.empty(spec.out_features, dtype=dtype, device=device) if bias else None)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        weight = self.weight_float8.to(self.weight_scale.dtype) * self.weight_scale
        return weight.to(dtype or weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dense(x.dtype), self.bias)


class Float8Config(MethodConfig):
    largest: float = Field(448.0, gt=0, description="what the largest weight of a row is scaled to")


class Float8(SiteMethod):
    name = "float8"
    summary = "8-bit floats with a scale per row"
    Config = Float8Config

    @classmethod
    def plan(cls, shape: LayerShape, config: Float8Config) -> Float8Spec:
        if shape.kind != "linear":
            raise RecipeError(f"{shape.name}: float8 is for linears; leave it out of layers")
        return Float8Spec(shape.in_features, shape.out_features)

    @classmethod
    def compress(
        cls, site: SiteTask, statistics: SiteStatistics | None, generator: torch.Generator
    ) -> dict[str, Outcome]:
        outcomes = {}
        for layer in site.layers:
            scale = (layer.weight.abs().amax(1, keepdim=True) / layer.config.largest).to(layer.scale_dtype)
            codes = (layer.weight / scale.float()).to(torch.float8_e4m3fn)
            out_features, in_features = layer.weight.shape
            module = Float8Linear(Float8Spec(in_features, out_features), codes, scale, layer.bias)
            error = (module.dense(torch.float32) - layer.weight).square().sum() / layer.weight.square().sum()
            outcomes[layer.name] = Outcome(module, {"relative_error": float(error)})
        return outcomes
