"""The best matrix of low rank in place of a weight, for inputs of a given second moment.

    minimise  tr((W - W') H (W - W')^T)  over W' of rank k,   H = sum_t x_t x_t^T

which is sum_t |W x_t - W' x_t|^2. For any S with S S^T = H, take the singular value decomposition W S = U Sigma V^T: the
best W' S is U_k Sigma_k V_k^T, and the loss is the sum of the sigma_i^2 left out. The usual next step divides by S, which
fails where H is singular. It is not needed: U_k Sigma_k V_k^T = U_k U_k^T W S, hence

    W' = U_k U_k^T W        left = U_k C [out, k], right = C^T U_k^T W [k, in], any orthogonal C

and U, Sigma^2 are eigenvectors and eigenvalues of G = W H W^T [out, out]. So S need not be formed, let alone inverted. Where
out > in, W = Q R first, and the same with R [in, in]: no matrix is larger than the smaller side of W.

Everything is float64. G squares the condition number: an eigenvalue below GRAM_FLOOR of the largest has fewer than
five sure digits. If the rank asked for reaches down to such ones, the decomposition is made again as the singular value
decomposition of W S, S = Q sqrt(lambda) from H = Q diag(lambda) Q^T. Full decompositions always: randomised ones lose
what whitening gains.

H is a matrix; or a vector, the diagonal of one; or None, the identity (plain truncation).

Directions that no input reaches (sigma_i = 0) cost nothing to leave out and nothing to choose: where the rank asks for
more of them than there are others, they are chosen to bring W' closest to W itself.

Source: SVD-LLM, Wang et al., 2024, arXiv:2403.07378, theorem 3.2, in the form without the inverse.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import NumericsError

GRAM_FLOOR = 1e-10  # of the largest eigenvalue of G: below it, rounding (1e-16) is more than a millionth of the value
NULL = 1e-12  # of the largest singular value: below it, a direction is not there
TILE = 1024  # columns of H taken to float64 at a time
DAMPING_GROWTH = 10.0  # per failed factorisation
DAMPING_ATTEMPTS = 8


@dataclass(frozen=True)
class Decomposition:
    """The first directions of the output that matter, and how much each of all of them does.

    Attributes:
        basis: U_k [out, k], float64, orthonormal columns, most important first; in each the largest entry is positive.
        energies: sigma_i^2 [min(out, in)], float64, falling; their sum is tr(W H W^T).
        n_reached: how many of the columns of `basis` some input reaches; the others were chosen as said above.
        route: "gram" or "svd", whichever was exact enough.
    """

    basis: Tensor
    energies: Tensor
    n_reached: int
    route: str

    @property
    def loss(self) -> float:
        """tr((W - U_k U_k^T W) H (W - U_k U_k^T W)^T): the energies left out."""
        return float(self.energies[self.basis.shape[1] :].sum())

    @property
    def total(self) -> float:
        """tr(W H W^T)."""
        return float(self.energies.sum())


def decompose(weight: Tensor, rank: int, moment: Tensor | None = None) -> Decomposition:
    """The best `rank` directions of the outputs of `weight`.

    Args:
        weight: [out, in], any float dtype.
        rank: 1 <= rank <= min(out, in).
        moment: H [in, in], symmetric; or its diagonal [in]; or None for the identity. Nothing finite is refused.

    Raises: NumericsError if LAPACK finds no decomposition, or what goes in is not finite.
    """
    assert 1 <= rank <= min(weight.shape), (rank, weight.shape)
    core, outer = smaller_side(weight)
    energies, vectors = _eigen(gram(core, moment))
    route = "gram"
    if energies[rank - 1] <= GRAM_FLOOR * energies[0]:
        vectors, values = _singular(core @ whitener(moment) if moment is not None else core)
        energies, route = values.square(), "svd"
    n_reached = min(rank, int((energies > NULL**2 * energies[0]).sum()))
    basis = vectors[:, :rank]
    if n_reached < rank:
        basis = _completed(core, vectors[:, :n_reached], rank)
    if outer is not None:
        basis = outer @ basis
    return Decomposition(fixed_signs(basis), energies, n_reached, route)


def spectrum(weight: Tensor, moment: Tensor | None = None) -> Tensor:
    """`decompose(...).energies` alone, for choosing ranks: a third of the work.

    Values below GRAM_FLOOR of the first are rounding; to choose a rank they are as good as 0.
    """
    core, _ = smaller_side(weight, with_outer=False)
    try:
        return torch.linalg.eigvalsh(gram(core, moment)).flip(0).clamp_(min=0)
    except torch.linalg.LinAlgError as error:
        raise NumericsError(f"the eigenvalues of W H W^T: {_one_line(error)}") from None


def directions(weight: Tensor, moment: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`spectrum`, and the directions of the outputs that it belongs to: U [out, min(out, in)], float64, orthonormal."""
    core, outer = smaller_side(weight)
    energies, vectors = _eigen(gram(core, moment))
    return energies, vectors if outer is None else outer @ vectors


def factors(weight: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """left [out, rank] and right [rank, in], float64, with left @ right = U U^T W, U = `basis` [out, rank].

    left is U C times a power of two that makes the entries of both about equally large, so that neither leaves the range
    of float16. C is orthogonal (`mixing`). So columns of left are orthogonal and equally long: an error of `right` is an
    error of the outputs, row by row, which is what methods that round `right` next take for granted.
    """
    mixed = basis @ mixing(basis.shape[1]).to(basis)
    right = mixed.T @ weight.to(basis.dtype)
    left_size = 1 / math.sqrt(basis.shape[0])  # root mean square of U C
    right_size = float(right.square().mean().sqrt())
    scale = 2.0 ** round(math.log2(right_size / left_size) / 2) if right_size > 0 else 1.0
    return mixed * scale, right / scale


def mixing(rank: int) -> Tensor:
    """C [rank, rank], the orthogonal matrix of a discrete cosine transform (DCT-II), float64.

    In the basis U the inputs of the left factor, U^T W x, are uncorrelated and of very unequal size. Rounding with error
    feedback has nothing to work with there: an error of one column is made good by columns that correlate with it. Mixed
    by C they correlate, and all are about equally large: GPTQ to 4 bits loses a quarter as much. Any orthogonal matrix
    without a preferred basis would do; this one needs no seed and comes in every size.
    """
    i = torch.arange(rank, dtype=torch.float64)
    cosines = torch.cos(torch.pi / rank * torch.outer(i, i + 0.5)) * math.sqrt(2 / rank)
    cosines[0] /= math.sqrt(2)
    return cosines


def shifted(
    weight: Tensor, moment: Tensor, cross: Tensor, strength: float, damping: float
) -> tuple[Tensor, Tensor, float]:
    """The weight that does best on disturbed inputs what `weight` does on undisturbed ones.

        minimise  sum_t |W (x_t + strength (x~_t - x_t)) - W_s x_t|^2 + a |W - W_s|^2,    a = damping * mean(diag H)
        W_s = W + strength W D (H + a I)^-1,    D = sum_t (x~_t - x_t) x_t^T

    The rank-k W' that minimises the same sum is the truncation of W_s under H + a I.

    Args:
        moment, cross: H and D [in, in] of inputs x_t and undisturbed inputs x~_t. Without a difference (D = 0), W_s = W.

    Returns: W_s [out, in]; H + a I; the damping that it took (more than asked for where H is not definite); float64.
    Raises: NumericsError if no damping makes H definite.
    """
    moment = moment.double()
    mean = float(moment.diagonal().mean())
    for attempt in range(DAMPING_ATTEMPTS):
        damped = moment.clone()
        used = damping * DAMPING_GROWTH**attempt
        damped.diagonal().add_(used * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            change = torch.cholesky_solve((weight.double() @ cross.double()).T, lower).T  # W D (H + a I)^-1
            return weight.double() + strength * change, damped, used
    raise NumericsError(
        f"the second moment of the inputs could not be factored in {DAMPING_ATTEMPTS} attempts, up to damping {used:.3g}; "
        f"calibrate on more, and more varied, tokens"
    )


def refitted_left(left: Tensor, right: Tensor, changed: Tensor, moment: Tensor | None, damping: float) -> Tensor:
    """The left factor that does best behind a `changed` right one (rounded, say) what `left` did behind `right`.

        minimise  sum_t |left right x_t - left' changed x_t|^2 + a |left - left'|^2,    a = damping * mean(diag M)
        left' = left (right H changed^T + a I) (M + a I)^-1,    M = changed H changed^T

    Args:
        left [out, rank], right and changed [rank, in]; moment: H [in, in] or None for the identity.

    Returns: left' [out, rank], float64. `left` itself, in the limit, where M says nothing.
    Raises: NumericsError if no damping makes M definite.
    """
    changed = changed.double()
    weighted = changed if moment is None else times_moment(changed, moment)  # changed H
    square, crossed = weighted @ changed.T, right.double() @ weighted.T
    mean = float(square.diagonal().mean())
    if mean == 0:
        return left.double()
    identity = torch.eye(len(square), dtype=square.dtype, device=square.device)
    for attempt in range(DAMPING_ATTEMPTS):
        added = damping * DAMPING_GROWTH**attempt * mean * identity
        lower, info = torch.linalg.cholesky_ex(square + added)
        if int(info) == 0:
            return torch.cholesky_solve((left.double() @ (crossed + added)).T, lower).T
    raise NumericsError(
        f"the second moment behind the right factor could not be factored in {DAMPING_ATTEMPTS} attempts"
    )


def gram(weight: Tensor, moment: Tensor | None) -> Tensor:
    """G = W H W^T [out, out], float64, for `weight` in float64 and H as in `decompose`."""
    product = weight @ weight.T if moment is None else times_moment(weight, moment) @ weight.T
    return (product + product.T).mul_(0.5)


def whitener(moment: Tensor) -> Tensor:
    """S with S S^T = H, float64 [in, in]: D Q sqrt(lambda), D = sqrt(diag H), D^-1 H D^-1 = Q diag(lambda) Q^T.

    With inputs brought to one size by D, a few massive ones do not drown the rest in rounding. Eigenvalues that are rounding
    alone (below in * 2^-52 of the largest, negative ones included) count as 0, so a singular H, or one of fewer tokens than
    inputs, is as good as any other.
    """
    if moment.ndim == 1:
        return moment.double().clamp(min=0).sqrt().diag()
    size = moment.diagonal().double().clamp(min=0).sqrt()  # [in]
    inverse = torch.where(size > 0, 1 / size, 0.0)
    values, vectors = _eigen(inverse[:, None] * moment.double() * inverse)
    values[values < len(values) * torch.finfo(values.dtype).eps * values[0]] = 0
    return size[:, None] * vectors * values.sqrt()


def fixed_signs(basis: Tensor) -> Tensor:
    """Each column with the sign that makes its largest entry positive: libraries differ in which they return."""
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))  # [1, rank]
    return basis * torch.where(largest < 0, -1.0, 1.0).to(basis)


def times_moment(weight: Tensor, moment: Tensor) -> Tensor:
    """W H in the dtype of `weight`, float64 here, without a copy of H in it."""
    if moment.ndim == 1:
        return weight * moment.to(weight.dtype)
    return torch.cat([weight @ columns.to(weight.dtype) for columns in moment.split(TILE, dim=1)], dim=1)


def smaller_side(weight: Tensor, with_outer: bool = True) -> tuple[Tensor, Tensor | None]:
    """(W, None) where out <= in; else (R, Q) of W = Q R: R [in, in] has the singular values, Q [out, in] leads back."""
    weight = weight.double()
    if not torch.isfinite(weight).all():
        raise NumericsError("the weight holds NaN or infinity")
    if weight.shape[0] <= weight.shape[1]:
        return weight, None
    outer, core = torch.linalg.qr(weight, mode="reduced" if with_outer else "r")
    return core, outer if with_outer else None


def _completed(core: Tensor, kept: Tensor, rank: int) -> Tensor:
    """`kept` and the best directions of what it leaves of `core`, `rank` orthonormal columns in all."""
    rest = core - kept @ (kept.T @ core)
    more, _ = _singular(rest)
    return torch.linalg.qr(torch.cat([kept, more[:, : rank - kept.shape[1]]], dim=1)).Q


def _eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, falling and not negative, and eigenvectors of a symmetric matrix that should be semidefinite."""
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError as error:
        raise NumericsError(f"the eigenvalues of W H W^T: {_one_line(error)}") from None
    return values.flip(0).clamp_(min=0), vectors.flip(1)


def _singular(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors and singular values, falling."""
    try:
        vectors, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError as error:
        raise NumericsError(f"the singular values of W S: {_one_line(error)}") from None
    return vectors, values


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
