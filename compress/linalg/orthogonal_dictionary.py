"""A dictionary of orthonormal atoms: A A^T = I, the codes that go with it exact.

    minimise  |Y - C A|_F^2  over A [k, d], A A^T = I, and C [n, k] with s entries per row,   k <= d

    given A     C keeps the s largest |entries| of each row of Y A^T; the error is |Y|^2 - |C|^2
    given C     A is the orthonormal matrix nearest to C^T Y (Procrustes): C^T Y = U Sigma V^T, A = U V^T

one after the other, from the first k principal directions of Y. Neither raises the error. The support of C settles slowly, so the
dictionary is fitted to C + (C - C_before) in place of C: ten rounds so come further than forty without, at no cost. A round that
raised the error is followed by one without. The A of the least error is returned, its codes computed for it.

The nearest orthonormal matrix is (B B^T)^(-1/2) B, B = C^T Y: eigenvectors of a k x k matrix in float64 in place of singular
vectors of a k x d one, a third of the time. What is lost by squaring is won back by steps of A <- (3 A - A A^T A) / 2.

Source: COMPOT's description of the method; extrapolation is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SINGULAR = 1e-13  # of the largest eigenvalue of B B^T: below it, a direction is not told by the square
ORTHONORMAL = 1e-5  # largest entry of A A^T - I; rounding of float32 products is a tenth of it
SETTLED = 1e-4  # a round that lowers the error by less than this share of it is the last


@dataclass(frozen=True)
class Learned:
    """`atoms` A [k, d], `codes` C [n, k]; `errors`: of every round, as a fraction of |Y|^2, the last that of the result."""

    atoms: Tensor
    codes: Tensor
    errors: list[float]


def orthogonal_dictionary(
    targets: Tensor, n_atoms: int, n_kept: int, n_rounds: int, tell: Callable[[int, float], None] | None = None
) -> Learned:
    """Learn A and C for `targets` Y [n, d], float32 or float64: k = `n_atoms` <= d, s = `n_kept` <= k.

    Args:
        n_rounds: at most; it ends where a round gains next to nothing.
        tell: takes rounds done and the error.
    """
    total = float(targets.double().square().sum())
    if total == 0:
        atoms = torch.eye(n_atoms, targets.shape[1], dtype=targets.dtype, device=targets.device)
        return Learned(atoms, targets.new_zeros(len(targets), n_atoms), [0.0])
    atoms = principal_directions(targets, n_atoms)
    errors: list[float] = []
    best, best_error, before = atoms, float("inf"), None
    for done in range(n_rounds + 1):
        codes = largest(targets @ atoms.T, n_kept)
        errors.append(max(1 - float(codes.double().square().sum()) / total, 0.0))
        if tell is not None:
            tell(done, errors[-1])
        rose = errors[-1] >= best_error
        gained = best_error - errors[-1]
        if not rose:
            best, best_error = atoms, errors[-1]
        if done == n_rounds or 0 <= gained < SETTLED * best_error or best_error <= torch.finfo(targets.dtype).eps:
            break
        aim = codes if before is None or rose else 2 * codes - before
        before = None if rose else codes
        atoms = nearest_orthonormal(aim.T @ targets)
    atoms = polished(best)
    codes = largest(targets @ atoms.T, n_kept)
    return Learned(atoms, codes, [*errors, max(1 - float(codes.double().square().sum()) / total, 0.0)])


def largest(values: Tensor, n: int) -> Tensor:
    """`values` [rows, k] with all but the `n` largest in size of each row set to 0."""
    if n >= values.shape[1]:
        return values
    kept = values.abs().topk(n, dim=1, sorted=False).indices
    return torch.zeros_like(values).scatter_(1, kept, values.gather(1, kept))


def principal_directions(targets: Tensor, n: int) -> Tensor:
    """The first `n` right singular vectors of `targets` Y [rows, d] as rows [n, d]; n <= d. Where Y has fewer, any others."""
    n_rows, d = targets.shape
    square = targets.T @ targets if d <= n_rows else targets @ targets.T
    values, vectors = torch.linalg.eigh(square)  # a start: in float32 if that is what there is
    if d <= n_rows:
        return vectors.T.flip(0)[:n].contiguous()
    sizes = values.flip(0).clamp(min=0).sqrt()  # [rows], falling
    rows = vectors.T.flip(0)[:n] @ targets / sizes[:n, None].clamp(min=1e-30)
    filled = targets.new_zeros(n, d)
    filled[: len(rows)] = rows
    reached = int((sizes[:n] > torch.finfo(targets.dtype).eps ** 0.5 * 10 * sizes[0]).sum())
    if reached == n:
        return polished(filled)
    return torch.linalg.qr(torch.cat([filled[:reached].T, torch.eye(d).to(filled)], dim=1)).Q[:, :n].T.contiguous()


def nearest_orthonormal(matrix: Tensor) -> Tensor:
    """U V^T of B = U Sigma V^T [k, d], k <= d: the matrix of orthonormal rows nearest to B."""
    wide = matrix.double()
    values, vectors = torch.linalg.eigh(wide @ wide.T)
    if float(values[0]) <= SINGULAR * float(values[-1]):
        left, _, right = torch.linalg.svd(wide, full_matrices=False)
        return (left @ right).to(matrix.dtype)
    root = (vectors * values.rsqrt()) @ vectors.T
    return root.to(matrix.dtype) @ matrix


def polished(atoms: Tensor) -> Tensor:
    """Orthonormal rows, from almost orthonormal ones, by Newton-Schulz steps."""
    identity = torch.eye(len(atoms), dtype=atoms.dtype, device=atoms.device)
    for _ in range(4):
        square = atoms @ atoms.T
        if float((square - identity).abs().max()) <= ORTHONORMAL:
            break
        atoms = 1.5 * atoms - 0.5 * (square @ atoms)
    return atoms
