"""Matrices that change the basis of row vectors, as objects that know a fast product.

    x -> x R  (`times`),   x -> x R^T  (`times_transposed`),   R [n_in, n_out]

R^T R = I where nothing is cut off: a Hadamard matrix with random signs, diag(signs) H; or any matrix in full. A dense
one may have fewer columns than rows (a projection onto the first directions of a basis). Products are float64, for one
rounding at the end by who stores the result.

LayerNorm subtracts the mean over entries, and the mean of x R is another one. Unless R leaves e = (1, ..., 1) / sqrt(n)
where it is, e R = e: then (x - mean) R is x R less its own mean, and LayerNorm(x R) = LayerNorm(x) R. `MeanKeeping`
makes such an R of any R0, by a reflection P that takes e R0 back to e:

    R = R0 P,   P = I - 2 v v^T / |v|^2,   v = e R0 - e
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from compress.linalg.exact import exact_product, fixed_point
from compress.linalg.hadamard import transformed

ROW_BITS = 38  # of a row, in `times_rows` of a Hadamard matrix: sums of 2^15 of them stay within the 53 of a float64
ALREADY = 1e-12  # |e R0 - e| below which R0 keeps the mean itself, but for rounding


class Rotation(Protocol):
    """R [n_in, n_out] as a map of row vectors. `width`: n_out."""

    @property
    def width(self) -> int: ...

    def times(self, x: Tensor) -> Tensor:
        """x R, for x [..., n_in] of any float dtype; [..., n_out], float64."""

    def times_rows(self, x: Tensor) -> Tensor:
        """x R; a row of it is the same to the last bit whatever other rows x has (`compress/linalg/exact.py`)."""

    def times_transposed(self, x: Tensor) -> Tensor:
        """x R^T, for x [..., n_out]; [..., n_in], float64."""


@dataclass(frozen=True, eq=False)
class HadamardRotation:
    """diag(signs) H [n, n].

    Attributes:
        width: n.
        block_size: of the diagonal blocks of H; `hadamard_orders.factors` knows it.
        signs: [n] of +-1, or None for H itself.
    """

    width: int
    block_size: int
    signs: Tensor | None = None

    def times(self, x: Tensor) -> Tensor:
        x = x.double()
        return transformed(x if self.signs is None else x * self.signs.to(x), self.block_size)

    def times_rows(self, x: Tensor) -> Tensor:
        return self.times(fixed_point(x.double(), ROW_BITS))  # sums of such numbers are exact

    def times_transposed(self, x: Tensor) -> Tensor:
        x = transformed(x.double(), self.block_size, transposed=True)
        return x if self.signs is None else x * self.signs.to(x)


@dataclass(frozen=True, eq=False)
class DenseRotation:
    """A matrix [n_in, n_out]. What makes it a change of basis is for who made it to know."""

    matrix: Tensor

    @property
    def width(self) -> int:
        return self.matrix.shape[1]

    def times(self, x: Tensor) -> Tensor:
        return x.double() @ self.matrix.to(x.device, torch.float64)

    def times_rows(self, x: Tensor) -> Tensor:
        return exact_product(x, self.matrix.to(x.device))

    def times_transposed(self, x: Tensor) -> Tensor:
        return x.double() @ self.matrix.to(x.device, torch.float64).T


@dataclass(eq=False)
class Deferred:
    """A rotation that is made when it is first used: what is planned need not be computed."""

    width: int
    make: Callable[[], Rotation] = field(repr=False)

    @cached_property
    def made(self) -> Rotation:
        return self.make()

    def times(self, x: Tensor) -> Tensor:
        return self.made.times(x)

    def times_rows(self, x: Tensor) -> Tensor:
        return self.made.times_rows(x)

    def times_transposed(self, x: Tensor) -> Tensor:
        return self.made.times_transposed(x)


@dataclass(eq=False)
class MeanKeeping:
    """R = R0 P with e R = e: x R has the mean of x. R0 square and orthogonal."""

    base: Rotation

    @property
    def width(self) -> int:
        return self.base.width

    @cached_property
    def mirror(self) -> Tensor:
        """v / |v| [n], or 0 where R0 keeps the mean already."""
        even = torch.full((self.width,), 1 / math.sqrt(self.width), dtype=torch.float64)
        v = self.base.times(even) - even
        length = v.norm()
        return v / length if length > ALREADY else torch.zeros_like(v)

    def times(self, x: Tensor) -> Tensor:
        return self._reflected(self.base.times(x))

    def times_rows(self, x: Tensor) -> Tensor:
        x = self.base.times_rows(x)
        mirror = self.mirror.to(x.device)
        return x - 2 * exact_product(x, mirror.unsqueeze(-1)) * mirror

    def times_transposed(self, x: Tensor) -> Tensor:
        return self.base.times_transposed(self._reflected(x.double()))

    def _reflected(self, x: Tensor) -> Tensor:
        mirror = self.mirror.to(x.device)
        return x - 2 * (x @ mirror).unsqueeze(-1) * mirror
