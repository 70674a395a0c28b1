"""A linear, or a lookup table, whose weight is stored as integer codes: the tensors of `quantized_spec`, no others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.kernels.choice import Activations
from compress.kernels.ops import TILE, dequantize_rows, quantized_linear
from compress.kernels.packing import dequantize, pack, unpack, unpack_entries
from compress.modules.of_tensors import ModuleOfTensors
from compress.modules.packed import PackedRows, can_pack, pack_rows
from compress.modules.quantized_spec import QuantizedSpec
from compress.modules.spec import ModuleSpec

IN_BUFFER = ("weight_packed", "weight_scale", "weight_zero_point")  # what a native kernel's layout replaces
PARAMETERS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "bias")


class QuantizedModule(ModuleOfTensors):
    """What linear and table share: the tensors, how they are filled, and the weight they stand for."""

    spec: QuantizedSpec
    weight_packed: Tensor
    weight_scale: Tensor
    weight_shape: Tensor
    weight_zero_point: Tensor | None
    bias: Tensor | None

    optional = ("weight_zero_point",)

    @classmethod
    def class_of(cls, spec: ModuleSpec) -> type[QuantizedModule]:
        return QuantizedEmbedding if isinstance(spec, QuantizedSpec) and spec.kind == "embedding" else QuantizedLinear

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
        return cls.class_of(spec)(spec, stored)

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
        words, scale, zero_point = (
            self.weight_packed,
            self.weight_scale,
            self.weight_zero_point,
        )  # once: see QuantizedLinear
        weight = torch.empty(spec.out_features, spec.in_features, dtype=dtype or scale.dtype, device=scale.device)
        step = max(1, TILE // spec.in_features)
        for start in range(0, spec.out_features, step):
            rows = slice(start, min(start + step, spec.out_features))
            weight[rows] = dequantize_rows(words, scale, zero_point, spec.bits, spec.in_features, rows)
        return weight

    def tunable(self) -> dict[str, Tensor]:
        return {"weight_scale": self.weight_scale}

    def tuning_gradients(self, by_weight: Tensor) -> dict[str, Tensor]:
        """Of each scale: the sum over its group of the gradient times code - zero_point."""
        spec, words, zero_point = self.spec, self.weight_packed, self.weight_zero_point
        ones = torch.ones_like(self.weight_scale, dtype=torch.float32)
        found = torch.empty_like(ones)
        step = max(1, TILE // spec.in_features)
        for start in range(0, spec.out_features, step):
            rows = slice(start, min(start + step, spec.out_features))
            steps = dequantize_rows(words, ones, zero_point, spec.bits, spec.in_features, rows)
            found[rows] = (steps * by_weight[rows]).unflatten(1, (spec.n_groups, -1)).sum(-1)
        return {"weight_scale": found}

    def extra_repr(self) -> str:
        spec = self.spec
        group = "row" if spec.group_size == -1 else spec.group_size
        symmetry = "symmetric" if spec.symmetric else "asymmetric"
        return f"{spec.in_features} -> {spec.out_features}, {spec.bits} bits, group {group}, {symmetry}"


class QuantizedLinear(QuantizedModule):
    """x @ weight.T + bias. Also stands in for a GPT-2 Conv1D, whose weight is the transpose.

    While it is `packed` its codes, scales and zero points lie in the layout of a native kernel, and are no parameters. Whoever
    reads them, or the state_dict, gets them as they were, decoded anew; what moves or fills the module packs it again.
    """

    packed: PackedRows | None = None
    place = 0  # among the linears in the buffer

    def __init__(self, spec: QuantizedSpec, stored: dict[str, Tensor]):
        super().__init__(spec, stored)
        self.in_features, self.out_features = spec.in_features, spec.out_features

    def forward(self, x: Tensor) -> Tensor:
        if self.held is not None:
            return functional.linear(x, self.held.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        packed = self.packed
        if packed is not None and not (torch.is_grad_enabled() and x.requires_grad) and x.dtype != torch.float64:
            return packed.output(self.place, x, self.bias, bool(self._forward_hooks or self._forward_pre_hooks))
        spec = self.spec
        return quantized_linear(
            x, self.weight_packed, self.weight_scale, self.weight_zero_point, self.bias,
            spec.bits, spec.group_size, spec.in_features,
        )  # fmt: skip

    @property
    def packable(self) -> bool:
        """Whether a native kernel can run it where it is."""
        return self.packed is None and can_pack(self)

    def move_into(self, packed: PackedRows, place: int) -> None:
        """Let the rows at `place` of a buffer stand for the plain tensors, which are let go."""
        self.release()
        self.packed, self.place = packed, place
        for name in IN_BUFFER:
            if self._parameters[name] is not None:
                del self._parameters[name]

    def unpack(self) -> None:
        """Back to plain tensors."""
        if self.packed is not None:
            self._parameters.update(self._parameters_unpacked())
            self.packed, self.place = None, 0

    def repack(self, activations: Activations) -> None:
        """Into a buffer of its own, if a native kernel can run it where it is now."""
        if self.packable:
            self.move_into(pack_rows([self], activations), 0)

    @property
    def nbytes(self) -> int:
        if self.packed is None:
            return super().nbytes
        scale = torch.empty(0, dtype=self.packed.scale_dtype)
        return self.spec.nbytes({4: "F32", 2: "F16"}[scale.element_size()])

    def __getattr__(self, name: str) -> Any:
        packed = self.__dict__.get("packed") if name in IN_BUFFER else None
        if packed is None or name in self._parameters:
            return super().__getattr__(name)
        return packed.tensors(self.place)[name]

    def _parameters_unpacked(self) -> dict[str, nn.Parameter | None]:
        """All parameters as they are where nothing is packed, in the order of the spec."""
        assert self.packed is not None
        plain = self.packed.tensors(self.place)
        found = {**self._parameters, **{n: nn.Parameter(t, requires_grad=False) for n, t in plain.items()}}
        return {name: found[name] for name in PARAMETERS}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        packed = self._parameters
        if self.packed is not None:
            self._parameters = self._parameters_unpacked()
        try:
            super()._save_to_state_dict(destination, prefix, keep_vars)
        finally:
            self._parameters = packed

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        packed = self.packed
        if packed is not None:
            probe = torch.empty(0, dtype=packed.scale_dtype)
            if fn(probe) is probe:  # nothing goes anywhere
                return super()._apply(fn, recurse)
            self.unpack()
        super()._apply(fn, recurse)
        if packed is not None:
            self.repack(packed.activations)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        packed = self.packed
        self.unpack()
        super()._load_from_state_dict(*args, **kwargs)
        if packed is not None:
            self.repack(packed.activations)

    def __getstate__(self) -> dict[str, Any]:
        """Plain tensors, and whether to pack them again: a buffer belongs to this process."""
        state = super().__getstate__()
        packed = state.pop("packed", None)
        if packed is not None:
            state.pop("place", None)
            state |= {"_parameters": self._parameters_unpacked(), "_activations": packed.activations}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        activations = state.pop("_activations", None)
        super().__setstate__(state)
        if activations is not None:
            self.repack(activations)


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
