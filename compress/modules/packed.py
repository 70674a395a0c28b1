"""Quantized linears while a native kernel runs them: their codes lie in the kernel's layout instead of in their tensors.

Linears that read one input and are quantized alike lie in one buffer, row behind row, and are one product: the first that is
called computes the rows of all, and the others are handed theirs if they are called with the same tensor. So an input is
rounded once, and a token costs one parallel region where it would cost three. Whoever is called alone, with a tensor of his
own, or under a hook gets what he would get anyway.

Packing loses nothing: `tensors` gives back what was packed, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress.kernels import native
from compress.kernels.choice import Activations
from compress.kernels.cuda.ops import can_prepare
from compress.kernels.packed import PackedWeight, packed_linear, prepare
from compress.kernels.packed_layout import DTYPES
from compress.kernels.packing import pack, unpack

if TYPE_CHECKING:
    from compress.modules.quantized import QuantizedLinear

BITS = {"int8": 8, "float": 16}  # as the kernels name them


class PackedRows:
    """One buffer with the rows of one or more linears, in their order."""

    def __init__(self, weight: PackedWeight, rows: Sequence[slice], bits: int, activations: Activations):
        self.weight, self.rows, self.bits, self.activations = weight, tuple(rows), bits, activations
        self.mode = BITS[activations]
        self._kept: tuple[Tensor, int, Tensor, int] | None = None  # input, its version, the outputs, who has taken his

    @property
    def scale_dtype(self) -> torch.dtype:
        return DTYPES[self.weight.layout.scale_dtype]

    @property
    def fused(self) -> bool:
        return len(self.rows) > 1

    def output(self, place: int, x: Tensor, bias: Tensor | None, hooked: bool) -> Tensor:
        """x @ weight.T + bias for the rows of one linear.

        Args:
            place: which one.
            hooked: it has hooks, which may change tensors in place: it neither takes nor leaves anything.
        """
        if not self.fused:
            return packed_linear(x, self.weight, bias, self.mode)
        kept = self._kept  # read once: another thread may put its own there
        version = 0 if torch.compiler.is_compiling() or x.is_inference() else x._version
        if kept is not None and not hooked and kept[0] is x and kept[1] == version and not kept[3] >> place & 1:
            out, taken = kept[2], kept[3] | 1 << place
        else:
            out, taken = packed_linear(x, self.weight, None, self.mode), 1 << place
        everybody = (1 << len(self.rows)) - 1
        self._kept = None if hooked or taken == everybody else (x, version, out, taken)
        own = out[..., self.rows[place]]
        return own if bias is None else own + bias.to(own.dtype)

    def tensors(self, place: int) -> dict[str, Tensor]:
        """The tensors of one linear as they were before they were packed."""
        codes, scale, zero_points = self.weight.tensors()
        rows = self.rows[place]
        found = {"weight_packed": pack(codes[rows], self.bits), "weight_scale": scale[rows].clone()}
        if zero_points is not None:
            found["weight_zero_point"] = pack(zero_points[rows].T.contiguous(), self.bits).T.contiguous()
        return found


def alike(one: QuantizedLinear, other: QuantizedLinear) -> bool:
    """Whether both can lie in one buffer."""
    a, b = one.spec, other.spec
    form = (a.in_features, a.bits, a.group_size, a.symmetric) == (b.in_features, b.bits, b.group_size, b.symmetric)
    scales = one.weight_scale, other.weight_scale
    return form and scales[0].dtype == scales[1].dtype and scales[0].device == scales[1].device


def can_pack(module: QuantizedLinear) -> bool:
    """Whether a native kernel is there, and runs this module where it is."""
    scale, spec = module.weight_scale, module.spec
    if scale.is_cuda and not hasattr(module, "_hf_hook"):
        return can_prepare(scale, spec.bits, spec.group_size, spec.in_features)
    if (
        scale.device.type != "cpu" or scale.dtype not in DTYPES or hasattr(module, "_hf_hook")
    ):  # a hook that moves tensors
        return False
    return native.library() is not None


def pack_rows(modules: Sequence[QuantizedLinear], activations: Activations) -> PackedRows:
    """One buffer for linears that are `alike` and on one device."""
    spec = modules[0].spec
    zero_points = None
    if not spec.symmetric:
        zero_points = torch.cat([_zero_points(module) for module in modules])
    weight = prepare(
        _joined([module.weight_packed for module in modules]),
        _joined([module.weight_scale for module in modules]),
        zero_points,
        spec.bits,
        spec.group_size,
        spec.in_features,
    )
    rows, start = [], 0
    for module in modules:
        rows.append(slice(start, start + module.out_features))
        start += module.out_features
    return PackedRows(weight, rows, spec.bits, activations)


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0].detach() if len(tensors) == 1 else torch.cat([t.detach() for t in tensors])


def _zero_points(module: QuantizedLinear) -> Tensor:
    """uint8 [out, groups]."""
    packed = module.weight_zero_point
    assert packed is not None
    return unpack(packed.T, module.spec.bits, module.out_features).T.contiguous()
