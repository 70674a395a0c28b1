"""Truncating the singular value decomposition of a matrix at a real position, and the gradient through it.

    Y = U diag(s) V^T,    Y' = U diag(t s) V^T,    t_i = (1 + tanh(beta (position - i))) / 2,    i = 1, 2, ...

The gate t is 1 well before `position`, 0 well behind, 1/2 at it. What is wanted is dL/dY and dL/dposition from G = dL/dY'.

The gradient of a singular value decomposition, with F_ij = 1 / (s_j^2 - s_i^2), grows beyond all bounds where two values
come close. Most of that cancels here. On the smaller side, say V [n, n] of n <= rows (else all of it for Y^T):

    Y' = Y P,    P = V diag(t) V^T,    dP = V (E o V^T d(Y^T Y) V) V^T,    E_ij = (t_i - t_j) / (s_i^2 - s_j^2)

    dL/dY = G P + Y V (B + B^T) V^T,    B = E o N,    N = V^T Y^T G V
    dL/dposition = sum_i N_ii dt_i/dposition

A pair of equal gates contributes nothing, however close its values: only pairs across the position have a gap to divide by.
Nothing is divided by a single s_i, and U is not needed. Where all gates are open, dL/dY = G exactly.

`inverse_gap` bounds what remains. With a >= b the two values and r = b / a, 1 / (a^2 - b^2) = (1 + r^2 + r^4 + ...) / a^2.
Where 1 - r^2 < 1 / (K + 1) the series stops after K + 1 terms:

    (1 - r^(2 (K + 1))) / (1 - r^2) / a^2, at most (K + 1) / a^2, which it is for a = b         K = 10

The published code stops it where a - b <= 1e-10, which in float32 is never but at ties; it is a relative gap that is close.
Values below FLOOR times the first count as that: two of them are a tie.

V and s^2 are eigenvectors and eigenvalues of Y^T Y in float64, as exact as a float32 decomposition of Y.

Source: Dobi-SVD, Wang et al., 2025, arXiv:2502.02723; the contraction with the gate is ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compress.errors import NumericsError

TERMS = 10  # K of the paper: the series has one more
FLOOR = 1e-10  # of the first singular value


def gate(position: Tensor, n: int, beta: float) -> Tensor:
    """t [n], falling from 1 to 0 around `position` (a scalar), in its dtype."""
    index = torch.arange(1, n + 1, dtype=position.dtype, device=position.device)
    return 0.5 * torch.tanh(beta * (position - index)) + 0.5


def inverse_gap(values: Tensor, terms: int = TERMS) -> Tensor:
    """1 / |s_i^2 - s_j^2| [n, n], bounded by (terms + 1) / max(s_i, s_j)^2; 0 on the diagonal.

    Args:
        values: s [n], falling, not negative.
    """
    if not len(values) or values[0] <= 0:
        return values.new_zeros(len(values), len(values))
    values = values.clamp(min=FLOOR * float(values[0]))
    larger = torch.maximum(values[:, None], values)
    ratio = (torch.minimum(values[:, None], values) / larger).square()  # r^2
    gap = 1 - ratio
    n_terms = terms + 1
    close = gap < 1 / n_terms
    safe = torch.where(gap > 0, gap, 1.0)
    series = torch.where(gap > 0, -torch.expm1(n_terms * torch.log1p(-safe)) / safe, float(n_terms))
    exact = 1 / ((larger - torch.minimum(values[:, None], values)) * (larger + torch.minimum(values[:, None], values)))
    found = torch.where(close, series / larger.square(), exact)
    return found.fill_diagonal_(0)


class _Truncation(torch.autograd.Function):
    """Y [tokens, n], position [] -> Y', as above."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, position: Tensor, beta: float, terms: int) -> Tensor:
        wide = matrix.shape[0] < matrix.shape[1]
        rows = matrix.T if wide else matrix
        double = rows.double()
        energies, vectors = _eigen(double.T @ double)
        gates = gate(position.double(), len(energies), beta)
        truncated = rows @ ((vectors * gates) @ vectors.T).to(rows.dtype)
        ctx.save_for_backward(matrix, position, energies, vectors)
        ctx.wide, ctx.beta, ctx.terms = wide, beta, terms
        return truncated.T if wide else truncated

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # type: ignore[override]
        matrix, position, energies, vectors = ctx.saved_tensors
        rows, back = (matrix.T, gradient.T) if ctx.wide else (matrix, gradient)
        gates = gate(position.double(), len(energies), ctx.beta)
        mixed = vectors.T @ (rows.T @ back).double() @ vectors  # N
        slope = 2 * ctx.beta * gates * (1 - gates)  # dt/dposition: beta / 2 sech^2
        to_position = (mixed.diagonal() * slope).sum().to(position.dtype)
        if not ctx.needs_input_grad[0]:
            return None, to_position, None, None
        across = (gates[:, None] - gates).abs() * inverse_gap(energies.sqrt(), ctx.terms)  # E: both factors fall with i
        mixed = across * mixed
        through = (vectors * gates) @ vectors.T, vectors @ (mixed + mixed.T) @ vectors.T
        to_rows = back @ through[0].to(rows.dtype) + rows @ through[1].to(rows.dtype)
        return (to_rows.T if ctx.wide else to_rows), to_position, None, None


def truncate(matrix: Tensor, position: Tensor, beta: float, terms: int = TERMS) -> Tensor:
    """Y' of `matrix` Y [tokens, n] at `position` (a scalar tensor), differentiable in both.

    Raises: NumericsError if Y is not finite, or LAPACK finds no decomposition.
    """
    if matrix.numel() == 0:
        return matrix
    return _Truncation.apply(matrix, position, beta, terms)


def _eigen(square: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, falling and not negative, and eigenvectors."""
    if not torch.isfinite(square).all():
        raise NumericsError("the outputs hold NaN or infinity")
    try:
        values, vectors = torch.linalg.eigh(square)
    except torch.linalg.LinAlgError as error:
        raise NumericsError(f"the singular values of the outputs: {' '.join(str(error).split())}") from None
    return values.flip(0).clamp(min=0), vectors.flip(1)
