"""A changed weight on its way through the steps of a run. In a finished checkpoint it is the weight of an ordinary layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.modules.base import CompressedModule
from compress.modules.dense_spec import DenseSpec
from compress.modules.spec import ModuleSpec


class DenseLinear(CompressedModule):
    """x weight^T + bias. `values` is the weight [out, in], in the dtype in which it is stored."""

    values: Tensor
    bias: Tensor | None

    def __init__(self, values: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = values.shape
        self.spec = DenseSpec(self.in_features, self.out_features)
        self.register_parameter("values", nn.Parameter(values.detach(), requires_grad=False))
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))

    @classmethod
    def from_spec(
        cls, spec: ModuleSpec, bias: bool, dtype: torch.dtype, device: torch.device | str = "meta"
    ) -> DenseLinear:
        values = torch.empty(spec.out_features, spec.in_features, dtype=dtype, device=device)
        return cls(values, torch.empty(spec.out_features, dtype=dtype, device=device) if bias else None)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.values.detach().to(dtype or self.values.dtype)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return functional.linear(x, self.values.to(x.dtype), bias)

    def stored(self) -> dict[str, Tensor]:
        tensors = {"weight": self.values.detach()}
        return tensors if self.bias is None else {**tensors, "bias": self.bias.detach()}
