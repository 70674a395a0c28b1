"""Masks that scores give, and the column loop that prunes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.linalg.cholesky import inverse_factor
from compress.linalg.error_feedback import round_columns
from compress.linalg.grid import GridRule, fit_grid
from compress.linalg.order import act_order, group_order
from compress.linalg.quadratic import energy
from compress.linalg.sparse_feedback import Pattern, prune_columns
from compress.linalg.sparsity import (
    highest,
    highest_of_groups,
    highest_of_rows,
    nowag_normalised,
    nowag_scores,
    wanda_scores,
)
from tests.linalg.problems import correlated
from tests.reference.sparsegpt import sparsegpt

TWO = Pattern(2, 4)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 12), st.data())
def test_the_highest_of_groups_are_kept_and_of_equal_ones_the_first(m, data):
    n = data.draw(st.integers(1, m - 1))
    scores = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=2 * m, max_size=2 * m))).float()
    mask = highest_of_groups(scores[None], n, m)
    for group in range(2):
        values = scores[group * m : (group + 1) * m].tolist()
        expected = sorted(range(m), key=lambda i: (-values[i], i))[:n]
        assert mask[0, group * m : (group + 1) * m].nonzero().flatten().tolist() == sorted(expected)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 12), st.data())
def test_exactly_so_many_are_kept_in_each_row_and_in_all(n_rows, width, data):
    values = data.draw(st.lists(st.integers(0, 4), min_size=n_rows * width, max_size=n_rows * width))
    scores = torch.tensor(values).float().view(n_rows, width)
    n = data.draw(st.integers(0, width))
    mask = highest_of_rows(scores, n)
    assert mask.sum(1).tolist() == [n] * n_rows
    if 0 < n < width:
        assert all(row[kept].min() >= row[~kept].max() for row, kept in zip(scores, mask, strict=True))
    whole = highest(scores, n * n_rows)
    assert whole.sum() == n * n_rows
    if 0 < n < width:
        assert scores[whole].min() >= scores[~whole].max()


def test_wanda_with_inputs_of_one_size_is_magnitude():
    weight, _ = correlated(6, 32)
    assert torch.equal(
        highest_of_groups(wanda_scores(weight, torch.full((32,), 7.0)), 2, 4), highest_of_groups(weight.abs(), 2, 4)
    )


def test_nowag_normalisation_comes_back_and_scales_of_columns_change_no_score():
    weight, hessian = correlated(6, 32)
    normalised, rows, columns = nowag_normalised(weight)
    torch.testing.assert_close(rows[:, None] * normalised * columns, weight)
    squares = hessian.diagonal()
    with_unit = highest_of_groups(nowag_scores(weight, torch.ones(32)), 2, 4)
    assert torch.equal(with_unit, highest_of_groups(normalised.abs(), 2, 4))
    scales = torch.rand(32, generator=torch.Generator().manual_seed(0)) + 1
    torch.testing.assert_close(
        nowag_scores(weight * scales, squares), nowag_scores(weight, squares), rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize("pattern", [TWO, Pattern(3, 5), Pattern(1, 20), Pattern(0, 0, 6 * 24, 16), Pattern(0, 0, 200)])
def test_without_correlation_the_loop_is_magnitude(pattern):
    weight, _ = correlated(6, 40)
    pruned = prune_columns(weight, torch.eye(40), pattern, torch.float32)
    if pattern.m:
        expected = highest_of_groups(weight.abs(), pattern.n, pattern.m)
    else:
        size = pattern.block_size
        starts = range(0, 40, size)
        parts = [
            highest(weight[:, s : s + size].abs(), pattern.share(s, min(s + size, 40), 40))
            for s in starts
        ]  # fmt: skip
        expected = torch.cat(parts, 1)
    assert torch.equal(pruned.mask, expected)
    torch.testing.assert_close(pruned.weight, weight * expected, rtol=0, atol=0)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 3), (5, 8), (3, 24)])
def test_equals_the_slow_one(n, m):
    weight, hessian = correlated(5, 48, n_tokens=400)
    factor = inverse_factor(hessian, 0.01)
    expected = sparsegpt(weight, hessian + factor.added * torch.eye(48), n, m)
    pruned = prune_columns(weight, factor.upper, Pattern(n, m), torch.float32)
    torch.testing.assert_close(pruned.weight.double(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("block_size", [1, 16, 40, 1000])
def test_of_groups_blocking_changes_nothing_but_rounding(block_size):
    weight, hessian = correlated(6, 80)
    upper = inverse_factor(hessian, 0.01).upper
    expected = prune_columns(weight, upper, TWO, torch.float32)
    found = prune_columns(weight, upper, Pattern(2, 4, block_size=block_size), torch.float32)
    assert torch.equal(found.mask, expected.mask)
    torch.testing.assert_close(found.weight, expected.weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("pattern", [TWO, Pattern(0, 0, 1000, 32), Pattern(0, 0, 1500, 7), Pattern(0, 0, 2047)])
def test_feeding_back_beats_the_same_mask_without_and_the_loss_is_what_it_says(pattern):
    weight, hessian = correlated(32, 64)
    factor = inverse_factor(hessian, 0.01)
    pruned = prune_columns(weight, factor.upper, pattern, torch.float32)
    assert pruned.mask.sum() == (32 * 32 if pattern.m else pattern.kept)
    assert (pruned.weight[~pruned.mask] == 0).all()
    damped = hessian + factor.added * torch.eye(64)
    lost = energy((weight - pruned.weight).double(), damped.double())
    assert lost <= energy((weight * ~pruned.mask).double(), damped.double())
    assert float(pruned.loss.sum()) == pytest.approx(lost, rel=1e-3)
    magnitude = highest_of_groups(weight.abs(), 2, 4) if pattern.m else highest(weight.abs(), pattern.kept)
    wanda = wanda_scores(weight, hessian.diagonal())
    by_wanda = highest_of_groups(wanda, 2, 4) if pattern.m else highest(wanda, pattern.kept)
    assert lost <= energy((weight * ~magnitude).double(), damped.double())
    assert lost <= energy((weight * ~by_wanda).double(), damped.double())


def test_groups_stay_whole_in_any_order():
    weight, hessian = correlated(8, 48)
    order = group_order(hessian.diagonal(), 4)
    assert torch.equal(order.view(-1, 4) % 4, torch.arange(4).expand(12, 4))
    sums = hessian.diagonal()[order].view(-1, 4).sum(1)
    assert (sums.diff() <= 0).all()
    factor = inverse_factor(hessian, 0.01, order)
    pruned = prune_columns(weight, factor.upper, TWO, torch.float32, order=order)
    assert (pruned.mask.view(8, 12, 4).sum(-1) == 2).all()
    damped = (hessian + factor.added * torch.eye(48)).double()
    assert float(pruned.loss.sum()) == pytest.approx(energy((weight - pruned.weight).double(), damped), rel=1e-3)


def test_what_is_kept_lies_on_the_grid_that_is_given():
    weight, hessian = correlated(8, 64)
    factor = inverse_factor(hessian, 0.01)
    grid = fit_grid(weight, 16, GridRule(4, scale_dtype=torch.bfloat16))
    pruned = prune_columns(weight, factor.upper, TWO, torch.bfloat16, grid)
    assert pruned.codes is not None
    torch.testing.assert_close(grid.decode(pruned.codes), pruned.weight, rtol=0, atol=0)
    assert (pruned.codes[~pruned.mask] == 8).all() and (pruned.mask.view(8, 16, 4).sum(-1) == 2).all()
    damped = (hessian + factor.added * torch.eye(64)).double()
    assert float(pruned.loss.sum()) == pytest.approx(energy((weight - pruned.weight).double(), damped), rel=1e-3)


@pytest.mark.parametrize("static_groups", [True, False])
@pytest.mark.parametrize("ordered", [True, False])
def test_rounding_under_a_mask_keeps_it_and_feeds_back_what_it_took(static_groups, ordered):
    weight, hessian = correlated(16, 64)
    mask = highest_of_groups(weight.abs(), 2, 4)
    order = act_order(hessian.diagonal()) if ordered and static_groups else None
    factor = inverse_factor(hessian, 0.01, order)
    rounded = round_columns(weight * mask, factor.upper, GridRule(3), 16, order, static_groups=static_groups, mask=mask)
    found = rounded.grid.decode(rounded.codes)
    assert (found[~mask] == 0).all()
    damped = (hessian + factor.added * torch.eye(64)).double()
    lost = energy((weight * mask - found).double(), damped)
    assert float(rounded.loss.sum()) == pytest.approx(lost, rel=1e-3)
    nearest = fit_grid(weight * mask, 16, GridRule(3))
    assert lost < energy((weight * mask - nearest.decode(nearest.encode(weight * mask))).double(), damped)
    if static_groups:
        torch.testing.assert_close(rounded.grid.scale, nearest.scale)


def test_a_mask_of_ones_changes_nothing():
    weight, hessian = correlated(16, 64)
    upper = inverse_factor(hessian, 0.01).upper
    expected = round_columns(weight, upper, GridRule(4), 16)
    found = round_columns(weight, upper, GridRule(4), 16, mask=torch.ones_like(weight, dtype=torch.bool))
    assert torch.equal(found.codes, expected.codes)
