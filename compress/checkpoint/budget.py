"""How much memory a model may take: "4.2GiB", "900 MB", a number of bytes, or "2.5bits" per weight of its stacked layers.

Counted are the model's tensors. Activations and the cache of keys and values come on top.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from compress.errors import RecipeError

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
BITS = ("BITS", "BIT", "BPW")
_FORM = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]*)")


@dataclass(frozen=True)
class Budget:
    """`nbytes` of all tensors, or `bits` per weight of the stacked layers: one of the two. `text`: as it was given."""

    text: str
    nbytes: int | None = None
    bits: float | None = None


def parse_budget(value: Budget | str | int | float, name: str = "memory_budget") -> Budget:
    """Raises: RecipeError that names the option `name` and shows what works."""
    if isinstance(value, Budget):
        return value
    form = _FORM.fullmatch(str(value).strip()) if not isinstance(value, bool) else None
    number, unit = (float(form[1]), form[2].upper()) if form else (0.0, "?")
    if unit in BITS and number > 0:
        return Budget(str(value), bits=number)
    if unit in UNITS and number > 0:
        return Budget(str(value), nbytes=int(number * UNITS[unit]))
    raise RecipeError(f"{name}={value!r:.40} is no size; give bytes as 4.2GiB or 900MB, or bits per weight as 2.5bits")


def shown(nbytes: int) -> str:
    """Bytes as people read them, with digits enough to be given back as a budget."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= size:
            return f"{nbytes / size:,.2f} {unit}"
    return f"{nbytes:,} bytes"
