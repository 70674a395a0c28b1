"""Which layers a step applies to: patterns on the names on disk.

    model.layers.3.mlp.down_proj    that layer
    *.down_proj                     a glob: * any run of characters, dots included; ? one; [0-3] one of these
    re:.*\\.(q|k|v)_proj             a regular expression

Either kind must match the *whole* name. Layers outside the decoder blocks (the head, the embeddings) are reached only
by a pattern that spells out the last part of their name, such as `lm_head`: `*` alone never takes them.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence
from fnmatch import translate
from functools import lru_cache

from compress.errors import RecipeError

REGEX = "re:"
N_SHOWN = 8  # kinds of layer that an error lists


@lru_cache(maxsize=1024)
def compiled(pattern: str) -> re.Pattern[str]:
    """The expression for whole names. Raises: RecipeError if `pattern` is empty or no regular expression."""
    if not pattern.removeprefix(REGEX).strip():
        raise RecipeError(
            f"pattern {pattern!r} is empty; use a name, a glob such as '*.down_proj', or 're:' and an expression"
        )
    try:
        return re.compile(pattern[len(REGEX) :] if pattern.startswith(REGEX) else translate(pattern))
    except re.error as error:
        raise RecipeError(f"pattern {pattern!r} is not a regular expression: {error}") from None


def matches(pattern: str, name: str) -> bool:
    """Whether `pattern` matches the whole of `name`."""
    return compiled(pattern).fullmatch(name) is not None


def select(
    names: Sequence[str],
    layers: Sequence[str] | None,
    skip: Sequence[str] = (),
    *,
    outside: Collection[str] = (),
    where: str = "steps",
) -> list[str]:
    """The names that match one of `layers` and none of `skip`, in the order of `names`.

    Args:
        names: every layer that could be asked for, those of `outside` included.
        layers: patterns; None means all but `outside`.
        skip: patterns of names to leave out again.
        outside: names that only a pattern spelling out their last part reaches.
        where: the step, for errors.

    Raises: RecipeError naming the nearest layers for a pattern that matches none.
    """
    beyond = set(outside)
    if layers is None:
        chosen = {name for name in names if name not in beyond}
    else:
        chosen = set().union(*(_matching(p, names, beyond, f"{where}.layers") for p in layers))
    dropped = set().union(*(_matching(p, names, frozenset(), f"{where}.skip") for p in skip))
    return [name for name in names if name in chosen and name not in dropped]


def require_match(pattern: str, names: Sequence[str], where: str) -> None:
    """Raises: RecipeError naming the nearest layers if `pattern` matches none of `names`."""
    if not any(matches(pattern, name) for name in names):
        raise RecipeError(f"{where}: {pattern!r} matches none of the {len(names)} layers{_hint(pattern, names)}")


def _matching(pattern: str, names: Sequence[str], beyond: Collection[str], where: str) -> set[str]:
    require_match(pattern, names, where)
    found = {n for n in names if matches(pattern, n) and (n not in beyond or n.rpartition(".")[2] in pattern)}
    if not found:
        only = next(name for name in names if matches(pattern, name))
        raise RecipeError(f"{where}: {pattern!r} matches {only} only, which must be named: use {only!r}")
    return found


def _hint(pattern: str, names: Sequence[str]) -> str:
    """The nearest name of a kind (names that differ in numbers only are one kind), or the kinds there are."""
    kinds = list(dict.fromkeys(re.sub(r"\d+", "*", name) for name in names))
    ends = list(dict.fromkeys("*." + kind.rpartition(".")[2] if "." in kind else kind for kind in kinds))
    if not pattern.startswith(REGEX):
        near = difflib.get_close_matches(pattern, ends, n=1, cutoff=0.7) or difflib.get_close_matches(
            re.sub(r"\d+", "*", pattern), kinds, n=1, cutoff=0.6
        )
        if near:
            return f"; did you mean {near[0]!r}?"
    shown = ", ".join(kinds[:N_SHOWN]) + (", …" if len(kinds) > N_SHOWN else "")
    return f"; a pattern must match the whole name: {shown}"
