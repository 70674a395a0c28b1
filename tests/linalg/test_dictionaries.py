"""Orthogonal dictionaries and K-SVD."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.linalg.ksvd import fit_atoms, ksvd, random_atoms, replace_unused
from compress.linalg.orthogonal_dictionary import (
    largest,
    nearest_orthonormal,
    orthogonal_dictionary,
    principal_directions,
)
from tests.reference import dictionaries as reference


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted(n: int, d: int, k: int, s: int, orthogonal: bool) -> Tensor:
    """Rows that are sparse combinations of k hidden atoms."""
    atoms = torch.linalg.qr(random(d, d))[0][:k] if orthogonal else torch.nn.functional.normalize(random(k, d), dim=1)
    places = torch.rand(n, k, generator=torch.Generator().manual_seed(3)).topk(s, dim=1).indices
    return torch.zeros(n, k, dtype=torch.float64).scatter(1, places, random(n, s, seed=4) + 2) @ atoms


def error(targets: Tensor, codes: Tensor, atoms: Tensor) -> float:
    return float((targets - codes @ atoms).square().sum() / targets.square().sum())


def svd_error(targets: Tensor, rank: int) -> float:
    energies = torch.linalg.svdvals(targets).square()
    return float(energies[rank:].sum() / energies.sum())


@pytest.mark.parametrize(("n", "d", "k", "s"), [(40, 24, 16, 5), (20, 24, 20, 6), (60, 16, 16, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orthogonal_is_orthonormal_and_its_codes_are_exact(n, d, k, s, dtype):
    targets = (random(n, d) @ random(d, d, seed=1)).to(dtype)
    found = orthogonal_dictionary(targets, k, s, 15)
    torch.testing.assert_close(found.atoms @ found.atoms.T, torch.eye(k, dtype=dtype), rtol=0, atol=2e-5)
    assert torch.equal(found.codes, largest(targets @ found.atoms.T, s)) and ((found.codes != 0).sum(1) == s).all()
    assert found.errors[-1] == pytest.approx(error(targets, found.codes, found.atoms), abs=1e-6)
    assert found.errors[-1] <= min(found.errors) * (1 + 1e-4)


def test_one_round_is_the_direct_one_and_more_of_them_are_better():
    targets = random(40, 24) @ random(24, 24, seed=1)
    atoms, codes = reference.orthogonal(targets, 16, 6, 1)
    assert orthogonal_dictionary(targets, 16, 6, 1).errors[1] == pytest.approx(error(targets, codes, atoms), rel=1e-9)
    atoms, codes = reference.orthogonal(targets, 16, 6, 20)
    assert orthogonal_dictionary(targets, 16, 6, 10).errors[-1] < error(targets, codes, atoms)


@pytest.mark.parametrize("n", [30, 9])
def test_all_atoms_for_every_row_are_truncated_svd(n):
    targets = random(n, 16) @ random(16, 16, seed=1)
    found = orthogonal_dictionary(targets, 6, 6, 5)
    assert svd_error(targets, 6) <= found.errors[-1] * (1 + 1e-9) and found.errors[-1] < 1.0001 * svd_error(targets, 6)
    full = min(n, 16)
    assert orthogonal_dictionary(targets, full, full, 2).errors[-1] < 1e-9


def test_orthonormal_also_where_directions_are_missing():
    thin = random(6, 2) @ random(2, 12, seed=1)
    for matrix in (thin, random(6, 12), torch.zeros(3, 12, dtype=torch.float64)):
        found = nearest_orthonormal(matrix)
        torch.testing.assert_close(found @ found.T, torch.eye(len(matrix), dtype=torch.float64))
    directions = principal_directions(random(8, 3) @ random(3, 12, seed=1), 6)
    torch.testing.assert_close(directions @ directions.T, torch.eye(6, dtype=torch.float64))
    empty = orthogonal_dictionary(torch.zeros(5, 8), 4, 2, 3)
    assert not empty.codes.any() and empty.errors == [0.0]
    assert torch.isfinite(orthogonal_dictionary(thin, 5, 2, 6).codes).all()


@pytest.mark.parametrize("orthogonal", [True, False])
def test_planted_dictionaries_are_found_where_low_rank_fails(orthogonal):
    n, d, k, s = 300, 24, 24 if orthogonal else 36, 3
    targets = planted(n, d, k, s, orthogonal)
    if orthogonal:
        found = orthogonal_dictionary(targets, k, s, 200).errors[-1]
    else:
        found = ksvd(targets, random_atoms(targets, k, torch.Generator().manual_seed(1)), s, 60).errors[-1]
    rank = int((d * k + n * (s + k / 16)) / (d + n))  # of equal bytes
    assert found < 0.1 * svd_error(targets, rank)


@pytest.mark.parametrize("block", [1, 5, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ksvd_never_rises(block, dtype):
    targets = (random(80, 20) @ random(20, 20, seed=1)).to(dtype)
    found = ksvd(targets, random_atoms(targets, 26, torch.Generator().manual_seed(1)), 5, 12, block=block)
    torch.testing.assert_close(found.atoms.norm(dim=1), torch.ones(26, dtype=dtype), rtol=1e-5, atol=0)
    assert ((found.codes != 0).sum(1) <= 5).all()
    assert all(after <= before * (1 + 1e-6) for before, after in zip(found.errors, found.errors[1:], strict=False))
    assert found.errors[-1] == pytest.approx(error(targets, found.codes, found.atoms), rel=1e-3)


@pytest.mark.parametrize("block", [1, 4, 12])
def test_atoms_one_by_one_are_the_textbook_and_in_blocks_they_do_not_rise(block):
    targets = random(50, 14)
    atoms = random_atoms(targets, 12, torch.Generator().manual_seed(1))
    codes = largest(targets @ atoms.T, 4)
    expected = error(targets, *reversed(reference.ksvd_step(targets, atoms, codes)))
    before, residual, support = error(targets, codes, atoms), targets - codes @ atoms, codes != 0
    fit_atoms(atoms, codes, residual, block, n_steps=40 if block == 1 else 8)
    torch.testing.assert_close(residual, targets - codes @ atoms)
    assert not codes[~support].any()
    found = error(targets, codes, atoms)
    assert found < before
    if block == 1:
        assert found == pytest.approx(expected, rel=2e-3)


def test_ksvd_betters_the_orthogonal_dictionary_that_it_starts_from():
    targets = random(80, 20) @ random(20, 20, seed=1)
    first = orthogonal_dictionary(targets, 14, 5, 20)
    assert ksvd(targets, first.atoms, 5, 5, first.codes).errors[-1] < 0.99 * first.errors[-1]


def test_atoms_that_nobody_uses_become_what_is_missing_most():
    targets = random(10, 6)
    atoms, codes = torch.nn.functional.normalize(random(4, 6, seed=2), dim=1), torch.zeros(10, 4, dtype=torch.float64)
    codes[:, 0] = targets @ atoms[0]
    residual = targets - codes @ atoms
    kept = atoms.clone()
    replace_unused(atoms, codes, residual)
    assert torch.equal(atoms[0], kept[0]) and torch.equal(residual, targets - codes @ atoms)
    worst = residual[residual.norm(dim=1).argmax()]
    assert float((atoms[1:] @ worst).max()) == pytest.approx(float(worst.norm()))


def test_starting_columns_are_distinct_and_not_empty():
    targets = random(5, 6)
    targets[2] = 0
    atoms = random_atoms(targets, 4, torch.Generator().manual_seed(1))
    assert float((atoms @ atoms.T - torch.eye(4)).abs().fill_diagonal_(0).max()) < 1 - 1e-6
    many = random_atoms(targets, 9, torch.Generator().manual_seed(1))
    torch.testing.assert_close(many.norm(dim=1), torch.ones(9, dtype=torch.float64))
