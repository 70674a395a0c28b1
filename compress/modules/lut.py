"""A linear whose weights are values of small tables: the tensors of `lut_spec`, no others."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from compress.kernels.lut import lut_linear, lut_rows
from compress.kernels.packing import pack, unpack
from compress.modules.lut_spec import LUTSpec
from compress.modules.of_tensors import LinearOfTensors


class LUTLinear(LinearOfTensors):
    """x @ weight.T + bias. Also stands in for a GPT-2 Conv1D, whose weight is the transpose."""

    spec: LUTSpec
    weight_packed: Tensor
    weight_table: Tensor
    weight_scale: Tensor | None
    bias: Tensor | None

    optional = ("weight_scale",)

    @classmethod
    def from_codes(
        cls, codes: Tensor, table: Tensor, scale: Tensor | None, spec: LUTSpec, bias: Tensor | None = None
    ) -> LUTLinear:
        """Pack codes into a module.

        Args:
            codes: integers 0 .. 2^bits - 1, [out_features, in_features].
            table: [2^bits]; [out_features, 2^bits] if the spec has no groups. In the dtype in which it is stored.
            scale: [out_features, groups] in the same dtype; None if the spec has no groups.
            bias: [out_features], kept as it is.
        """
        spec.validate()
        assert codes.shape == (spec.out_features, spec.in_features)
        assert (scale is None) == (spec.n_groups == 0)
        stored = {"weight_packed": pack(codes, spec.bits), "weight_table": table.detach().contiguous()}
        if scale is not None:
            assert scale.dtype == table.dtype
            stored["weight_scale"] = scale.detach().contiguous()
        shapes = {name: shape for name, (_, shape) in spec.tensors("F32").items()}
        assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == shapes
        if bias is not None:
            stored["bias"] = bias.detach()
        return cls(spec, stored)

    def codes(self) -> Tensor:
        """uint8 [out_features, in_features], 0 .. 2^bits - 1."""
        return unpack(self.weight_packed, self.spec.bits, self.spec.in_features)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The values of all codes, [out_features, in_features]: rounded to the dtype of the table, then taken in `dtype`."""
        spec, table = self.spec, self.weight_table
        weight = torch.empty(spec.out_features, spec.in_features, dtype=dtype or table.dtype, device=table.device)
        for rows, tile in lut_rows(self.weight_packed, table, self.weight_scale, spec.bits, spec.in_features):
            weight[rows] = tile
        return weight

    def forward(self, x: Tensor) -> Tensor:
        if self.held is not None:
            return functional.linear(x, self.held.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        spec = self.spec
        return lut_linear(
            x, self.weight_packed, self.weight_table, self.weight_scale, self.bias, spec.bits, spec.in_features
        )

    def tunable(self) -> dict[str, Tensor]:
        found = {"weight_table": self.weight_table}
        return found if self.weight_scale is None else {**found, "weight_scale": self.weight_scale}

    def tuning_gradients(self, by_weight: Tensor) -> dict[str, Tensor]:
        """Of each scale: the sum over its group of the gradient times the table's value; of each value: the sum over the weights
        that have its code, of the gradient times their scales."""
        spec, table, codes = self.spec, self.weight_table.float(), self.codes().long()
        if self.weight_scale is None:
            return {"weight_table": torch.zeros_like(table).scatter_add_(1, codes, by_weight.float())}
        groups = (spec.n_groups, -1)
        scale = self.weight_scale.float().unsqueeze(-1)
        felt = (by_weight.float().unflatten(1, groups) * scale).flatten()
        by_scale = (by_weight.float() * table[codes]).unflatten(1, groups).sum(-1)
        by_table = torch.zeros_like(table).scatter_add_(0, codes.flatten(), felt)
        return {"weight_table": by_table, "weight_scale": by_scale}

    def extra_repr(self) -> str:
        spec = self.spec
        group = {0: "a table per row", -1: "one table, a scale per row"}.get(
            spec.group_size, f"one table, groups of {spec.group_size}"
        )
        return f"{spec.in_features} -> {spec.out_features}, {spec.bits} bits, {group}"
