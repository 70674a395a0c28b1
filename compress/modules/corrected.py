"""A linear in few bits with a low-rank pair added to it. All three parts are leaves, which a later step may compress."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from compress.kernels.low_rank import packed_low_rank_linear
from compress.linalg.low_rank import decompose, factors, refitted_left
from compress.modules.base import CompressedModule, Leaf
from compress.modules.corrected_spec import BASE, CorrectedSpec
from compress.modules.factored import FactoredLinear, leaf_of, linear_with, replaced, weight_of
from compress.modules.low_rank import REFIT_DAMPING
from compress.modules.packed import PackedRows
from compress.modules.quantized import QuantizedLinear


class CorrectedLinear(FactoredLinear):
    """x base^T + x right^T left^T + bias. Also stands in for a GPT-2 Conv1D, whose weight is the transpose.

    `base` is a compressed module without bias; `right` and `left` are linears without bias: nn.Linear, or a compressed module.
    The sum of the two weights is never formed. Where the base is packed for a native kernel, all is one operation, which takes
    the pair in floats: factors in codes are decoded once.
    """

    spec: CorrectedSpec
    decoded: tuple[Tensor, Tensor] | None = (
        None  # left and right for that operation; neither saved nor copied nor moved
    )
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
        packed = self._buffer(x)
        if packed is not None:
            left, right = self._pair()
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

    def release(self) -> None:
        super().release()
        self.decoded = None

    def runs_as_one(self) -> bool:
        """Whether one operation can take base and pair, once the base is packed."""
        base, right, left = self.factors()
        if type(base) is not QuantizedLinear or not all(type(f) in (nn.Linear, QuantizedLinear) for f in (right, left)):
            return False
        return not any(f._forward_hooks or f._forward_pre_hooks or "forward" in f.__dict__ for f in (base, right, left))

    def _buffer(self, x: Tensor) -> PackedRows | None:
        """The base's, where one operation is to take it."""
        packed = getattr(self.base, "packed", None)
        if packed is None or packed.fused or self.base.held is not None or not self.runs_as_one():
            return None
        return None if (torch.is_grad_enabled() and x.requires_grad) or x.dtype == torch.float64 else packed

    def _pair(self) -> tuple[Tensor, Tensor]:
        """left and right in floats."""
        if self.decoded is not None:
            return self.decoded
        left, right = _floats(self.left), _floats(self.right)
        if not (isinstance(self.left, nn.Linear) and isinstance(self.right, nn.Linear)):
            self.decoded = left, right
        return left, right

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "decoded"}


def _floats(factor: nn.Module) -> Tensor:
    """The weight of a factor in the dtype of its floats."""
    return factor.dense() if isinstance(factor, CompressedModule) else factor.get_parameter("weight")
