"""What is common to representations that are a product of factors, each of them a leaf.

A factor NAME is stored as NAME.weight in floats; or, once a later step compressed it, as that step's tensors under the same
prefix (NAME.weight_packed, …), as the spec in the field NAME says. `factors` are in data order.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from compress.errors import CheckpointError
from compress.modules.spec import MAX_FEATURES, ModuleSpec, check_whole, spec_class, spec_from_dict


@dataclass(frozen=True)
class FactoredSpec(ModuleSpec):
    """Factors of `rank`. Subclasses name them in `factors`, have a field for each, and give `leaf_shapes`."""

    factors: ClassVar[tuple[str, ...]]
    rank: int

    @property
    def most(self) -> int:
        """What `rank` can be."""
        return min(self.in_features, self.out_features)

    def with_leaf(self, name: str, spec: ModuleSpec) -> FactoredSpec:
        inside = self.factor(name)
        changed = spec if inside is None else inside.with_leaf("", spec)
        return replace(self, **{name: changed})  # type: ignore[arg-type]

    def masked_leaves(self) -> frozenset[str]:
        inside = {name: self.factor(name) for name in self.factors}
        return frozenset(name for name, spec in inside.items() if spec is not None and "" in spec.masked_leaves())

    def factor_shapes(self) -> dict[str, tuple[int, int]]:
        """All factors; those that another module stores are no leaves of this one."""
        return self.leaf_shapes()

    def factor(self, name: str) -> ModuleSpec | None:
        """How a factor is stored; None: as plain floats."""
        assert name in self.factors, name
        found: ModuleSpec | None = getattr(self, name)
        return found

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
        check_whole("rank", self.rank, 1, self.most)
        for name, shape in self.factor_shapes().items():
            spec = self.factor(name)
            if spec is None:
                continue
            if set(spec.leaf_shapes()) != {""} or getattr(spec, "kind", "linear") != "linear":
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
    def from_fields(cls, fields: dict[str, object], where: str) -> FactoredSpec:
        read: dict[str, Any] = dict(fields)
        for name in cls.factors:
            described = read.get(name)
            if described is None:
                continue
            kind = described.get("representation") if isinstance(described, dict) else type(described).__name__
            if not isinstance(described, dict) or _has_leaves(kind):
                raise CheckpointError(f"{where}: {name}={kind!r} is not how a factor can be stored")
            read[name] = spec_from_dict(described, f"{where}: {name}")
        return cls(**read)


def _has_leaves(representation: object) -> bool:
    """Whether it is made of factors itself. Those are not stored inside a factor, however deep a description goes."""
    found = spec_class(representation) if isinstance(representation, str) else None
    return found is not None and found.leaf_shapes is not ModuleSpec.leaf_shapes
