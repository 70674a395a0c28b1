import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.linalg.exact import BITS, exact_product, fixed_point


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 300), scale=st.sampled_from([1e-30, 1e-3, 1.0, 7e20]), seed=st.integers(0, 99))
def test_product(n, scale, seed):
    x, matrix = normal(5, n, seed=seed) * scale, normal(n, 3, seed=seed + 1)
    largest = x.abs().amax(1, keepdim=True) * matrix.abs().max()
    error = (exact_product(x, matrix) - x @ matrix).abs() / largest
    assert float(error.max()) < 4 * n * 2.0 ** (-2 * BITS)


@pytest.mark.parametrize("n", [37, 512, 4096])
def test_a_row_depends_on_that_row_only(n):
    x, matrix = normal(200, n), normal(n, 40, seed=1)
    whole = exact_product(x, matrix)
    for first, last in ((0, 1), (3, 8), (17, 150), (199, 200)):
        assert torch.equal(exact_product(x[first:last], matrix), whole[first:last])
    order = torch.randperm(n, generator=torch.Generator().manual_seed(2))
    assert torch.equal(exact_product(x[:, order], matrix[order]), whole)  # no rounding, hence no order


def test_fixed_point():
    x = normal(4, 9)
    x[2] = 0
    rounded = fixed_point(x, 10)
    size = x.abs().amax(1, keepdim=True)
    assert ((rounded - x).abs() <= size * 2.0**-10).all()
    assert torch.equal(fixed_point(rounded, 10), rounded)
    steps = rounded[0] * 2.0 ** (10 - torch.frexp(size[0, 0]).exponent)
    assert torch.equal(steps, steps.round())
    assert fixed_point(x[:0], 10).shape == (0, 9)
    small = torch.tensor([[3.0, 1.0]], dtype=torch.float32).double()
    assert torch.equal(fixed_point(small, 30), small)
