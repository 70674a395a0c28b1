"""A linear whose weight is the product of two thin matrices. Both are leaves, which a later step may compress."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compress.linalg.low_rank import refitted_left
from compress.modules.base import CompressedModule, Leaf
from compress.modules.low_rank_spec import FACTORS, LowRankSpec
from compress.modules.registry import module_class
from compress.modules.spec import ModuleSpec

REFIT_DAMPING = 1e-6  # of the mean of diag(R H R^T): enough to solve, too little to hold the left factor back


class LowRankLinear(CompressedModule):
    """x right^T left^T + bias. Also stands in for a GPT-2 Conv1D, whose weight is the transpose.

    `right` and `left` are linears without bias: nn.Linear, or a compressed module.
    """

    spec: LowRankSpec
    right: nn.Module
    left: nn.Module
    bias: Tensor | None

    def __init__(self, spec: LowRankSpec, right: nn.Module, left: nn.Module, bias: Tensor | None = None):
        super().__init__()
        self.spec = spec
        self.in_features, self.out_features = spec.in_features, spec.out_features
        self.right, self.left = right, left
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))

    @classmethod
    def from_spec(
        cls, spec: ModuleSpec, bias: bool, dtype: torch.dtype, device: torch.device | str = "meta"
    ) -> LowRankLinear:
        assert isinstance(spec, LowRankSpec)
        made: dict[str, nn.Module] = {}
        for name, shape in spec.leaf_shapes().items():
            inside = spec.factor(name)
            if inside is None:
                made[name] = _linear(torch.empty(shape, dtype=dtype, device=device))
            else:
                made[name] = module_class(inside.representation).from_spec(inside, False, dtype, device)
        return cls(spec, **made, bias=torch.empty(spec.out_features, dtype=dtype, device=device) if bias else None)

    @classmethod
    def from_factors(cls, left: Tensor, right: Tensor, bias: Tensor | None = None) -> LowRankLinear:
        """left [out, rank], right [rank, in], in the dtype in which they are stored."""
        assert left.shape[1] == right.shape[0], (left.shape, right.shape)
        spec = LowRankSpec(right.shape[1], left.shape[0], left.shape[1])
        spec.validate()
        return cls(spec, _linear(right), _linear(left), bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.left(self.right(x))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """left @ right, multiplied in float32 and rounded once."""
        left, right = _weight(self.left), _weight(self.right)
        return (left @ right).to(dtype or self._float_dtype())

    def leaves(self) -> dict[str, Leaf]:
        right = _weight(self.right)
        return {"right": Leaf(right), "left": Leaf(_weight(self.left), right)}

    def with_leaf(self, name: str, module: CompressedModule, second_moment: Tensor | None) -> LowRankLinear:
        """A changed right factor refits the left one, unless that is compressed already."""
        assert name in FACTORS, name
        spec = self.spec.with_leaf(name, module.spec)
        if name == "left":
            return LowRankLinear(spec, self.right, module, self.bias)
        left = self.left
        if isinstance(left, nn.Linear):
            changed = module.dense(torch.float32)
            fitted = refitted_left(_weight(left), _weight(self.right), changed, second_moment, REFIT_DAMPING)
            left = _linear(fitted.to(left.weight.dtype))
        return LowRankLinear(spec, module, left, self.bias)

    def hold(self, dtype: torch.dtype) -> None:
        """Compressed factors keep dense copies; the product is never formed, since it would cost more than it saves."""
        for factor in (self.right, self.left):
            if isinstance(factor, CompressedModule):
                factor.hold(dtype)

    def release(self) -> None:
        for factor in (self.right, self.left):
            if isinstance(factor, CompressedModule):
                factor.release()

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, rank {self.spec.rank}"

    def _float_dtype(self) -> torch.dtype:
        return next(t.dtype for t in self.left.state_dict().values() if t.is_floating_point())


def _linear(weight: Tensor) -> nn.Linear:
    """A linear without bias that holds `weight` as it is."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)
    return linear


def _weight(factor: nn.Module) -> Tensor:
    """The weight of a factor in float32."""
    if isinstance(factor, CompressedModule):
        return factor.dense(torch.float32)
    return factor.get_parameter("weight").detach().float()
