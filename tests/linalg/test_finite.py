"""Whether a tensor is finite."""

from __future__ import annotations

import math

import pytest
import torch

from compress.linalg.finite import all_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(), (3,), (700, 5), (2, 3, 4)])
def test_one_bad_element_is_found(dtype, shape):
    tensor = torch.randn(shape, dtype=dtype)
    assert all_finite(tensor)
    for bad in (math.nan, math.inf, -math.inf):
        damaged = tensor.clone()
        damaged.view(-1)[-1] = bad
        assert not all_finite(damaged)


def test_infinities_of_both_signs_do_not_cancel():
    assert not all_finite(torch.tensor([math.inf, -math.inf, 1.0]))


def test_a_sum_that_overflows_is_no_infinite_element():
    largest = torch.finfo(torch.float32).max
    assert all_finite(torch.full((4, 4), largest))
    assert all_finite(torch.full((4, 4), 1e300, dtype=torch.float64))


def test_nothing_is_finite():
    assert all_finite(torch.empty(0, 4))
