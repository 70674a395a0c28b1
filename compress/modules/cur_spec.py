"""A linear as three: weight = columns @ link @ rows, columns [out, rank], link [rank, rank], rows [rank, in].

rows.weight      float [rank, in]     in the dtype of the model
link.weight      float [rank, rank]
columns.weight   float [out, rank]

A factor that a later step compressed stores its own tensors instead, under the same prefix (rows.weight_packed, …), as the
spec in `rows`, `link` or `columns` says.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from compress.errors import CheckpointError
from compress.modules.spec import MAX_FEATURES, ModuleSpec, check_whole, spec_class, spec_from_dict

FACTORS = ("rows", "link", "columns")  # in data order


@dataclass(frozen=True)
class CURSpec(ModuleSpec):
    """Three factors of `rank`. `rows`, `link`, `columns`: how a factor is stored where it is not plain floats."""

    representation: ClassVar[str] = "cur"
    module: ClassVar[str] = "compress.modules.cur:CURLinear"
    rank: int
    rows: ModuleSpec | None = None
    link: ModuleSpec | None = None
    columns: ModuleSpec | None = None

    def leaf_shapes(self) -> dict[str, tuple[int, int]]:
        shapes = ((self.rank, self.in_features), (self.rank, self.rank), (self.out_features, self.rank))
        return dict(zip(FACTORS, shapes, strict=True))

    def with_leaf(self, name: str, spec: ModuleSpec) -> CURSpec:
        assert name in FACTORS, name
        return replace(self, **{name: spec})  # type: ignore[arg-type]

    def factor(self, name: str) -> ModuleSpec | None:
        """How a factor is stored; None: as plain floats."""
        assert name in FACTORS, name
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
        check_whole("rank", self.rank, 1, min(self.in_features, self.out_features))
        for name, shape in self.leaf_shapes().items():
            spec = self.factor(name)
            if spec is None:
                continue
            if set(spec.leaf_shapes()) != {""} or getattr(spec, "kind", "linear") != "linear":
                raise CheckpointError(f"{name}={spec.representation!r} is not how a factor can be stored")
            spec.validate()
            if (spec.out_features, spec.in_features) != shape:
                raise CheckpointError(
                    f"{name} is described as {[spec.out_features, spec.in_features]}, and at rank {self.rank} it is {list(shape)}"
                )

    def to_dict(self) -> dict[str, object]:
        described: dict[str, object] = {"representation": self.representation}
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                described[field.name] = value.to_dict() if isinstance(value, ModuleSpec) else value
        return described

    @classmethod
    def from_fields(cls, fields: dict[str, object], where: str) -> CURSpec:
        read: dict[str, Any] = dict(fields)
        for name in FACTORS:
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
