"""A pruned linear between two block-diagonal ones: weight = diag(output_wrapper) @ core @ diag(input_wrapper).

input_wrapper    float [in / b, b, b]      blocks that the inputs meet first, b of them each
core.…                                     the pruned linear: tensors of sparse_spec under this prefix
output_wrapper   float [out / a, a, a]     blocks that make the outputs, a of them each
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from compress.errors import CheckpointError
from compress.modules.sparse_spec import SparseSpec
from compress.modules.spec import MAX_FEATURES, ModuleSpec, check_whole, spec_from_dict

LEAF = "core"


@dataclass(frozen=True)
class ArmorSpec(ModuleSpec):
    """`output_size` a and `input_size` b of the blocks; `core` as it is stored, in floats or codes."""

    representation: ClassVar[str] = "armor"
    module: ClassVar[str] = "compress.modules.armor:ArmorLinear"
    output_size: int
    input_size: int
    core: SparseSpec

    @classmethod
    def of_sizes(cls, in_features: int, out_features: int, output_size: int, input_size: int) -> ArmorSpec:
        """With a 2:4 core in floats."""
        core = SparseSpec.of_pattern(in_features, out_features, 2, 4)
        return cls(in_features, out_features, output_size, input_size, core)

    def leaf_shapes(self) -> dict[str, tuple[int, int]]:
        return {LEAF: (self.out_features, self.in_features)}

    def masked_leaves(self) -> frozenset[str]:
        return frozenset({LEAF})

    def with_leaf(self, name: str, spec: ModuleSpec) -> ArmorSpec:
        assert name == LEAF, name
        return replace(self, core=self.core.with_leaf("", spec))

    def tensors(self, float_dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        a, b = self.output_size, self.input_size
        return {
            "input_wrapper": (float_dtype, (self.in_features // b, b, b)),
            **{f"{LEAF}.{suffix}": tensor for suffix, tensor in self.core.tensors(float_dtype).items()},
            "output_wrapper": (float_dtype, (self.out_features // a, a, a)),
        }

    def validate(self) -> None:
        for name, size in (("in_features", "input_size"), ("out_features", "output_size")):
            features, block = getattr(self, name), getattr(self, size)
            check_whole(name, features, 1, MAX_FEATURES)
            check_whole(size, block, 1, features)
            if features % block:
                raise CheckpointError(f"{size}={block} does not divide {name}={features}")
        if not isinstance(self.core, SparseSpec):
            raise CheckpointError(f"core={self.core!r:.200} is not how the core can be stored")
        self.core.validate()
        if (self.core.out_features, self.core.in_features) != (self.out_features, self.in_features):
            raise CheckpointError(
                f"core is described as {[self.core.out_features, self.core.in_features]}, and the module is "
                f"{[self.out_features, self.in_features]}"
            )

    def to_dict(self) -> dict[str, object]:
        return {**super().to_dict(), LEAF: self.core.to_dict()}

    @classmethod
    def from_fields(cls, fields: dict[str, object], where: str) -> ArmorSpec:
        read: dict[str, Any] = dict(fields)
        described = read.get(LEAF)
        if described is not None:
            kind = described.get("representation") if isinstance(described, dict) else type(described).__name__
            if kind != SparseSpec.representation:
                raise CheckpointError(f"{where}: {LEAF}={kind!r:.200} is not how the core can be stored")
            read[LEAF] = spec_from_dict(described, f"{where}: {LEAF}")
        return cls(**read)
