"""The gradient through a truncated singular value decomposition: against finite differences, and where values meet."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.errors import NumericsError
from compress.linalg.svd_gradient import gate, inverse_gap, truncate
from tests.reference import svd_gradient as reference

BETA = 1.3  # soft enough that many gates are partly open


def matrix(rows: int, columns: int, values: list[float] | None = None, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    if values is None:
        return found
    u, _, vh = torch.linalg.svd(found, full_matrices=False)
    return (u * torch.tensor(values, dtype=torch.float64)) @ vh


def gradients(function, y: Tensor, position: float, weights: Tensor, *options) -> tuple[Tensor, Tensor]:
    y, k = y.clone().requires_grad_(), torch.tensor(position, dtype=torch.float64, requires_grad=True)
    (function(y, k, BETA, *options) * weights).sum().backward()
    return y.grad, k.grad


SHAPES = [(7, 5), (5, 7), (6, 6)]


@pytest.mark.parametrize("shape", SHAPES)
def test_is_what_finite_differences_give(shape):
    y = matrix(*shape)
    values = torch.linalg.svdvals(y)
    assert (values[:-1] - values[1:]).min() > 1e-2
    # no pair is so close that the series stands in for the exact gap
    assert (1 - (values[1:] / values[:-1]) ** 2).min() > 1 / 40
    position = torch.tensor(2.7, dtype=torch.float64, requires_grad=True)

    def function(y, position):
        return truncate(y, position, BETA, 40)

    assert torch.autograd.gradcheck(function, (y.requires_grad_(), position), eps=1e-6, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_decompositions_own_gradient_contracted(shape):
    y, weights = matrix(*shape, values=[5.0, 4.0, 3.0, 2.0, 1.0, 0.5][: min(shape)]), matrix(*shape, seed=1)
    for position in (0.5, 2.2, 4.9, 9.0):
        found, to_position = gradients(truncate, y, position, weights)
        expected, expected_position = gradients(reference.truncate, y, position, weights)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(to_position, expected_position)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_references_decomposition_is_torchs(shape):
    """... so that what the truncation is held to is held to something itself."""
    y, weights = matrix(*shape), matrix(*shape, seed=1)
    found, _ = gradients(reference.truncate, y, 2.7, weights)

    def by_torch(y, position, beta):
        u, s, vh = torch.linalg.svd(y, full_matrices=False)
        return (u * (s * gate(position, len(s), beta))) @ vh

    torch.testing.assert_close(found, gradients(by_torch, y, 2.7, weights)[0])


def test_the_gradient_of_the_position_is_the_papers():
    y, weights = matrix(7, 5), matrix(7, 5, seed=1)
    u, s, vh = torch.linalg.svd(y, full_matrices=False)
    index = torch.arange(1, 6, dtype=torch.float64)
    expected = ((u.T @ weights @ vh.T).diagonal() * s * BETA / 2 / torch.cosh(BETA * (2.7 - index)) ** 2).sum()
    torch.testing.assert_close(gradients(truncate, y, 2.7, weights)[1], expected)


def test_open_gates_change_nothing():
    y, weights = matrix(7, 5, values=[3.0, 3.0, 2.0, 2.0, 0.0]), matrix(7, 5, seed=1)
    torch.testing.assert_close(truncate(y, torch.tensor(100.0), 10.0), y)
    found, to_position = gradients(truncate, y, 100.0, weights)
    torch.testing.assert_close(found, weights)  # ties and zeros included
    assert to_position == 0


def test_a_steep_gate_truncates():
    y = matrix(7, 5)
    u, s, vh = torch.linalg.svd(y, full_matrices=False)
    torch.testing.assert_close(truncate(y, torch.tensor(2.5), 1e3), (u[:, :2] * s[:2]) @ vh[:2])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "values",
    [[2.0, 1.0, 1.0, 1.0, 0.5], [2.0, 1.0, 0.0, 0.0, 0.0], [0.0] * 5, [1.0, 1 - 1e-12, 1 - 1e-9, 1 - 1e-5, 1e-14]],
)
def test_repeated_and_zero_values_have_bounded_gradients(shape, values):
    values = values + [0.0] * (min(shape) - 5)
    y, weights = matrix(*shape, values=values), matrix(*shape, seed=1)
    for position in (1.4, 2.5, 3.0):
        found, to_position = gradients(truncate, y, position, weights)
        assert torch.isfinite(found).all() and torch.isfinite(to_position)
        # G P has at most the norm of G; E s^2 is at most K + 1 = 11, and comes twice
        assert found.norm() <= (1 + 2 * 11) * weights.norm()


def test_across_a_tie_the_series_stands_for_the_gap():
    gaps = inverse_gap(torch.tensor([2.0, 2.0, 1.99, 1.0, 1e-30, 0.0], dtype=torch.float64), 10)
    torch.testing.assert_close(gaps, gaps.T)
    assert gaps[0, 1] == 11 / 4
    assert gaps[4, 5] == 11 / (2e-10) ** 2  # both at the floor
    torch.testing.assert_close(float(gaps[0, 2]), reference.inverse_gap(2.0, 1.99, 10))
    torch.testing.assert_close(float(gaps[0, 3]), 1 / 3)
    assert gaps.diagonal().eq(0).all()


@pytest.mark.parametrize("terms", [0, 1, 10, 50])
def test_the_gap_is_bounded_and_never_more_than_it_is(terms):
    values = torch.cat([torch.linspace(1, 0.3, 40), 1 - torch.logspace(-16, -1, 40)]).double().sort(descending=True)[0]
    gaps = inverse_gap(values, terms)
    larger = torch.maximum(values[:, None], values)
    assert (gaps <= (terms + 1) / larger**2 * (1 + 1e-12)).all()
    for i in range(0, 80, 7):
        for j in range(i + 1, 80):
            torch.testing.assert_close(
                float(gaps[i, j]), reference.inverse_gap(float(values[i]), float(values[j]), terms), rtol=1e-7, atol=0
            )


def test_nothing_to_truncate():
    assert truncate(torch.zeros(0, 5), torch.tensor(2.0), 10.0).shape == (0, 5)
    found, _ = gradients(truncate, torch.zeros(4, 3, dtype=torch.float64), 1.5, torch.ones(4, 3))
    assert torch.isfinite(found).all()


def test_what_is_not_finite_is_refused():
    y = torch.zeros(4, 3)
    y[1, 1] = float("nan")
    with pytest.raises(NumericsError, match="NaN or infinity"):
        truncate(y, torch.tensor(2.0), 10.0)
