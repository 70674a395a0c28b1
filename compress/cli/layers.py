"""Layers as rows of a table: one row each, or one for all those of a kind that only differ in a number in their names."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import MISSING, fields
from typing import TypeVar

from compress.checkpoint.names import compact, expand
from compress.modules.spec import ModuleSpec

Kind = TypeVar("Kind", bound=Hashable)


def alike(kinds: Mapping[str, Kind], one_each: bool = False) -> Iterable[tuple[str, Kind, int]]:
    """(name, kind, how many) of layers given by name, in their order. The name of several is a pattern:
    `model.layers.[0-31].mlp.up_proj`."""
    if one_each:
        return [(name, kind, 1) for name, kind in kinds.items()]
    members: dict[Kind, list[str]] = {}
    for name, kind in kinds.items():
        members.setdefault(kind, []).append(name)
    place = {name: i for i, name in enumerate(kinds)}
    rows = []
    for kind, names in members.items():
        for pattern in compact(names):
            covered = list(expand([pattern]))
            rows.append((min(place[name] for name in covered), pattern, kind, len(covered)))
    return [(pattern, kind, count) for _, pattern, kind, count in sorted(rows, key=lambda row: row[0])]


def describe(spec: ModuleSpec) -> str:
    """ "quantized bits=4 group_size=64": the representation, and the settings that are not the usual ones."""
    said = [spec.representation]
    for field in fields(spec):
        value = getattr(spec, field.name)
        usual = field.default is not MISSING and value == field.default
        if isinstance(value, ModuleSpec):
            said.append(f"{field.name}=({describe(value)})")
        elif field.name not in ("in_features", "out_features") and not usual:
            said.append(f"{field.name}={str(value).lower() if isinstance(value, bool) else value}")
    return " ".join(said)
