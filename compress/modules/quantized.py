"""A linear, or a lookup table, whose weight is stored as integer codes: the tensors of `quantized_spec`, no others."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.kernels.ops import TILE, dequantize_rows, quantized_linear
from compress.kernels.packing import dequantize, pack, unpack, unpack_entries
from compress.modules.base import CompressedModule
from compress.modules.quantized_spec import QuantizedSpec
from compress.modules.spec import ModuleSpec


class QuantizedModule(CompressedModule):
    """What linear and table share: the tensors, how they are filled, and the weight they stand for."""

    spec: QuantizedSpec
    weight_packed: Tensor
    weight_scale: Tensor
    weight_shape: Tensor
    weight_zero_point: Tensor | None
    bias: Tensor | None

    def __init__(self, spec: QuantizedSpec, stored: dict[str, Tensor]):
        super().__init__()
        self.spec = spec
        for name, tensor in stored.items():  # parameters, so that offloading moves them like any weight
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        for name in ("weight_zero_point", "bias"):
            if name not in stored:
                self.register_parameter(name, None)

    @classmethod
    def from_spec(
        cls, spec: ModuleSpec, bias: bool, dtype: torch.dtype, device: torch.device | str = "meta"
    ) -> QuantizedModule:
        assert isinstance(spec, QuantizedSpec)
        dtypes = {"I32": torch.int32, "I64": torch.int64, "F32": dtype}
        stored = {
            name: torch.empty(shape, dtype=dtypes[kind], device=device)
            for name, (kind, shape) in spec.tensors("F32").items()
        }
        if bias:
            stored["bias"] = torch.empty(spec.out_features, dtype=dtype, device=device)
        return _class_of(spec)(spec, stored)

    @classmethod
    def from_codes(
        cls, codes: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantizedSpec, bias: Tensor | None = None
    ) -> QuantizedModule:
        """Pack codes into a module.

        Args:
            codes: integers 0 .. 2^bits - 1, [out_features, in_features].
            scale: [out_features, groups], in the dtype in which it is stored.
            zero_point: integers 0 .. 2^bits - 1, [out_features, groups]; None if symmetric.
            bias: [out_features], kept as it is.
        """
        spec.validate()
        assert codes.shape == (spec.out_features, spec.in_features)
        assert scale.shape == (spec.out_features, spec.n_groups)
        assert scale.is_floating_point()
        assert (zero_point is None) == spec.symmetric
        stored = {
            "weight_packed": pack(codes, spec.bits),
            "weight_scale": scale.detach().contiguous(),
            "weight_shape": torch.tensor([spec.out_features, spec.in_features], device=codes.device),
        }
        if zero_point is not None:
            assert zero_point.shape == scale.shape
            stored["weight_zero_point"] = pack(zero_point.T, spec.bits).T.contiguous()  # packed along out
        if bias is not None:
            stored["bias"] = bias.detach()
        return _class_of(spec)(spec, stored)

    def codes(self) -> Tensor:
        """uint8 [out_features, in_features], 0 .. 2^bits - 1."""
        return unpack(self.weight_packed, self.spec.bits, self.spec.in_features)

    def zero_points(self) -> Tensor | None:
        """uint8 [out_features, groups], or None where all are 2^(bits-1)."""
        if self.weight_zero_point is None:
            return None
        return unpack(self.weight_zero_point.T, self.spec.bits, self.spec.out_features).T

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """(codes - zero_point) * scale, [out_features, in_features].

        Computed in the dtype of the scale, bit for bit as compressed-tensors dequantises, then taken in `dtype`.
        """
        spec = self.spec
        scale = self.weight_scale
        weight = torch.empty(spec.out_features, spec.in_features, dtype=dtype or scale.dtype, device=scale.device)
        step = max(1, TILE // spec.in_features)
        for start in range(0, spec.out_features, step):
            rows = slice(start, min(start + step, spec.out_features))
            weight[rows] = dequantize_rows(
                self.weight_packed, scale, self.weight_zero_point, spec.bits, spec.in_features, rows
            )
        return weight

    def extra_repr(self) -> str:
        spec = self.spec
        group = "row" if spec.group_size == -1 else spec.group_size
        symmetry = "symmetric" if spec.symmetric else "asymmetric"
        return f"{spec.in_features} -> {spec.out_features}, {spec.bits} bits, group {group}, {symmetry}"


class QuantizedLinear(QuantizedModule):
    """x @ weight.T + bias. Also stands in for a GPT-2 Conv1D, whose weight is the transpose."""

    def __init__(self, spec: QuantizedSpec, stored: dict[str, Tensor]):
        super().__init__(spec, stored)
        self.in_features, self.out_features = spec.in_features, spec.out_features

    def forward(self, x: Tensor) -> Tensor:
        if self.held is not None:
            return functional.linear(x, self.held.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        spec = self.spec
        return quantized_linear(
            x, self.weight_packed, self.weight_scale, self.weight_zero_point, self.bias,
            spec.bits, spec.group_size, spec.in_features,
        )  # fmt: skip


class QuantizedEmbedding(QuantizedModule):
    """A lookup table: `num_embeddings` rows of `embedding_dim`; only the rows that are looked up are dequantised."""

    def __init__(self, spec: QuantizedSpec, stored: dict[str, Tensor]):
        super().__init__(spec, stored)
        self.num_embeddings, self.embedding_dim = spec.out_features, spec.in_features
        self.multiplier: float | None = None

    def adopt(self, original: nn.Module) -> None:
        """Gemma's tables multiply what they look up by a number that is no weight."""
        if isinstance(original, QuantizedEmbedding):
            self.multiplier = original.multiplier
        else:
            scale = getattr(original, "scalar_embed_scale", None)
            self.multiplier = None if scale is None else float(scale)

    def forward(self, ids: Tensor) -> Tensor:
        if self.held is not None:
            rows = functional.embedding(ids, self.held)
        else:
            rows = self._rows(ids.flatten()).unflatten(0, ids.shape)  # [..., embedding_dim]
        if self.multiplier is None:
            return rows
        return rows * torch.tensor(self.multiplier).to(rows)  # rounded to the dtype first, as Gemma does

    def _rows(self, ids: Tensor) -> Tensor:
        spec = self.spec
        codes = unpack(functional.embedding(ids, self.weight_packed), spec.bits, spec.in_features)
        zero_point = None
        if self.weight_zero_point is not None:
            zero_point = unpack_entries(self.weight_zero_point, spec.bits, ids)
        return dequantize(codes, functional.embedding(ids, self.weight_scale), zero_point, spec.bits)


def _class_of(spec: QuantizedSpec) -> type[QuantizedModule]:
    return QuantizedEmbedding if spec.kind == "embedding" else QuantizedLinear
