"""A linear in few bits with a low-rank pair added to it. All three parts are leaves, which a later step may compress."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compress.kernels.low_rank import packed_low_rank_linear
from compress.linalg.low_rank import decompose, factors, refitted_left
from compress.modules.base import CompressedModule, Leaf
from compress.modules.corrected_spec import BASE, CorrectedSpec
from compress.modules.factored import FactoredLinear, leaf_of, linear_with, replaced, weight_of
from compress.modules.low_rank import REFIT_DAMPING, plain
from compress.modules.packed import PackedRows
from compress.modules.quantized import QuantizedLinear


class CorrectedLinear(FactoredLinear):
    """x base^T + x right^T left^T + bias. Also stands in for a GPT-2 Conv1D, whose weight is the transpose.

    `base` is a compressed module without bias; `right` and `left` are linears without bias: nn.Linear, or a compressed module.
    The sum of the two weights is never formed; where the base is packed for a native kernel and the pair is in floats, all is
    one operation.
    """

    spec: CorrectedSpec
    base: CompressedModule
    right: nn.Module
    left: nn.Module

    @classmethod
    def from_parts(
        cls, base: CompressedModule, left: Tensor, right: Tensor, bias: Tensor | None = None
    ) -> CorrectedLinear:
        """left [out, rank], right [rank, in], in the dtype in which they are stored; a base without bias."""
        assert left.shape[1] == right.shape[0], (left.shape, right.shape)
        spec = CorrectedSpec(right.shape[1], left.shape[0], left.shape[1], base.spec)
        spec.validate()
        return cls(spec, base, linear_with(right), linear_with(left), bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        packed = self._fused(x)
        if packed is not None:
            left, right = self.left.get_parameter("weight"), self.right.get_parameter("weight")
            return packed_low_rank_linear(x, packed.weight, left, right, self.bias, packed.mode)
        y = self.base(x) + self.left(self.right(x))
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """base + left @ right, added up in float32 and rounded once."""
        return (weight_of(self.base) + self.correction()).to(dtype or self._float_dtype())

    def correction(self) -> Tensor:
        """left @ right in float32."""
        return weight_of(self.left) @ weight_of(self.right)

    def leaves(self) -> dict[str, Leaf]:
        right = leaf_of(self.right)
        return {BASE: leaf_of(self.base), "right": right, "left": leaf_of(self.left, right.weight)}

    def with_leaf(self, name: str, module: CompressedModule, second_moment: Tensor | None) -> CorrectedLinear:
        """A changed base refits the pair, a changed right factor the left one, unless they are compressed already."""
        assert name in self.spec.factors, name
        spec = self.spec.with_leaf(name, module.spec)
        base, right, left = self.base, self.right, self.left
        if name == BASE:
            base = replaced(base, module)
            if isinstance(right, nn.Linear) and isinstance(left, nn.Linear):
                missing = self.dense(torch.float32) - weight_of(base)
                pair = factors(missing, decompose(missing, spec.rank, second_moment).basis)
                left, right = (linear_with(factor.to(left.weight.dtype)) for factor in pair)
        elif name == "right":
            right = replaced(right, module)
            if isinstance(left, nn.Linear):
                fitted = refitted_left(
                    weight_of(left), weight_of(self.right), weight_of(right), second_moment, REFIT_DAMPING
                )
                left = linear_with(fitted.to(left.weight.dtype))
        else:
            left = replaced(left, module)
        return CorrectedLinear(spec, base, right, left, bias=self.bias)

    def _fused(self, x: Tensor) -> PackedRows | None:
        """The base's buffer, where one operation can take it together with the pair."""
        base = self.base
        if type(base) is not QuantizedLinear or base.packed is None or base.packed.fused or base.held is not None:
            return None
        if (torch.is_grad_enabled() and x.requires_grad) or x.dtype == torch.float64:
            return None
        listened = base._forward_hooks or base._forward_pre_hooks or "forward" in base.__dict__
        return base.packed if plain(self.left) and plain(self.right) and not listened else None
