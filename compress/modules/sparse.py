"""A linear of which some weights are zero and not stored: the tensors of `sparse_spec`, no others."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from compress.errors import CheckpointError
from compress.kernels.packing import pack
from compress.kernels.sparse import (
    kept_entries,
    pack_positions,
    rebuilt,
    sparse_linear,
    unpack_positions,
    wrong_positions,
)
from compress.modules.base import CompressedModule, Leaf
from compress.modules.of_tensors import LinearOfTensors
from compress.modules.quantized import QuantizedLinear
from compress.modules.sparse_spec import SparseSpec


class SparseLinear(LinearOfTensors):
    """x @ weight.T + bias. Also stands in for a GPT-2 Conv1D, whose weight is the transpose."""

    spec: SparseSpec
    weight_positions: Tensor
    weight_values: Tensor | None
    weight_packed: Tensor | None
    weight_scale: Tensor | None
    bias: Tensor | None

    optional = ("weight_values", "weight_packed", "weight_scale")

    @classmethod
    def from_weight(
        cls, weight: Tensor, mask: Tensor, n: int = 0, m: int = 0, bias: Tensor | None = None
    ) -> SparseLinear:
        """The entries of `weight` [out, in] where `mask` is True, in the dtype of `weight`; n of m of them in each group."""
        spec = SparseSpec(weight.shape[1], weight.shape[0], int(mask.sum()), n, m)
        spec.validate()
        stored = {
            "weight_positions": pack_positions(mask, n, m),
            "weight_values": kept_entries(weight.detach(), mask, n, m),
        }
        return cls(spec, stored if bias is None else {**stored, "bias": bias})

    def quantized(self, module: QuantizedLinear) -> SparseLinear:
        """The same places with the codes that `module` has there; its scales, its bias."""
        spec = self.spec.with_leaf("", module.spec)
        kept = kept_entries(module.codes(), self.mask(), spec.n, spec.m)
        stored = {
            "weight_positions": self.weight_positions,
            "weight_packed": pack(kept, spec.bits) if spec.m else pack(kept[None], spec.bits)[0],
            "weight_scale": module.weight_scale,
        }
        return SparseLinear(spec, stored if module.bias is None else {**stored, "bias": module.bias})

    def mask(self) -> Tensor:
        """Which weights are kept: bool [out_features, in_features]."""
        return unpack_positions(self.weight_positions, self.spec.n, self.spec.m, self.spec.in_features)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight with its zeros, [out_features, in_features]."""
        spec, values = self.spec, self._values()
        own = values if self.weight_scale is None else self.weight_scale
        weight = torch.empty(spec.out_features, spec.in_features, dtype=dtype or own.dtype, device=own.device)
        for rows, tile in rebuilt(
            values, self.weight_positions, self.weight_scale, spec.bits, spec.n, spec.m, spec.in_features
        ):
            weight[rows] = tile
        return weight

    def forward(self, x: Tensor) -> Tensor:
        spec = self.spec
        if self.held is not None:
            return functional.linear(x, self.held.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        return sparse_linear(
            x, self._values(), self.weight_positions, self.weight_scale, self.bias,
            spec.bits, spec.n, spec.m, spec.in_features,
        )  # fmt: skip

    def leaves(self) -> dict[str, Leaf]:
        """The weight as a whole, under its mask."""
        return {"": Leaf(self.dense(torch.float32), mask=self.mask())}

    def with_leaf(self, name: str, module: CompressedModule, second_moment: Tensor | None) -> SparseLinear:
        """Its values as codes of `module`."""
        assert name == "" and isinstance(module, QuantizedLinear), (name, type(module))
        return self.quantized(module)

    def check_stored(self, name: str) -> None:
        spec = self.spec
        if self.weight_positions.is_meta:  # offloaded
            return
        wrong = wrong_positions(self.weight_positions, spec.n, spec.m, spec.in_features, spec.kept)
        if wrong is not None:
            raise CheckpointError(f"{name}.weight_positions: {wrong}; the checkpoint is damaged: fetch it again")

    def extra_repr(self) -> str:
        spec = self.spec
        pattern = f"{spec.n}:{spec.m}" if spec.m else f"{spec.sparsity:.1%} sparse"
        return f"{spec.in_features} -> {spec.out_features}, {pattern}" + (f", {spec.bits} bits" if spec.bits else "")

    def _values(self) -> Tensor:
        values = self.weight_values if self.weight_packed is None else self.weight_packed
        assert values is not None
        return values
