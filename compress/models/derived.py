"""A tensor of a rewritten model as a function of tensors of the model before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Derived:
    """One tensor of the result.

    Attributes:
        shape: of it.
        inputs: tensors of the source by name, which `make` is called with, as they are stored.
        make: gives the tensor, in any float dtype; it is rounded once, to the dtype in which the result is stored.
        by_rows: whether its rows i:j depend on rows i:j of the first input (of as many rows) and on the other inputs as a
            whole: tables of a vocabulary are then made piece by piece.
    """

    shape: tuple[int, ...]
    inputs: tuple[str, ...]
    make: Callable[..., Tensor]
    by_rows: bool = False
