"""Principal directions: orthonormal, the best of their number, and blind to nothing but what is cut."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import NumericsError
from compress.linalg.principal import principal_basis

FLOAT64 = {"rtol": 0, "atol": 1e-10}


def vectors(n_rows: int, n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n_rows, n, generator=generator, dtype=torch.float64) * torch.logspace(
        0, -3, n, dtype=torch.float64
    )


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 24), n_rows=st.integers(1, 40), width=st.integers(1, 24), centred=st.booleans())
def test_orthonormal_and_what_is_lost_is_said(n, n_rows, width, centred):
    x, width = vectors(n_rows, n), min(width, n)
    x = x - x.mean(1, keepdim=True) if centred else x
    basis, lost = principal_basis(x.T @ x, width, centred)
    torch.testing.assert_close(basis.T @ basis, torch.eye(width, dtype=torch.float64), **FLOAT64)
    outside = (x - x @ basis @ basis.T).square().sum() / x.square().sum().clamp_min(1e-300)
    assert lost == pytest.approx(float(outside), abs=1e-9)


def test_no_other_directions_lose_less_and_more_lose_less():
    x = vectors(100, 16)
    moment = x.T @ x
    lost = [principal_basis(moment, width)[1] for width in range(1, 17)]
    assert lost == sorted(lost, reverse=True) and lost[-1] == 0
    other, _ = torch.linalg.qr(vectors(16, 4, seed=1))
    assert float((x - x @ other @ other.T).square().sum() / x.square().sum()) > lost[3]


def test_longest_first():
    x = vectors(100, 16)
    basis, _ = principal_basis(x.T @ x, 8)
    assert (x @ basis).square().sum(0).diff().max() <= 0


@pytest.mark.parametrize("n_rows", [3, 100])
def test_the_direction_of_equal_entries_is_the_first_to_go(n_rows):
    """Also where few vectors leave many other directions that none of them has a part in."""
    x = vectors(n_rows, 16)
    x = x - x.mean(1, keepdim=True)
    basis, _ = principal_basis(x.T @ x, 15, centred=True)
    torch.testing.assert_close(basis.sum(0), torch.zeros(15, dtype=torch.float64), **FLOAT64)
    whole, lost = principal_basis(x.T @ x, 16, centred=True)
    torch.testing.assert_close(whole @ whole.T, torch.eye(16, dtype=torch.float64), **FLOAT64)
    assert lost == 0


def test_nothing_and_what_is_not_finite():
    basis, lost = principal_basis(torch.zeros(4, 4, dtype=torch.float64), 2)
    assert lost == 0 and torch.isfinite(basis).all()
    with pytest.raises(NumericsError, match="not finite"):
        principal_basis(torch.full((2, 2), torch.nan, dtype=torch.float64), 1)
