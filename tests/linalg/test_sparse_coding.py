from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.linalg import sparse_coding
from compress.linalg.sparse_coding import fitted, pursue
from tests.reference.dictionaries import omp


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(*shape: int, seed: int = 1) -> Tensor:
    return torch.nn.functional.normalize(random(*shape, seed=seed), dim=1)


def codes_of(targets: Tensor, atoms: Tensor, n: int, **options) -> Tensor:
    return pursue(atoms @ atoms.T, targets @ atoms.T, targets.square().sum(1), n, **options)


@pytest.mark.parametrize("allowance", [10**8, 10_000])
@pytest.mark.parametrize(("d", "k", "n"), [(12, 8, 3), (12, 20, 6), (12, 20, 12)])
def test_one_atom_at_a_time_is_the_textbook(d, k, n, allowance):
    targets, atoms = random(7, d), unit(k, d)
    found = codes_of(targets, atoms, n, allowance=allowance)
    torch.testing.assert_close(found, omp(targets, atoms, n), rtol=1e-6, atol=1e-8)
    assert ((found != 0).sum(1) == n).all()
    residual = targets - found @ atoms
    assert ((residual @ atoms.T)[found != 0].abs() < 1e-8).all()  # orthogonal to what was selected


def test_dependent_atoms_are_passed_over_and_nothing_left_ends_it():
    atoms = unit(6, 8)
    doubled = torch.cat([atoms, atoms])  # every atom twice
    targets = random(5, 6, seed=3) @ atoms
    found = codes_of(targets, doubled, 8)
    assert torch.isfinite(found).all() and ((found != 0).sum(1) <= 6).all()
    torch.testing.assert_close(found @ doubled, targets)
    one = codes_of(2.5 * atoms[2:3], atoms, 4)
    assert int((one.abs() > 1e-9).sum()) == 1 and float(one[0, 2]) == pytest.approx(2.5)
    assert not codes_of(torch.zeros(2, 8, dtype=torch.float64), atoms, 3).any()


def test_in_stages_comes_close(monkeypatch):
    targets, atoms = random(60, 64), unit(96, 64)
    one_by_one = (targets - codes_of(targets, atoms, 24, exact=True) @ atoms).square().sum()
    monkeypatch.setattr(sparse_coding, "EXACT_ATOMS", 8)
    found = codes_of(targets, atoms, 24)
    assert ((found != 0).sum(1) == 24).all()
    assert (targets - found @ atoms).square().sum() < 1.1 * one_by_one
    torch.testing.assert_close(found, codes_of(targets, atoms, 24, allowance=20_000))


def test_fitted_is_least_squares_on_the_support_and_never_worse_on_the_way():
    targets, atoms = random(9, 16), 3 * random(12, 16, seed=2)
    mask = random(9, 12, seed=4) > 0.2
    codes = random(9, 12, seed=5) * mask
    errors = [(targets - codes @ atoms).square().sum(1)]
    for n_steps in (1, 2, 4, 40):
        found = fitted(atoms @ atoms.T, targets @ atoms.T, codes, mask, n_steps)
        assert not found[~mask].any()
        errors.append((targets - found @ atoms).square().sum(1))
        assert (errors[-1] <= errors[-2] * (1 + 1e-9)).all()
    for i in range(9):
        exact = torch.linalg.lstsq(atoms[mask[i]].T, targets[i][:, None]).solution[:, 0]
        torch.testing.assert_close(found[i, mask[i]], exact, rtol=1e-5, atol=1e-7)
