from __future__ import annotations

import pytest
import torch

from compress.errors import NumericsError
from compress.linalg import cholesky
from compress.linalg.cholesky import INVERSE_LEAF, inverse_factor, invert_lower_
from tests.linalg.problems import correlated


@pytest.mark.parametrize("n", [1, 2, 63, INVERSE_LEAF + 37])
def test_factor_of_the_damped_inverse(n):
    _, hessian = correlated(1, n)
    untouched = hessian.clone()
    factor = inverse_factor(hessian, 0.01)
    damped = hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(n)
    assert torch.equal(factor.upper, factor.upper.triu())
    assert (factor.upper.diagonal() > 0).all()
    torch.testing.assert_close(
        factor.upper.double().T @ factor.upper.double() @ damped, torch.eye(n).double(), atol=1e-3, rtol=0
    )
    assert (factor.damping, factor.precision, factor.n_attempts) == (0.01, torch.float32, 1)
    assert factor.added == pytest.approx(0.01 * float(hessian.diagonal().mean()), rel=1e-5)
    assert torch.equal(hessian, untouched)


def test_factor_agrees_with_the_original_route():
    _, hessian = correlated(1, 300)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(300)
    original = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped.double())), upper=True)
    torch.testing.assert_close(
        inverse_factor(hessian, 0.01).upper.double(), original, rtol=1e-3, atol=1e-4 * float(original.max())
    )


@pytest.mark.parametrize("n", [1, 5, INVERSE_LEAF, 2 * INVERSE_LEAF + 11])
def test_inverse_of_a_triangle(n):
    lower = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)).tril() / n + torch.eye(n)
    inverse = invert_lower_(lower.clone())
    assert torch.equal(inverse, inverse.tril())
    torch.testing.assert_close(inverse @ lower, torch.eye(n).double())


@pytest.mark.parametrize("n_tokens", [1, 3, 40])
def test_few_tokens_make_a_singular_moment_and_damping_mends_it(n_tokens):
    _, hessian = correlated(1, 64, n_tokens=n_tokens)
    factor = inverse_factor(hessian, 0.01)
    assert factor.damping == 0.01
    assert torch.isfinite(factor.upper).all()


def test_float64_mends_what_float32_cannot_at_the_same_damping():
    x = torch.ones(4, 200, dtype=torch.float64) + 1e-6 * torch.randn(4, 200, generator=torch.Generator().manual_seed(0))
    factor = inverse_factor(x.T @ x, 1e-9)  # eigenvalues 800 and about 1e-9 x 4: below the digits of float32
    assert factor.precision == torch.float64
    assert factor.damping == 1e-9
    assert factor.n_attempts == 2


def test_damping_is_raised_from_the_undamped_matrix():
    hessian = torch.eye(8)
    hessian[0, 1] = hessian[1, 0] = 1.095  # smallest eigenvalue -0.095: 0.10 of the mean diagonal mends it
    factor = inverse_factor(hessian, 0.01)
    assert factor.damping == pytest.approx(0.10)
    assert factor.added == pytest.approx(0.10)  # the tenth rung, not the sum of ten rungs
    assert factor.n_attempts == 19  # nine fractions in both precisions, then the tenth
    inverse = torch.linalg.inv(hessian.double() + factor.added * torch.eye(8).double())
    torch.testing.assert_close(factor.upper.double().T @ factor.upper.double(), inverse, rtol=1e-3, atol=1e-3)


def test_floor_is_the_next_rung():
    hessian = torch.diag(torch.tensor([1.0] * 15 + [1e4]))
    hessian[0, 1] = hessian[1, 0] = 900.0
    hessian.diagonal().neg_()  # negative mean: no fraction of it can help, the floor must outweigh it
    hessian.diagonal()[-1] = 1e4
    factor = inverse_factor(hessian, 0.01)
    assert factor.added >= 900 - 1
    assert torch.isfinite(factor.upper).all()


def test_the_last_rung_fails_with_a_remedy():
    hessian = torch.tensor([[1.0, 50.0], [50.0, 1.0]])
    with pytest.raises(NumericsError, match="more varied, tokens"):
        inverse_factor(hessian, 0.01)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_at_once(bad, monkeypatch):
    monkeypatch.setattr(cholesky, "_ladder", None)
    hessian = torch.eye(4)
    hessian[1, 2] = bad
    with pytest.raises(NumericsError, match="NaN or infinity"):
        inverse_factor(hessian, 0.01)
