"""Matrices that change the basis of row vectors, as objects that know a fast product.

    x -> x R  (`times`),   x -> x R^T  (`times_transposed`),   R [n_in, n_out]

R^T R = I where nothing is cut off: a Hadamard matrix with random signs, diag(signs) H; or any matrix in full. A dense one may
have fewer columns than rows (a projection onto the first directions of a basis). Products are float64, for one rounding at the
end by who stores the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from compress.linalg.hadamard import transformed


class Rotation(Protocol):
    """R [n_in, n_out] as a map of row vectors."""

    def times(self, x: Tensor) -> Tensor:
        """x R, for x [..., n_in] of any float dtype; [..., n_out], float64."""

    def times_transposed(self, x: Tensor) -> Tensor:
        """x R^T, for x [..., n_out]; [..., n_in], float64."""


@dataclass(frozen=True, eq=False)
class HadamardRotation:
    """diag(signs) H [n, n].

    Attributes:
        block_size: of the diagonal blocks of H; `hadamard_orders.factors` knows it.
        signs: [n] of +-1, or None for H itself.
    """

    block_size: int
    signs: Tensor | None = None

    def times(self, x: Tensor) -> Tensor:
        x = x.double()
        return transformed(x if self.signs is None else x * self.signs.to(x), self.block_size)

    def times_transposed(self, x: Tensor) -> Tensor:
        x = transformed(x.double(), self.block_size, transposed=True)
        return x if self.signs is None else x * self.signs.to(x)


@dataclass(frozen=True, eq=False)
class DenseRotation:
    """A matrix [n_in, n_out]. What makes it a change of basis is for who made it to know."""

    matrix: Tensor

    def times(self, x: Tensor) -> Tensor:
        return x.double() @ self.matrix.to(x.device, torch.float64)

    def times_transposed(self, x: Tensor) -> Tensor:
        return x.double() @ self.matrix.to(x.device, torch.float64).T
