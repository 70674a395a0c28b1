"""A pruned linear: the places of the weights that are kept, and their values, in floats or in integer codes.

weight_positions  int32 [out, words]                   which weights are kept: compress/kernels/position_layout.py
weight_values     float [out, in n / m]  or [kept]     n:m: by row; any other: all kept weights end to end, row by row

or, once a later step quantized the values, in place of weight_values

weight_packed     int32 [out, ceil(in n / m bits / 32)]  or [ceil(kept bits / 32)]    codes, packed as in quantized_spec
weight_scale      float [out, groups]                    per row and group of `group_size` columns, kept or not

weight = (code - 2^(bits-1)) * scale where kept, else 0
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from compress.errors import CheckpointError
from compress.kernels.position_layout import PositionLayout, position_layout
from compress.modules.quantized_spec import MAX_BITS, QuantizedSpec, n_words
from compress.modules.spec import MAX_FEATURES, ModuleSpec, check_whole


@dataclass(frozen=True)
class SparseSpec(ModuleSpec):
    """`kept` weights of the matrix: `n` of every `m` neighbouring inputs, or anywhere (n = m = 0). `bits` 0: floats;
    `group_size` -1: one scale per row."""

    representation: ClassVar[str] = "sparse"
    module: ClassVar[str] = "compress.modules.sparse:SparseLinear"
    kept: int
    n: int = 0
    m: int = 0
    bits: int = 0
    group_size: int = -1

    @classmethod
    def of_pattern(cls, in_features: int, out_features: int, n: int, m: int) -> SparseSpec:
        """`n` of every `m` inputs, which divides `in_features`."""
        return cls(in_features, out_features, out_features * (in_features // m) * n, n, m)

    @property
    def layout(self) -> PositionLayout:
        return position_layout(self.n, self.m)

    @property
    def quantized(self) -> QuantizedSpec | None:
        """The same weight in codes without places; None where values are floats."""
        if not self.bits:
            return None
        return QuantizedSpec(self.in_features, self.out_features, self.bits, self.group_size)

    @property
    def sparsity(self) -> float:
        return 1 - self.kept / (self.in_features * self.out_features)

    def masked_leaves(self) -> frozenset[str]:
        return frozenset({""})

    def with_leaf(self, name: str, spec: ModuleSpec) -> SparseSpec:
        """Its values as `spec` has all weights."""
        assert name == "" and isinstance(spec, QuantizedSpec) and spec.symmetric and spec.kind == "linear", spec
        return replace(self, bits=spec.bits, group_size=spec.group_size)

    def tensors(self, float_dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        out = self.out_features
        positions = ("I32", (out, self.layout.n_words(self.in_features)))
        row = self.kept // out if self.m else self.kept
        rows = (out,) if self.m else ()
        quantized = self.quantized
        if quantized is None:
            return {"weight_positions": positions, "weight_values": (float_dtype, (*rows, row))}
        return {
            "weight_positions": positions,
            "weight_packed": ("I32", (*rows, n_words(row, self.bits))),
            "weight_scale": (float_dtype, (out, quantized.n_groups)),
        }

    def validate(self) -> None:
        for name in ("in_features", "out_features"):
            check_whole(name, getattr(self, name), 1, MAX_FEATURES)
        check_whole("kept", self.kept, 1, self.in_features * self.out_features)
        check_whole("m", self.m, 0, self.in_features)
        check_whole("n", self.n, min(self.m, 1), max(self.m - 1, 0))
        if self.m:
            if self.in_features % self.m:
                raise CheckpointError(f"m={self.m} does not divide in_features={self.in_features}")
            expected = SparseSpec.of_pattern(self.in_features, self.out_features, self.n, self.m).kept
            if self.kept != expected:
                raise CheckpointError(f"kept={self.kept}, and {self.n}:{self.m} keeps {expected} weights")
        check_whole("bits", self.bits, 0, MAX_BITS)
        if self.quantized is not None:
            self.quantized.validate()
        elif self.group_size != -1:
            raise CheckpointError(f"group_size={self.group_size!r} without bits describes nothing")
