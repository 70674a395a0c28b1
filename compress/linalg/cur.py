"""A weight as some of its own columns, some of its own rows, and a small matrix that links them.

    W ~ C U R,   C = W[:, J] [out, r],   R = W[I, :] [r, in],   U [r, r]

Which rows and columns. From a matrix M of the shape of W whose size is that of the outputs: W D, D the size of each input. Let
P [out, r] and Q [in, r] be its first left and right singular vectors. DEIM takes from each, one after the other, the index at
which the next vector is worst interpolated by the ones before:

    p_1 = argmax |P[:, 1]|;   p_j = argmax |P[:, j] - P[:, :j-1] c|,   P[p, :j-1] c = P[p, j]

which is Gaussian elimination with partial pivoting: the p_j are the pivot rows of the LU decomposition of P, in order. So
they are distinct, and those for a smaller rank are the first of those for a larger one. The spectral norm of what the best U
leaves is at most (|P[p]^-1| + |Q[q]^-1|) sigma_{r+1}. The other choice needs no singular vectors: the pivots of a QR
decomposition of M, for columns, and of M^T, for rows. Neither asks what is left of the outputs. Greedy selection does: the next
column is the one with which the span of those chosen holds most of W S (S S^T = H), the next row likewise.

The link. For inputs with second moment H = sum_t x_t x_t^T, H = S S^T,

    minimise |(W - C U R) S|_F^2 + f |.|^2:   U = C^+ (W S) (R S)^+   for f = 0

Columns and rows that are nearly dependent give huge entries in U that cancel each other, and cancel badly once they are
rounded to the dtype in which they are stored. That is part of what is minimised: with columns of C and rows of R S scaled to
length 1, and a mean squared relative rounding error f of U, of R x and of U R x, the error expected of the outputs is

    |W S - C U R S|^2 + f (|U|^2 + |C U|^2 + |U R S|^2)

In the singular vectors of C and R S, sigma_i and tau_j their singular values, each entry of U stands alone:

    U_ij = sigma_i tau_j (W S)_ij / (sigma_i^2 tau_j^2 + f (1 + sigma_i^2 + tau_j^2))

so that float32 loses nothing to it, and bfloat16 gains. H is not factored: tau_j^2 are the eigenvalues of R H R^T.

Everything is float64. H is a matrix; or a vector, the diagonal of one; or None, the identity.

Sources: Sorensen and Embree, 2016, SIAM J. Sci. Comput. 38(3) (DEIM, its bound); Farahat, Ghodsi and Kamel, 2013,
arXiv:1312.6838 (greedy); Park and Moon, 2025, arXiv:2501.04211 (CURing).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from compress.errors import NumericsError
from compress.linalg.low_rank import GRAM_FLOOR, gram, smaller_side
from compress.linalg.ranks import rounded_rank

NULL = 1e-12  # of the largest singular value: below it, a direction is not there


# ---- how many


def size(out_features: int, in_features: int, rank: int) -> int:
    """Numbers in C, U and R."""
    return rank * (out_features + in_features + rank)


def rank_within(out_features: int, in_features: int, numbers: int) -> int:
    """The largest rank at which C, U and R hold at most `numbers`; 0 if none does."""
    both = out_features + in_features
    return max((math.isqrt(both * both + 4 * numbers) - both) // 2, 0)


def break_even_rank(out_features: int, in_features: int) -> int:
    """The largest rank at which C, U and R are smaller than W, below (sqrt(m^2 + 6 m n + n^2) - (m + n)) / 2; 0 if none is."""
    return rank_within(out_features, in_features, out_features * in_features - 1)


def uniform_rank(out_features: int, in_features: int, keep_ratio: float, multiple: int = 1) -> int:
    """The largest rank that holds at most `keep_ratio` of the layer's numbers, down to a multiple, at least that."""
    numbers = int(Fraction(str(keep_ratio)) * out_features * in_features)  # as written: 0.29 * 100 is 29
    return rounded_rank(rank_within(out_features, in_features, numbers), multiple)


# ---- which


def deim(vectors: Tensor) -> Tensor:
    """The rows of `vectors` [n, r], r <= n, that DEIM takes, in order: int64 [r], distinct."""
    _, pivots, _ = torch.linalg.lu_factor_ex(vectors.double())
    order = list(range(len(vectors)))
    for j, pivot in enumerate(pivots.tolist()):  # LAPACK: row j was exchanged with row pivot - 1
        order[j], order[pivot - 1] = order[pivot - 1], order[j]
    return torch.tensor(order[: vectors.shape[1]], device=vectors.device)


def pivoted(matrix: Tensor, rank: int) -> Tensor:
    """The first `rank` pivot columns of the QR decomposition of `matrix` [m, n], in order: int64 [rank], distinct.

    The next is the column that sticks out furthest of the span of those before. Only the row of R that belongs to each is
    computed: what is left of the squared lengths is what Gram-Schmidt would leave.
    """
    matrix = matrix.double()
    left = matrix.square().sum(0)  # squared length of what is left of each column
    rows = torch.zeros(rank, matrix.shape[1], dtype=matrix.dtype, device=matrix.device)  # R
    taken = torch.zeros(rank, dtype=torch.int64, device=matrix.device)
    for k in range(rank):
        p = left.argmax()
        taken[k] = p
        if left[p] > 0:
            rows[k] = (matrix[:, p] @ matrix - rows[:k, p] @ rows[:k]) / left[p].sqrt()
            left = (left - rows[k].square()).clamp_(min=0)
        left[taken[: k + 1]] = -1.0
    return taken


def singular_vectors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The first `rank` left [m, rank] and right [n, rank] singular vectors, float64.

    From the eigenvectors of the smaller Gram matrix, unless `rank` reaches down to where squaring has cost too many digits.
    """
    matrix = matrix.double()
    wide = matrix.shape[0] <= matrix.shape[1]
    flat = matrix if wide else matrix.T
    values, vectors = _eigen(flat @ flat.T)
    if values[rank - 1] > GRAM_FLOOR * values[0]:
        near = vectors[:, :rank]
        far = flat.T @ near / values[:rank].sqrt()
    else:
        try:
            near, _, far = torch.linalg.svd(flat, full_matrices=False)
        except torch.linalg.LinAlgError as error:
            raise NumericsError(f"the singular vectors of the selection matrix: {_one_line(error)}") from None
        near, far = near[:, :rank], far[:rank].T
    return (near, far) if wide else (far, near)


def select(for_rows: Tensor, for_columns: Tensor, rank: int, how: Literal["deim", "qr"]) -> tuple[Tensor, Tensor]:
    """Rows and columns to keep, in the order in which they were chosen: int64 [rank] each.

    Args:
        for_rows, for_columns: the M in which each are looked for, usually one; as many rows, or columns, as W.

    Raises: NumericsError if LAPACK finds no singular vectors.
    """
    if how == "qr":
        return pivoted(for_rows.T, rank), pivoted(for_columns, rank)
    left, right = singular_vectors(for_rows, rank)
    if for_columns is not for_rows:
        _, right = singular_vectors(for_columns, rank)
    return deim(left), deim(right)


def select_greedily(weight: Tensor, moment: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of W = `weight` to keep, by what they leave of W S: int64 [rank] each, in the order chosen.

    W S = B sqrt(E) V^T, with B E B^T = W H W^T the eigenvectors of the smaller side. V turns no length, so S is not needed:
    rows of B sqrt(E) stand for those of W S, columns of B^T W for those of W, and what either shall hold is sqrt(E).

    Raises: NumericsError if LAPACK finds no eigenvectors.
    """
    weight = weight.double()
    core, outer = smaller_side(weight)
    energies, vectors = _eigen(gram(core, moment))
    energies = energies.clamp(min=0)
    rows = vectors * energies.sqrt()
    return _greedy(rows if outer is None else outer @ rows, energies, rank), _greedy(core.T @ vectors, energies, rank)


def _greedy(candidates: Tensor, energies: Tensor, rank: int) -> Tensor:
    """The `rank` of n `candidates` c_j [n, d], one after the other, with which their span holds most of diag(E)^(1/2).

    That is the one with the largest c'^T E c' / |c'|^2, c' = c - Q Q^T c what the span so far leaves of a candidate, Q its basis.
    Both are kept up to date for all candidates by their products with the next q and with (I - Q Q^T) E q.
    """
    squares = candidates.square().sum(1)
    held = (candidates.square() * energies).sum(1)
    basis = torch.zeros(rank, candidates.shape[1], dtype=candidates.dtype, device=candidates.device)  # Q^T
    taken = torch.zeros(rank, dtype=torch.int64, device=candidates.device)
    floor = NULL * squares.max()
    for k in range(rank):
        score = torch.where(squares > floor, held / squares.clamp(min=1e-300), 0.0)
        score[taken[:k]] = -1.0
        p = int(score.argmax())
        taken[k] = p
        if squares[p] > floor:
            q = _without(_without(candidates[p], basis[:k]), basis[:k])  # twice, for what rounding leaves of the first
            q = q / q.norm()
            weighted = energies * q
            along, across = candidates @ q, candidates @ _without(weighted, basis[:k])  # of two columns at once: slower
            held = (held - 2 * along * across + along.square() * (weighted @ q)).clamp_(min=0)
            squares = (squares - along.square()).clamp_(min=0)
            basis[k] = q
    return taken


def _without(vector: Tensor, basis: Tensor) -> Tensor:
    """What the orthonormal rows of `basis` leave of it."""
    return vector - (basis @ vector) @ basis


# ---- how they are linked


@dataclass(frozen=True)
class Link:
    """U and what it costs.

    Attributes:
        columns: C [out, r] and rows: R [r, in], each column and row of W times a power of two, which leaves its digits alone
            and its length between 0.7 and 1.5, so that neither they nor U leave the range of float16.
        link: U [r, r], float64, for C and R so scaled.
        n_reached: the rank of U: how many directions the rows have on these inputs, or the columns, if those are fewer.
    """

    columns: Tensor
    link: Tensor
    rows: Tensor
    n_reached: int


def link(
    weight: Tensor,
    rows: Tensor,
    columns: Tensor,
    moment: Tensor | None = None,
    *,
    crossed: Tensor | None = None,
    rounding: float = 0.0,
) -> Link:
    """The U that does best between given rows and columns.

    Args:
        weight: W [out, in].
        rows, columns: I and J [r].
        moment: H: matrix [in, in], diagonal [in], or None for the identity.
        crossed: sum_t x~_t x_t^T [in, in], where C U R x_t shall come close to W x~_t; None: to W x_t, that is H.
        rounding: f, see above; `rounding_of` the dtype in which U is stored and runs.

    Raises: NumericsError if LAPACK finds no decomposition.
    """
    weight = weight.double()
    left, right = weight[:, columns], weight[rows]  # [out, r], [r, in]
    weighted = times(right, moment)  # R H
    wide = _lengths(left.square().sum(0))
    high = _lengths((weighted * right).sum(1).clamp(min=0))
    sigma, outer, inner = _singular(left / wide)  # C = outer sigma inner^T
    square = (weighted @ right.T) / high / high[:, None]
    tau2, vectors = _eigen((square + square.T) / 2)
    tau2 = _positive(tau2)
    sigma = torch.where(sigma > NULL * sigma[0], sigma, 0.0)
    tau = tau2.sqrt()
    reached = weight @ (weighted if crossed is None else right @ crossed.double().T).T  # W H R^T, or W (sum x~ x^T) R^T
    known = (outer.T @ (reached / high)) @ vectors  # (W S)_ij tau_j
    denominator = sigma[:, None].square() * tau2 + rounding * (1 + sigma[:, None].square() + tau2)
    there = (sigma[:, None] > 0) & (tau > 0)
    middle = torch.where(there, sigma[:, None] * known / denominator.clamp(min=torch.finfo(known.dtype).tiny), 0.0)
    found = (inner @ middle @ vectors.T) / wide[:, None] / high  # in the scale of W's own columns and rows
    by_column, by_row = (_power_of_two(part) for part in (left.square().sum(0), right.square().sum(1)))
    n_reached = min(int((sigma > 0).sum()), int((tau > 0).sum()))
    return Link(left / by_column, found * by_column[:, None] * by_row, right / by_row[:, None], n_reached)


def times(matrix: Tensor, moment: Tensor | None) -> Tensor:
    """M H in float64."""
    if moment is None:
        return matrix
    return matrix * moment.double() if moment.ndim == 1 else matrix @ moment.double()


def rounding_of(dtype: torch.dtype) -> float:
    """The mean squared relative error of rounding to `dtype`, of numbers whose mantissa is spread as that of most."""
    unit = torch.finfo(dtype).eps / 2
    return unit * unit / (8 * math.log(2))  # u^2 / 3 over x^2, x in 1 .. 2 with density 1 / (x log 2)


def _lengths(squares: Tensor) -> Tensor:
    """Square roots, 1 for 0: what is nothing is not scaled."""
    return torch.where(squares > 0, squares, 1.0).sqrt()


def _power_of_two(squares: Tensor) -> Tensor:
    return torch.exp2(_lengths(squares).log2().round())


def _positive(values: Tensor) -> Tensor:
    """Eigenvalues, falling, less those that are rounding alone."""
    return torch.where(values > len(values) * torch.finfo(values.dtype).eps * values[0], values, 0.0)


def _eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, falling, and eigenvectors."""
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError as error:
        raise NumericsError(f"the eigenvalues of a Gram matrix: {_one_line(error)}") from None
    return values.flip(0), vectors.flip(1)


def _singular(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """sigma [r], outer [m, r], inner [r, r] with matrix [m, r] = outer sigma inner^T, through a QR decomposition."""
    try:
        thin, square = torch.linalg.qr(matrix)
        left, values, right = torch.linalg.svd(square)
    except torch.linalg.LinAlgError as error:
        raise NumericsError(f"the singular values of the columns: {_one_line(error)}") from None
    return values, thin @ left, right.T


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
