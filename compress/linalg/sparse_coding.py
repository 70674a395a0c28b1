"""Sparse codes for a given dictionary: each row of Y [n, d] as a combination of at most s of the k rows ("atoms") of A [k, d].

    minimise  |y - c A|^2  over c [k] with at most s entries that are not 0

Only G = A A^T [k, k] and p = Y A^T [n, k] are needed. Exactly solved it is a search over all supports; here:

    pursue    orthogonal matching pursuit: s times the atom that correlates most with what is left joins the support, and all
              coefficients are fitted anew, by a Cholesky factor of G on the support that grows by a row. Exact up to
              EXACT_ATOMS; above, in STAGES stages of several atoms each, coefficients fitted by conjugate gradients: s^3 steps
              per row become products of matrices
    fitted    the best coefficients on a given support, by conjugate gradients. The error never rises

What is left correlates with all atoms as p - c G: one product of matrices for all rows, four times the operations of a
gathered one at s = k / 2 and many times its speed.

Source: batch OMP, Rubinstein et al., 2008; the two ways for large s are ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

EXACT_ATOMS = 128  # up to so many are chosen one by one
STAGES = 16
STAGE_STEPS = 4  # of conjugate gradients per stage, from where the stage before ended
LAST_STEPS = 12
DEPENDENT = 1e-6  # of an atom's square: less of it outside the span of the chosen ones, and it is not chosen
NOTHING = 1e-12  # of a row's square: no more is left to be coded
ALLOWANCE = 512 * 2**20  # bytes that the rows coded at a time may take


def pursue(
    gram: Tensor, correlations: Tensor, energies: Tensor, n_atoms: int, allowance: int = ALLOWANCE, exact: bool = False
) -> Tensor:
    """Codes [n, k] with at most `n_atoms` entries per row.

    Args:
        gram: G [k, k] of atoms of length 1.
        correlations: p [n, k].
        energies: |y|^2 [n].
        allowance: bytes for the rows that are coded at a time.
        exact: one atom at a time, however many.
    """
    n_rows, k = correlations.shape
    one_by_one = exact or n_atoms <= EXACT_ATOMS
    row_bytes = 4 * (2 * n_atoms**2 + 6 * k) if one_by_one else 4 * 10 * k
    step = max(1, allowance // row_bytes)
    code = _one_by_one if one_by_one else _staged
    return torch.cat(
        [
            code(gram, correlations[i : i + step], energies[i : i + step], n_atoms)
            for i in range(0, max(n_rows, 1), step)
        ]
    )


def _one_by_one(gram: Tensor, correlations: Tensor, energies: Tensor, n_atoms: int) -> Tensor:
    n_rows, k = correlations.shape
    rows = torch.arange(n_rows, device=gram.device)
    factor = gram.new_zeros(n_rows, n_atoms, n_atoms)  # lower, of G on the support
    support = torch.full((n_rows, n_atoms), k, device=gram.device)  # k: none
    codes = gram.new_zeros(n_rows, k + 1)  # the last column takes what belongs to none
    barred = torch.zeros(n_rows, k, dtype=torch.bool, device=gram.device)  # chosen, or dependent on chosen ones
    left = energies.clone()
    least = NOTHING * energies
    padded = torch.nn.functional.pad(gram, (0, 1, 0, 1))  # atom k is 0
    for t in range(n_atoms):
        rest = correlations - codes[:, :k] @ gram
        active = left > least
        chosen, across, height = _independent(rest, padded, factor[:, :t, :t], support[:, :t], barred, active)
        barred[rows[chosen < k], chosen[chosen < k]] = True
        factor[:, t, :t], factor[:, t, t] = across, height.sqrt()
        found = rest.gather(1, chosen.clamp(max=k - 1)[:, None])[:, 0]
        entry = torch.where(chosen < k, found / height, 0.0)  # [n]
        if t:
            shift = _solved(factor[:, :t, :t].mT, across, upper=True)
            codes.scatter_add_(1, support[:, :t], -entry[:, None] * shift)
        codes.scatter_add_(1, chosen[:, None], entry[:, None])
        support[:, t] = chosen
        left = left - entry.square() * height
        if not active.any():
            break
    wanted = torch.nn.functional.pad(correlations, (0, 1)).gather(1, support)
    factor.diagonal(dim1=1, dim2=2).masked_fill_(support == k, 1.0)
    exact = _solved(factor.mT, _solved(factor, wanted, upper=False), upper=True)  # sums of updates carry their rounding
    return gram.new_zeros(n_rows, k + 1).scatter_(1, support, exact)[:, :k]


def _independent(
    rest: Tensor, padded: Tensor, factor: Tensor, support: Tensor, barred: Tensor, active: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The atom of each row that correlates most with what is left, k where none is wanted; its entries in the row to come of
    the factor; the square of the last of them. Dependent atoms are barred, and another is chosen."""
    k = rest.shape[1]
    score = rest.abs().masked_fill_(barred, -1.0)
    best = score.max(dim=1)
    chosen = torch.where(active & (best.values > 0), best.indices, k)
    across = rest.new_zeros(len(rest), factor.shape[1])
    height = torch.ones_like(best.values)
    open_ = chosen < k
    while open_.any():
        own = open_.nonzero()[:, 0]
        if factor.shape[1]:
            columns = padded[support[own], chosen[own, None]]  # [rows, t]
            across[own] = _solved(factor[own], columns, upper=False)
        height[own] = padded[chosen[own], chosen[own]] - across[own].square().sum(1)
        dependent = own[height[own] < DEPENDENT]
        open_ = torch.zeros_like(open_)
        if len(dependent):
            barred[dependent, chosen[dependent]] = True
            score[dependent, chosen[dependent]] = -1.0
            again = score[dependent].max(dim=1)
            chosen[dependent] = torch.where(again.values > 0, again.indices, k)
            across[dependent], height[dependent] = 0.0, 1.0
            open_[dependent] = chosen[dependent] < k
    return chosen, across, height


def _solved(triangle: Tensor, right: Tensor, upper: bool) -> Tensor:
    return torch.linalg.solve_triangular(triangle, right[..., None], upper=upper)[..., 0]


def _staged(gram: Tensor, correlations: Tensor, energies: Tensor, n_atoms: int) -> Tensor:
    codes = torch.zeros_like(correlations)
    mask = torch.zeros_like(correlations, dtype=torch.bool)
    taken = 0
    for stage in range(STAGES):
        wanted = -(-n_atoms * (stage + 1) // STAGES)
        rest = correlations - codes @ gram if stage else correlations.clone()
        mask.scatter_(1, rest.abs().masked_fill_(mask, -1.0).topk(wanted - taken, dim=1, sorted=False).indices, True)
        taken = wanted
        codes = fitted(gram, correlations, codes, mask, STAGE_STEPS if stage < STAGES - 1 else LAST_STEPS)
    return codes


def fitted(gram: Tensor, correlations: Tensor, codes: Tensor, mask: Tensor, n_steps: int) -> Tensor:
    """Codes with less error on the support `mask` bool [n, k], from `codes` [n, k], by conjugate gradients preconditioned by the
    diagonal of G: `n_steps` at most, fewer once all rows are done."""
    diagonal = gram.diagonal().clamp(min=torch.finfo(gram.dtype).tiny)
    codes = codes * mask
    rest = (correlations - codes @ gram).mul_(mask)
    scaled = rest / diagonal
    direction, size = scaled.clone(), (rest * scaled).sum(1, keepdim=True)
    least = torch.finfo(gram.dtype).eps ** 2 * (correlations.square() / diagonal).mul_(mask).sum(1, keepdim=True)
    for _ in range(n_steps):
        ahead = (direction @ gram).mul_(mask)
        curvature = (direction * ahead).sum(1, keepdim=True)
        going = (size > least) & (curvature > 0)
        if not going.any():
            break
        length = torch.where(going, size / curvature, 0.0)
        codes.addcmul_(length, direction)
        rest.addcmul_(length, ahead, value=-1)
        scaled = rest / diagonal
        before, size = size, (rest * scaled).sum(1, keepdim=True)
        direction.mul_(torch.where(going, size / before, 0.0)).add_(scaled)
    return codes
