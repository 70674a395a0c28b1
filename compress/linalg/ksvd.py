"""K-SVD: a dictionary of any number of unit atoms, fitted atom by atom together with the codes that use it.

    minimise  |Y - C A|_F^2  over A [k, d], rows of length 1, and C [n, k] with at most s entries per row

    round:   C anew by pursuit (sparse_coding.py); a row takes its new code only if its error is less
             then each atom: with E = Y - C A + c_i a_i on the rows that use it, the best rank-1 matrix in place of c_i a_i,
             by power iterations from c_i; most recent values of the others. The support of C stays

Neither part raises the error. R = Y - C A is kept and updated. Power iterations are products of a matrix with a vector, bound by
memory; so BLOCK atoms do theirs together, as products of matrices, all from the R before the block. The coefficients that go
with the new atoms are then computed one atom after the other, with what the atoms before it in the block changed: for the
new and for the old direction of the atom, and whichever takes more out of E is taken. With blocks of 1 that is the
textbook's order.

Source: K-SVD, Aharon et al., 2006; power iterations in it, CoSpaDi, 2025. Blocks are ours.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from compress.linalg.orthogonal_dictionary import SETTLED, Learned
from compress.linalg.sparse_coding import ALLOWANCE, pursue

BLOCK = 32  # atoms whose power iterations run together
POWER_STEPS = 8  # CoSpaDi


def ksvd(
    targets: Tensor,
    start: Tensor,
    n_kept: int,
    n_rounds: int,
    codes: Tensor | None = None,
    tell: Callable[[int, float], None] | None = None,
    block: int = BLOCK,
    allowance: int = ALLOWANCE,
) -> Learned:
    """Learn A and C for `targets` Y [n, d] from the dictionary `start` [k, d], rows of length 1, and its `codes`, if known."""
    energies = targets.square().sum(1)
    total = float(energies.double().sum())
    atoms = start.clone()
    codes = targets.new_zeros(len(targets), len(atoms)) if codes is None else codes.clone()
    residual = targets - codes @ atoms
    errors: list[float] = []
    for done in range(n_rounds):
        _code_anew(targets, atoms, codes, residual, energies, n_kept, allowance)
        replace_unused(atoms, codes, residual)
        fit_atoms(atoms, codes, residual, block)
        errors.append(float(residual.double().square().sum()) / total if total else 0.0)
        if tell is not None:
            tell(done + 1, errors[-1])
        settled = len(errors) > 1 and errors[-2] - errors[-1] < SETTLED * errors[-1]
        if settled or errors[-1] <= torch.finfo(targets.dtype).eps ** 2:
            break
    return Learned(atoms, codes, errors)


def random_atoms(targets: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """`n` different rows of Y at random, brought to length 1; random directions where there are too few that are not 0."""
    order = torch.randperm(len(targets), generator=generator)
    lengths = targets.norm(dim=1)
    chosen = [i for i in order.tolist() if float(lengths[i]) > 0][:n]
    atoms = torch.randn(n, targets.shape[1], generator=generator).to(targets)
    atoms[: len(chosen)] = targets[chosen]
    return atoms / atoms.norm(dim=1, keepdim=True)


def _code_anew(
    targets: Tensor, atoms: Tensor, codes: Tensor, residual: Tensor, energies: Tensor, n_kept: int, allowance: int
) -> None:
    """New codes for the rows that they serve better; `codes` and `residual` change in place."""
    gram = atoms @ atoms.T
    found = pursue(gram, targets @ atoms.T, energies, n_kept, allowance)
    changed = targets - found @ atoms
    better = changed.square().sum(1) < residual.square().sum(1)
    codes[better], residual[better] = found[better], changed[better]


def replace_unused(atoms: Tensor, codes: Tensor, residual: Tensor) -> None:
    """Atoms that no row uses become the directions of the largest residuals."""
    unused = (codes == 0).all(dim=0).nonzero()[:, 0]
    if not len(unused):
        return
    worst = residual.norm(dim=1).topk(min(len(unused), len(residual)))
    worst_rows = worst.indices[worst.values > 0]
    atoms[unused[: len(worst_rows)]] = residual[worst_rows] / residual[worst_rows].norm(dim=1, keepdim=True)


def fit_atoms(atoms: Tensor, codes: Tensor, residual: Tensor, block: int = BLOCK, n_steps: int = POWER_STEPS) -> None:
    """Every atom and its coefficients once; all three change in place, the error does not rise."""
    for start in range(0, len(atoms), block):
        own = slice(start, start + block)
        old, before = atoms[own].clone(), codes[:, own].clone()
        new, after = _fitted_block(old, before, residual, n_steps)
        residual += torch.cat([before, -after], dim=1) @ torch.cat([old, new])
        atoms[own], codes[:, own] = new, after


def _fitted_block(old: Tensor, before: Tensor, residual: Tensor, n_steps: int) -> tuple[Tensor, Tensor]:
    mask = before != 0  # [n, b]
    right, left = old, before
    for _ in range(n_steps):  # u = E v / |E v|, v = E^T u, E = R + c_i a_i on the rows that use the atom
        right = left.T @ residual + (left * before).sum(0)[:, None] * old
        lengths = right.norm(dim=1, keepdim=True)
        right = torch.where(lengths > 0, right / lengths, old)
        left = (residual @ right.T + before * (old * right).sum(1)).mul_(mask)
    both = torch.stack([right, old], dim=1)  # [b, 2, d]
    seen = (residual @ both.flatten(0, 1).T).unflatten(1, (-1, 2))  # R u_i, R a_i
    with_old = torch.einsum("id,jcd->ijc", old, both)
    new, after = old.clone(), torch.zeros_like(before)
    for i in range(len(old)):
        candidates = seen[:, i] + before[:, : i + 1] @ with_old[: i + 1, i]
        if i:
            candidates -= after[:, :i] @ (new[:i] @ both[i].T)
        candidates.mul_(mask[:, i : i + 1])
        sizes = candidates.square().sum(0)
        choice = 0 if float(sizes[0]) > float(sizes[1]) else 1
        new[i], after[:, i] = both[i, choice], candidates[:, choice]
    return new, after
