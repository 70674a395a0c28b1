"""What runs the quantized linears of models that are loaded, as data. Knows no torch: options and defaults are read from here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal, get_args

from compress.errors import RecipeError

Activations = Literal["int8", "float"]
Kernels = Literal["auto", "reference"]
VARIABLE = "COMPRESS_PACK"  # of the environment; "off": "auto" means the references in torch


@dataclass(frozen=True)
class Choice:
    """What runs quantized linears.

    Args:
        kernels: "auto": native kernels where they were built and the weights are in the memory of the CPU; "reference": torch.
        activations: how inputs enter a native kernel: rounded to "int8", or as "float".
    """

    kernels: Kernels = "auto"
    activations: Activations = "int8"

    def __post_init__(self) -> None:
        for field, known in (("kernels", get_args(Kernels)), ("activations", get_args(Activations))):
            if getattr(self, field) not in known:
                raise RecipeError(f"{field}={getattr(self, field)!r}: choose {' or '.join(known)}")

    @property
    def packs(self) -> bool:
        return self.kernels == "auto" and os.environ.get(VARIABLE, "").lower() != "off"


_chosen: ContextVar[Choice | None] = ContextVar("compress_kernels", default=None)


@contextmanager
def choosing(choice: Choice) -> Iterator[None]:
    """Models that are loaded within it run as `choice` says."""
    token = _chosen.set(choice)
    try:
        yield
    finally:
        _chosen.reset(token)


def chosen() -> Choice:
    """What a model that is loaded now runs on."""
    return _chosen.get() or Choice()
