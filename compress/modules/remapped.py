"""A linear of low rank with the tensors of `remapped_spec`, no others."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from compress.modules.of_tensors import LinearOfTensors
from compress.modules.remapped_spec import RemappedSpec


class RemappedLinear(LinearOfTensors):
    """x right^T left^T + bias. Also stands in for a GPT-2 Conv1D, whose weight is the transpose.

    What is saved is storage: a forward takes the codes to floats. `hold` keeps those, as two factors or as their product,
    whichever multiplies faster.
    """

    spec: RemappedSpec
    left_code: Tensor
    left_scale: Tensor
    right_code: Tensor
    right_scale: Tensor
    rest: Tensor | None
    bias: Tensor | None

    optional = ("rest",)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.held is not None and not self.spec.thin:
            return linear(x, self.held.to(x.dtype), bias)
        left, right = self.factors(x.dtype) if self.held is None else self._halves(self.held.to(x.dtype))
        return linear(linear(x, right), left, bias)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """left @ right, multiplied in float32 and rounded once."""
        left, right = self.factors(torch.float32)
        return (left @ right).to(dtype or self.left_scale.dtype)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """left [out, rank], right [rank, in]. Codes times scales are exact in float32, so each number is rounded once."""
        left = (self.left_code.float() * self.left_scale.float()).to(dtype)
        right = (self.right_code.float() * self.right_scale.float()[:, None]).to(dtype)
        if self.rest is None:
            return left, right
        if self.out_features > self.in_features:
            return torch.cat([left, self.rest.to(dtype)]), right
        return left, torch.cat([right, self.rest.to(dtype)], dim=1)

    def hold(self, dtype: torch.dtype) -> None:
        left, right = self.factors(dtype)
        self.held = torch.cat([left.T, right], dim=1) if self.spec.thin else self.dense(dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, rank {self.spec.rank}, 8 bits per shared entry"

    def _halves(self, held: Tensor) -> tuple[Tensor, Tensor]:
        return held[:, : self.out_features].T, held[:, self.out_features :]
