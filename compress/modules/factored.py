"""A linear whose weight is a product of factors, applied one after the other; each is a leaf (factored_spec.py)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from compress.modules.base import CompressedModule, Leaf
from compress.modules.factored_spec import FactoredSpec
from compress.modules.registry import module_class
from compress.modules.spec import ModuleSpec


class FactoredLinear(CompressedModule):
    """x times the transposes of all factors in data order, + bias. Factors are linears without bias: nn.Linear, or a
    compressed module. Also stands in for a GPT-2 Conv1D, whose weight is the transpose."""

    spec: FactoredSpec
    bias: Tensor | None

    def __init__(self, spec: FactoredSpec, *factors: nn.Module, bias: Tensor | None = None):
        super().__init__()
        self.spec = spec
        self.in_features, self.out_features = spec.in_features, spec.out_features
        for name, factor in zip(spec.factors, factors, strict=True):
            self.add_module(name, factor)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))

    @classmethod
    def from_spec(
        cls, spec: ModuleSpec, bias: bool, dtype: torch.dtype, device: torch.device | str = "meta"
    ) -> FactoredLinear:
        assert isinstance(spec, FactoredSpec)
        made: list[nn.Module] = []
        for name, shape in spec.leaf_shapes().items():
            inside = spec.factor(name)
            if inside is None:
                made.append(linear_with(torch.empty(shape, dtype=dtype, device=device)))
            else:
                made.append(module_class(inside.representation).from_spec(inside, False, dtype, device))
        return cls(spec, *made, bias=torch.empty(spec.out_features, dtype=dtype, device=device) if bias else None)

    def factors(self) -> list[nn.Module]:
        """In data order."""
        return [self.get_submodule(name) for name in self.spec.factors]

    def forward(self, x: Tensor) -> Tensor:
        for factor in self.factors():
            x = factor(x)
        return x if self.bias is None else x + self.bias.to(x.dtype)

    def hold(self, dtype: torch.dtype) -> None:
        """Compressed factors keep dense copies; the product is never formed, since it would cost more than it saves."""
        for factor in self.factors():
            if isinstance(factor, CompressedModule):
                factor.hold(dtype)

    def release(self) -> None:
        for factor in self.factors():
            if isinstance(factor, CompressedModule):
                factor.release()

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, rank {self.spec.rank}"

    def _float_dtype(self) -> torch.dtype:
        return next(t.dtype for t in self.factors()[-1].state_dict().values() if t.is_floating_point())


def linear_with(weight: Tensor) -> nn.Linear:
    """A linear without bias that holds `weight` as it is."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)
    return linear


def leaf_of(factor: nn.Module, input_map: Tensor | None = None) -> Leaf:
    """A factor as a leaf, with its mask if it is pruned."""
    if isinstance(factor, CompressedModule):
        return replace(factor.leaves()[""], input_map=input_map)
    return Leaf(weight_of(factor), input_map)


def replaced(factor: nn.Module, module: CompressedModule) -> CompressedModule:
    """What stands in the place of a factor once `module` was made of its leaf."""
    return factor.with_leaf("", module, None) if isinstance(factor, CompressedModule) else module


def weight_of(factor: nn.Module) -> Tensor:
    """The weight of a factor in float32."""
    if isinstance(factor, CompressedModule):
        return factor.dense(torch.float32)
    return factor.get_parameter("weight").detach().float()
