"""Iterative absolute value decomposition: its identities, and published figures."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.errors import NumericsError
from compress.linalg.absolute_value import ACCURACY, Block, decompose, magnitude_factors, squared_norm
from compress.linalg.signs import sign_bytes, unpack_signs


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def summed(blocks: list[Block], n: int) -> Tensor:
    return sum(unpack_signs(b.signs, n) * (b.left.float() @ b.right.float().T) for b in blocks)  # type: ignore[return-value]


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (17, 13), (5, 8)])
def test_the_stored_blocks_leave_the_error_they_say_and_it_falls(shape, exact):
    weight = gaussian(*shape)
    kept = weight.clone()
    blocks = list(decompose(weight, 3, 6, exact=exact, generator=generator()))
    assert torch.equal(weight, kept)
    before = squared_norm(weight)
    for n, block in enumerate(blocks, start=1):
        assert block.signs.dtype == torch.uint8 and block.signs.shape == (shape[0], sign_bytes(shape[1]))
        assert block.left.dtype == block.right.dtype == torch.float16
        assert block.left.shape == (shape[0], 3) and block.right.shape == (shape[1], 3)
        left_over = squared_norm(weight - summed(blocks[:n], shape[1]))
        assert block.energy == pytest.approx(left_over, rel=1e-4)
        assert block.energy < before
        before = block.energy


def test_the_energy_falls_by_the_squares_of_the_singular_values_before_rounding():
    weight = gaussian(48, 64)
    left, right = magnitude_factors(weight.abs(), 4, exact=True, generator=generator())
    sigma = torch.linalg.svdvals(weight.abs().double())[:4]
    rest = weight.double() - torch.where(weight < 0, -1, 1) * (left.double() @ right.double().T)
    assert squared_norm(rest) == pytest.approx(squared_norm(weight.double()) - float(sigma.square().sum()), rel=1e-5)
    torch.testing.assert_close(left.norm(dim=0).double().square(), sigma, rtol=1e-5, atol=0)
    torch.testing.assert_close(right.norm(dim=0).double().square(), sigma, rtol=1e-5, atol=0)


TABLE = {1: [0.602, 0.360, 0.241, 0.180, 0.149, 0.131], 16: [0.580, 0.336, 0.212, 0.145, 0.108, 0.086]}


@pytest.mark.parametrize("rank", TABLE)
def test_errors_of_normal_entries_are_the_published_ones(rank):
    weight = gaussian(768, 768)
    whole = squared_norm(weight)
    found = [(b.energy / whole) ** 0.5 for b in decompose(weight, rank, 6, generator=generator(1))]
    assert found == pytest.approx(TABLE[rank], abs=1.2e-3)  # half a unit of the table, and what matrices differ by


@pytest.mark.parametrize("shape", [(256, 256), (192, 512)])
def test_subspace_iteration_is_as_accurate_as_stated(shape):
    weight = gaussian(*shape, seed=3)
    exact = [b.energy**0.5 for b in decompose(weight, 16, 4, exact=True, generator=generator())]
    found = [b.energy**0.5 for b in decompose(weight, 16, 4, generator=generator())]
    for error, best in zip(found, exact, strict=True):
        assert error <= best * (1 + ACCURACY)


def test_more_directions_than_there_are_lose_nothing():
    weight = gaussian(12, 30)
    (exact,) = decompose(weight, 12, 1, exact=True, generator=generator())
    (found,) = decompose(weight, 12, 1, generator=generator())
    assert found.energy < 1e-5 * squared_norm(weight) and exact.energy < 1e-5 * squared_norm(weight)


def test_zeros_count_as_positive_and_a_matrix_of_signs_needs_one_block():
    weight = torch.tensor([[0.0, -0.0, 1.0, -1.0]]).repeat(6, 1)
    (block,) = decompose(weight, 2, 1, generator=generator())
    assert unpack_signs(block.signs, 4)[0].tolist() == [1, 1, 1, -1]
    flat = torch.where(gaussian(16, 24) < 0, -0.25, 0.25)
    first, *others = decompose(flat, 1, 4, generator=generator())
    assert first.energy < 1e-6 * squared_norm(flat)
    assert all(b.energy <= a.energy for a, b in zip([first, *others], others, strict=False))


def test_nothing_to_say_is_said_with_zeros():
    for block in decompose(torch.zeros(6, 9), 2, 3, generator=generator()):
        assert block.energy == 0 and not block.left.any() and not block.right.any()
    tiny = gaussian(8, 8) * 1e-20  # below what the factors can hold
    energies = [b.energy for b in decompose(tiny, 2, 3, generator=generator())]
    assert all(energy <= squared_norm(tiny) for energy in energies)


def test_the_same_generator_gives_the_same_blocks():
    weight = gaussian(40, 56)
    first, second = (list(decompose(weight, 4, 2, generator=generator(5))) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.signs, b.signs) and torch.equal(a.left, b.left) and torch.equal(a.right, b.right)


@pytest.mark.parametrize(("value", "message"), [(float("nan"), "NaN"), (1e20, "float16 cannot hold")])
def test_what_cannot_be_stored_is_an_error(value, message):
    weight = gaussian(8, 8)
    weight[2, 3] = value
    with pytest.raises(NumericsError, match=message):
        list(decompose(weight, 2, 1, generator=generator()))


@pytest.mark.parametrize("exact", [False, True])
def test_turned_signs_leave_less_than_those_of_the_rest(exact):
    """The published decomposition, whose signs are those of what is left, is worse after every block."""
    matrix = torch.randn(64, 96, generator=torch.Generator().manual_seed(3))
    rest, published = matrix.clone(), []
    for _ in range(4):
        u, sigma, vt = torch.linalg.svd(rest.abs(), full_matrices=False)
        rest = rest - torch.where(rest < 0, -1.0, 1.0) * ((u[:, :8] * sigma[:8]) @ vt[:8])
        published.append(squared_norm(rest))
    ours = [b.energy for b in decompose(matrix, 8, 4, exact=exact, generator=torch.Generator().manual_seed(0))]
    assert all(mine < theirs for mine, theirs in zip(ours, published, strict=True))
