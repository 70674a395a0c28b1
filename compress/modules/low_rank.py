"""A linear whose weight is the product of two thin matrices. Both are leaves, which a later step may compress."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compress.kernels.low_rank import low_rank_linear
from compress.linalg.low_rank import refitted_left
from compress.modules.base import CompressedModule, Leaf
from compress.modules.factored import FactoredLinear, leaf_of, linear_with, replaced, weight_of
from compress.modules.low_rank_spec import LowRankSpec

REFIT_DAMPING = 1e-6  # of the mean of diag(R H R^T): enough to solve, too little to hold the left factor back


class LowRankLinear(FactoredLinear):
    """x right^T left^T + bias. Also stands in for a GPT-2 Conv1D, whose weight is the transpose.

    `right` and `left` are linears without bias: nn.Linear, or a compressed module.
    """

    spec: LowRankSpec
    right: nn.Module
    left: nn.Module

    @classmethod
    def from_factors(cls, left: Tensor, right: Tensor, bias: Tensor | None = None) -> LowRankLinear:
        """left [out, rank], right [rank, in], in the dtype in which they are stored."""
        assert left.shape[1] == right.shape[0], (left.shape, right.shape)
        spec = LowRankSpec(right.shape[1], left.shape[0], left.shape[1])
        spec.validate()
        return cls(spec, linear_with(right), linear_with(left), bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.left, self.right
        if _plain(left) and _plain(right):
            return low_rank_linear(x, left.get_parameter("weight"), right.get_parameter("weight"), self.bias)
        return super().forward(x)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """left @ right, multiplied in float32 and rounded once."""
        left, right = weight_of(self.left), weight_of(self.right)
        return (left @ right).to(dtype or self._float_dtype())

    def leaves(self) -> dict[str, Leaf]:
        right = leaf_of(self.right)
        return {"right": right, "left": leaf_of(self.left, right.weight)}

    def with_leaf(self, name: str, module: CompressedModule, second_moment: Tensor | None) -> LowRankLinear:
        """A changed right factor refits the left one, unless that is compressed already."""
        assert name in self.spec.factors, name
        spec = self.spec.with_leaf(name, module.spec)
        if name == "left":
            return LowRankLinear(spec, self.right, replaced(self.left, module), bias=self.bias)
        left = self.left
        if isinstance(left, nn.Linear):
            changed = module.dense(torch.float32)
            fitted = refitted_left(weight_of(left), weight_of(self.right), changed, second_moment, REFIT_DAMPING)
            left = linear_with(fitted.to(left.weight.dtype))
        return LowRankLinear(spec, replaced(self.right, module), left, bias=self.bias)


def _plain(factor: nn.Module) -> bool:
    """Whether its weight may be used without calling it: nobody listens, or brings the weight only when it is called."""
    listened = factor._forward_hooks or factor._forward_pre_hooks or "forward" in factor.__dict__
    return type(factor) is nn.Linear and not listened
