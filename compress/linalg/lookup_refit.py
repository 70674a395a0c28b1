"""Tables and codes made to fit each other, on the second moment as a whole: alternating minimisation of

    tr((W - Q) H_d (W - Q)^T),   row by row,   H_d = H + damping * mean(diag H) * I

values   For codes as they are, Q is linear in what is stored: q = S t, S [in, n] of a row; n its table's values (S_ik = 1
         where code i is k), or the scales of its groups (S_ig = T[code_i] for columns i of group g). With r = w - q and
         g = H_d r the best change is   (S^T H_d S) dt = S^T g,   a system of n unknowns per row.
codes    For values as they are, one column after the other takes the value nearest to where the loss would be least, all
         other columns as they are (coordinate descent):

             q_i <- nearest value to q_i + g_i / H_d[i, i];   g <- g - H_d[:, i] dq_i

Each step is kept in the rows where, with what it found rounded to the stored dtype, the loss is lower; so it never rises.

Source of the second: Behdin et al., 2023, arXiv:2309.01885 (QuantEase).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.linalg.error_feedback import cuts
from compress.linalg.lookup import Lookup, LookupColumns, rounded_scale, stored_table

BLOCK = 64  # columns between updates of the whole gradient
RIDGE = 1e-6  # of the mean diagonal of S^T H_d S, which is singular where a value is not used
ENTRIES = 1 << 23  # of S, all rows together, at a time


@dataclass
class Fit:
    """Tables and codes of some rows; matrices are transposed, [in, rows].

    Attributes:
        gradient: H_d (W - Q)^T.
        loss: [rows], their shares of what is minimised.
    """

    lookup: Lookup
    codes: Tensor
    values: Tensor
    gradient: Tensor
    loss: Tensor


def refit(weight: Tensor, hessian: Tensor, lookup: Lookup, codes: Tensor, rounds: int) -> tuple[Lookup, Tensor, Tensor]:
    """Alternate `rounds` times, or until no row changes.

    Args:
        weight: W [rows, in], float32.
        hessian: H_d [in, in], float32, positive definite.
        codes: uint8 [rows, in] on `lookup`.

    Returns: tables, codes, and the loss [rows].
    """
    weight = weight.T.contiguous()
    best = _evaluated(weight, hessian, lookup, codes.T.contiguous())
    for _ in range(rounds):
        found, changed = best, False
        for step in (_values, _codes):
            found = step(weight, hessian, best)
            better = found.loss < best.loss
            changed |= bool(better.any())
            best = _chosen(best, found, better)
        if not changed:
            break
    return best.lookup, best.codes.T.contiguous(), best.loss


def _evaluated(weight: Tensor, hessian: Tensor, lookup: Lookup, codes: Tensor) -> Fit:
    values = lookup.decode(codes.T).T.contiguous()
    residual = weight - values
    gradient = hessian @ residual
    return Fit(lookup, codes, values, gradient, residual.mul_(gradient).sum(0))


def _chosen(one: Fit, other: Fit, where: Tensor) -> Fit:
    """`other` in the rows `where`, `one` in the rest."""
    return Fit(
        one.lookup.with_rows(where, other.lookup),
        torch.where(where, other.codes, one.codes),
        torch.where(where, other.values, one.values),
        torch.where(where, other.gradient, one.gradient),
        torch.where(where, other.loss, one.loss),
    )


def _values(weight: Tensor, hessian: Tensor, fit: Fit) -> Fit:
    lookup = fit.lookup
    if lookup.scale is not None:
        changed = lookup.scale.double() + _scale_change(hessian, fit)
        return _evaluated(weight, hessian, Lookup(lookup.table, rounded_scale(changed, lookup.table.dtype)), fit.codes)
    table, order = (lookup.table.double() + _table_change(hessian, fit)).sort(dim=1)
    place = order.argsort(dim=1).T.to(torch.uint8)  # of what was value k
    codes = place.gather(0, fit.codes.long())
    return _evaluated(weight, hessian, Lookup(stored_table(table, lookup.table.dtype)), codes)


def _scale_change(hessian: Tensor, fit: Fit) -> Tensor:
    """[rows, groups]."""
    table, scale = fit.lookup.parts()
    assert scale is not None
    n_groups = scale.shape[1]
    inside = table.float()[fit.codes.long()]  # T[code], [in, rows]: the entries of S
    size = len(inside) // n_groups
    system = torch.empty(len(scale), n_groups, n_groups, dtype=torch.float64, device=scale.device)
    for group, (first, last) in enumerate(cuts(0, len(inside), size)):
        product = (hessian[:, first:last] @ inside[first:last]).mul_(inside)
        system[:, :, group] = product.unflatten(0, (n_groups, size)).sum(1).T
    right = (inside * fit.gradient).unflatten(0, (n_groups, size)).sum(1).T
    return _solved(system, right)


def _table_change(hessian: Tensor, fit: Fit) -> Tensor:
    """[rows, 2^bits]."""
    n_rows, n_values = fit.lookup.table.shape
    change = torch.empty(n_rows, n_values, dtype=torch.float64, device=hessian.device)
    for start, stop in cuts(0, n_rows, max(1, ENTRIES // (n_values * len(hessian)))):
        index = fit.codes[:, start:stop].T.long().unsqueeze(1)  # [rows, 1, in]
        chosen = torch.zeros(stop - start, n_values, len(hessian), device=hessian.device).scatter_(1, index, 1.0)  # S^T
        system = (chosen.flatten(0, 1) @ hessian).view_as(chosen) @ chosen.mT
        right = chosen @ fit.gradient[:, start:stop].T.unsqueeze(2)
        change[start:stop] = _solved(system.double(), right.squeeze(2))
    return change


def _solved(system: Tensor, right: Tensor) -> Tensor:
    diagonal = system.diagonal(dim1=1, dim2=2)
    ridge = RIDGE * diagonal.mean(1, keepdim=True) + torch.finfo(torch.float32).tiny
    diagonal.add_(ridge)
    return torch.linalg.solve(system, right.double())


def _codes(weight: Tensor, hessian: Tensor, fit: Fit) -> Fit:
    """One sweep over all columns."""
    levels, n = LookupColumns(fit.lookup), len(weight)
    group_size = n if fit.lookup.scale is None else n // fit.lookup.scale.shape[1]
    values, gradient, codes = fit.values.clone(), fit.gradient.clone(), torch.empty_like(fit.codes)
    code = torch.empty_like(values[0])
    for start, stop in cuts(0, n, BLOCK):
        within, local = hessian[start:stop, start:stop], gradient[start:stop].clone()
        change = torch.empty_like(local)
        for i in range(stop - start):
            target = local[i].div(within[i, i]).add_(values[start + i])
            value = levels.round(target, (start + i) // group_size, None, code)
            codes[start + i] = code
            torch.sub(value, values[start + i], out=change[i])
            values[start + i] = value
            if i + 1 < stop - start:
                local[i + 1 :].addr_(within[i, i + 1 :], change[i], alpha=-1)
        gradient.addmm_(hessian[:, start:stop], change, alpha=-1)
    loss = (weight - values).mul_(gradient).sum(0)
    return Fit(fit.lookup, codes, values, gradient, loss)
