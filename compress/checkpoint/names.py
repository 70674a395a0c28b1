"""Many module names in few words: `model.layers.[0-95].mlp.experts.[0-127].up_proj` for 12,288 of them.

Names are split at their dots; where names differ only in one number, the numbers are written as a list of ranges.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from itertools import product

from compress.errors import CheckpointError

MAX_NAMES = 1_000_000  # more than any model has modules; a stranger's config must not make us expand more

Part = str | frozenset[int]  # of a name: a word, or the numbers that may stand there
_RANGES = re.compile(r"\[(\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*)\]")


def compact(names: Collection[str]) -> list[str]:
    """Patterns that `expand` turns back into exactly `names`, in an order that depends on the names only."""
    return sorted(".".join(part if isinstance(part, str) else _ranges(part) for part in key) for key in _merged(names))


def expand(patterns: Iterable[object]) -> Iterator[str]:
    """The names that patterns of `compact` stand for. Raises: CheckpointError if one is none, or they are too many."""
    total = 0
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise CheckpointError(f"{pattern!r} is no name of a module")
        choices = []
        size = 1
        for part in pattern.split("."):
            numbers = _numbers(part) if part.startswith("[") else [part]
            size *= len(numbers)
            choices.append(numbers)
        total += size
        if total > MAX_NAMES:
            raise CheckpointError(f"{pattern!r} stands for more than {MAX_NAMES:,} modules")
        for parts in product(*choices):
            yield ".".join(map(str, parts))


def expressions(names: Collection[str], among: Collection[str]) -> list[str]:
    """Regular expressions that match `names` from start to end, and no other name of `among`.

    Where "any number" matches no other name, the expression says that.
    """
    found = []
    others = set(among) - set(names)
    for key in _merged(names):
        parts = [re.escape(p) if isinstance(p, str) else f"(?:{'|'.join(map(str, sorted(p)))})" for p in key]
        for position, part in enumerate(key):
            if isinstance(part, frozenset):
                exact, parts[position] = parts[position], r"\d+" if len(part) > 1 else str(min(part))
                fits = re.compile(r"\.".join(parts) + "$")
                if len(part) > 1 and any(fits.match(name) for name in others):
                    parts[position] = exact
        found.append(r"\.".join(parts) + "$")
    return sorted(found)


def owner(tensor: str, modules: Collection[str]) -> str | None:
    """The one among `modules` that a tensor belongs to, directly or through a leaf of it; None if there is none."""
    name = tensor
    while name := name.rpartition(".")[0]:
        if name in modules:
            return name
    return None


def _merged(names: Collection[str]) -> list[tuple[Part, ...]]:
    keys: set[tuple[Part, ...]] = {
        tuple(frozenset([int(part)]) if _is_number(part) else part for part in name.split(".")) for name in names
    }
    for position in reversed(range(max((len(key) for key in keys), default=0))):
        rest: dict[tuple[Part, ...], set[int]] = {}
        merged: set[tuple[Part, ...]] = set()
        for key in keys:
            numbers = key[position] if position < len(key) else ""
            if isinstance(numbers, str):
                merged.add(key)
            else:
                rest.setdefault((*key[:position], "", *key[position + 1 :]), set()).update(numbers)
        for key, found in rest.items():
            merged.add((*key[:position], frozenset(found), *key[position + 1 :]))
        keys = merged
    return list(keys)


def _is_number(part: str) -> bool:
    return part.isdecimal() and part.isascii() and str(int(part)) == part


def _ranges(numbers: frozenset[int]) -> str:
    ordered = sorted(numbers)
    starts = [n for n in ordered if n - 1 not in numbers]
    ends = [n for n in ordered if n + 1 not in numbers]
    if len(ordered) == 1:
        return str(ordered[0])
    return "[" + ",".join(f"{a}-{b}" if a != b else f"{a}" for a, b in zip(starts, ends, strict=True)) + "]"


def _numbers(part: str) -> list[int]:
    if len(part) > 100_000 or not _RANGES.fullmatch(part):
        raise CheckpointError(f"{part[:100]!r} is no list of numbers such as [0-31] or [0,2-5]")
    numbers: list[int] = []
    for piece in part[1:-1].split(","):
        low, _, high = piece.partition("-")
        first, last = int(low), int(high or low)
        if last - first >= MAX_NAMES or len(numbers) > MAX_NAMES:
            raise CheckpointError(f"{part[:100]!r} stands for more than {MAX_NAMES:,} numbers")
        numbers += range(first, last + 1)
    return numbers
