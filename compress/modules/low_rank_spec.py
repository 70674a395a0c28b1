"""A linear as two thin ones: weight = left @ right, left [out, rank], right [rank, in].

right.weight   float [rank, in]     in the dtype of the model
left.weight    float [out, rank]

A factor that a later step compressed stores its own tensors instead, under the same prefix (right.weight_packed, …), as the
spec in `right` or `left` says.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from compress.errors import CheckpointError
from compress.modules.spec import MAX_FEATURES, ModuleSpec, check_whole, spec_from_dict

FACTORS = ("right", "left")  # in data order


@dataclass(frozen=True)
class LowRankSpec(ModuleSpec):
    """Two factors of `rank`. `right`, `left`: how a factor is stored where it is not plain floats."""

    representation: ClassVar[str] = "low_rank"
    module: ClassVar[str] = "compress.modules.low_rank:LowRankLinear"
    rank: int
    right: ModuleSpec | None = None
    left: ModuleSpec | None = None

    def leaf_shapes(self) -> dict[str, tuple[int, int]]:
        return {"right": (self.rank, self.in_features), "left": (self.out_features, self.rank)}

    def with_leaf(self, name: str, spec: ModuleSpec) -> LowRankSpec:
        assert name in FACTORS, name
        return replace(self, right=spec) if name == "right" else replace(self, left=spec)

    def factor(self, name: str) -> ModuleSpec | None:
        """How factor "right" or "left" is stored; None: as plain floats."""
        return self.right if name == "right" else self.left

    def tensors(self, float_dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name, shape in self.leaf_shapes().items():
            spec = self.factor(name)
            inside = {"weight": (float_dtype, shape)} if spec is None else spec.tensors(float_dtype)
            tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in inside.items()}
        return tensors

    def validate(self) -> None:
        for name in ("in_features", "out_features"):
            check_whole(name, getattr(self, name), 1, MAX_FEATURES)
        check_whole("rank", self.rank, 1, min(self.in_features, self.out_features))
        for name, shape in self.leaf_shapes().items():
            spec = self.factor(name)
            if spec is None:
                continue
            if spec.representation == self.representation or getattr(spec, "kind", "linear") != "linear":
                raise CheckpointError(f"{name}={spec.representation!r} is not how a factor can be stored")
            spec.validate()
            if (spec.out_features, spec.in_features) != shape:
                raise CheckpointError(
                    f"{name} is described as {[spec.out_features, spec.in_features]}, and a factor of rank {self.rank} "
                    f"is {list(shape)}"
                )

    def to_dict(self) -> dict[str, object]:
        described: dict[str, object] = {"representation": self.representation}
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                described[field.name] = value.to_dict() if isinstance(value, ModuleSpec) else value
        return described

    @classmethod
    def from_fields(cls, fields: dict[str, object], where: str) -> LowRankSpec:
        read: dict[str, Any] = dict(fields)
        for name in FACTORS:
            described = read.get(name)
            if described is None:
                continue
            if not isinstance(described, dict) or described.get("representation") == cls.representation:
                kind = "a low_rank module" if isinstance(described, dict) else f"a {type(described).__name__}"
                raise CheckpointError(f"{where}: {name}: {kind} is not how a factor can be stored")
            read[name] = spec_from_dict(described, f"{where}: {name}")
        return cls(**read)
