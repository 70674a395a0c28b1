from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.linalg.kmeans import RUNS, cost, nearest, weighted_kmeans
from tests.reference.lookup import best_kmeans_cost


def problem(n_rows: int, n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n_rows, n, generator=generator, dtype=torch.float64)
    return values, torch.rand(n_rows, n, generator=generator, dtype=torch.float64)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(4, 9), st.integers(2, 4), st.booleans())
def test_no_way_of_cutting_is_better(seed, n, k, some_weigh_nothing):
    values, weights = problem(2, n, seed)
    if some_weigh_nothing:
        weights[:, : n // 2] = 0
    centres = weighted_kmeans(values, weights, k)
    assert (centres.diff(dim=1) >= 0).all()
    for row, found in enumerate(cost(values, weights, centres)):
        assert float(found) == pytest.approx(best_kmeans_cost(values[row], weights[row], k), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("n", [60, 3 * RUNS])
def test_more_centres_cost_less_and_lloyd_cannot_improve(n):
    values, weights = problem(5, n)
    costs = [cost(values, weights, weighted_kmeans(values, weights, k)) for k in (2, 4, 8, 16)]
    assert all((after < before).all() for before, after in pairwise(costs))
    centres = weighted_kmeans(values, weights, 8)
    chosen = torch.nn.functional.one_hot(nearest(values, centres), 8).double() * weights.unsqueeze(2)
    means = (chosen * values.unsqueeze(2)).sum(1) / chosen.sum(1)
    assert (cost(values, weights, means) >= costs[2] * (1 - 1e-4)).all()


def test_long_rows_are_nearly_as_good_as_exact(monkeypatch):
    values, weights = problem(3, 4 * RUNS)
    found = cost(values, weights, weighted_kmeans(values, weights, 16))
    monkeypatch.setattr("compress.linalg.kmeans.RUNS", 4 * RUNS)
    exact = cost(values, weights, weighted_kmeans(values, weights, 16))
    assert (exact * (1 - 1e-6) <= found).all() and (found <= exact * 1.01).all()


@pytest.mark.parametrize("n", [40, 2 * RUNS])
def test_numbers_without_weight_do_not_count(n):
    values, weights = problem(4, n)
    without = weighted_kmeans(values, weights, 4)
    noise = torch.randn(4, 10, generator=torch.Generator().manual_seed(9), dtype=torch.float64) * 50
    more = weighted_kmeans(
        torch.cat([values, noise], 1), torch.cat([weights, torch.zeros(4, 10, dtype=torch.float64)], 1), 4
    )
    if n < RUNS:
        torch.testing.assert_close(more, without)
    else:  # runs are cut elsewhere
        torch.testing.assert_close(cost(values, weights, more), cost(values, weights, without), rtol=1e-2, atol=0)


@pytest.mark.parametrize("n", [40, 2 * RUNS])
def test_the_scale_of_the_weights_does_not_count(n):
    values, weights = problem(4, n)
    torch.testing.assert_close(weighted_kmeans(values, weights * 2.0**20, 8), weighted_kmeans(values, weights, 8))
    torch.testing.assert_close(
        weighted_kmeans(values * 2.0**-30, weights, 8), weighted_kmeans(values, weights, 8) * 2.0**-30
    )


@pytest.mark.parametrize("n", [50, 2 * RUNS])
def test_few_distinct_values_come_out_as_they_are(n):
    generator = torch.Generator().manual_seed(3)
    distinct = torch.tensor([-0.7, -0.1, 0.0, 0.3, 2.0])
    values = distinct[torch.randint(5, (3, n), generator=generator)]
    weights = torch.rand(3, n, generator=generator) + 0.01
    centres = weighted_kmeans(values, weights, 8).float()
    assert torch.equal(centres.gather(1, nearest(values, centres)), values)


def test_a_row_without_weight_counts_all_alike_and_constant_rows_are_exact():
    values, _ = problem(2, 30)
    found = weighted_kmeans(values, torch.zeros(30), 4)
    torch.testing.assert_close(found, weighted_kmeans(values, torch.ones(30), 4))
    for constant in (0.0, 0.25):
        rows = torch.full((2, 30), constant)
        centres = weighted_kmeans(rows, torch.ones(30), 4)
        assert torch.isfinite(centres).all() and not cost(rows, torch.ones(2, 30), centres).any()
