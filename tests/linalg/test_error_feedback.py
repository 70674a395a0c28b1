from __future__ import annotations

import pytest
import torch

from compress.linalg.cholesky import inverse_factor
from compress.linalg.error_feedback import LEAF, Rounded, round_columns
from compress.linalg.grid import GridRule, fit_grid
from compress.linalg.order import act_order, group_aware_order
from compress.linalg.quadratic import row_energy
from tests.linalg.problems import correlated
from tests.reference.gptq import gptq_reference

ORDERS = ["none", "act", "gar"]


def order_of(name: str, hessian: torch.Tensor, group_size: int) -> torch.Tensor | None:
    diagonal = hessian.diagonal()
    return {"none": None, "act": act_order(diagonal), "gar": group_aware_order(diagonal, group_size)}[name]


def solve(
    weight, hessian, rule, group_size=-1, order="none", damping=0.01, **options
) -> tuple[Rounded, torch.Tensor, float]:
    """Rounded, its weight, and what damping added."""
    permutation = order_of(order, hessian, group_size)
    ordered = hessian if permutation is None else hessian[permutation][:, permutation]
    factor = inverse_factor(ordered, damping)
    rounded = round_columns(weight, factor.upper, rule, group_size, permutation, **options)
    return rounded, rounded.grid.decode(rounded.codes), factor.added


def same_codes(a: torch.Tensor, b: torch.Tensor, allowed: float) -> None:
    """Equal but for weights within rounding of a tie, whose neighbours then differ too."""
    assert (a != b).float().mean() <= allowed


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("group_size", [-1, 8])
def test_blocked_equals_column_by_column(group_size, order, symmetric):
    weight, hessian = correlated(24, 40)
    rule = GridRule(3, symmetric, scale_dtype=torch.bfloat16)  # unrounded, the largest weight is a tie by construction
    _, dense, added = solve(weight, hessian, rule, group_size, order)
    columns = torch.arange(40) if order == "none" else order_of(order, hessian, group_size)
    grid = fit_grid(weight, group_size, rule)
    width = 40 if group_size == -1 else group_size
    scale = grid.scale.double().repeat_interleave(width, 1)
    zero = torch.full_like(scale, 4) if symmetric else grid.zero_point.double().repeat_interleave(width, 1)
    damped = hessian.double() + added * torch.eye(40)
    expected = torch.empty(24, 40, dtype=torch.float64)
    expected[:, columns] = gptq_reference(
        weight[:, columns], damped[columns][:, columns], scale[:, columns], zero[:, columns], 3, rule.scale_dtype
    )
    torch.testing.assert_close(dense.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("block_size", [1, 7, LEAF, 50, 1000])
@pytest.mark.parametrize(("order", "static"), [("none", True), ("none", False), ("act", True), ("gar", False)])
def test_blocking_changes_nothing(block_size, order, static):
    weight, hessian = correlated(16, 192)
    rule = GridRule(4, symmetric=False)
    expected, _, _ = solve(weight, hessian, rule, 32, order, static_groups=static)
    rounded, _, _ = solve(weight, hessian, rule, 32, order, static_groups=static, block_size=block_size)
    same_codes(rounded.codes, expected.codes, allowed=0.02)
    torch.testing.assert_close(rounded.loss.sum(), expected.loss.sum(), rtol=1e-2, atol=0)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("group_size", [-1, 8, 32, 192])
def test_loss_is_the_damped_quadratic_form(order, static, group_size):
    weight, hessian = correlated(16, 192)
    rounded, dense, added = solve(
        weight, hessian, GridRule(3), group_size, order, static_groups=static or order == "act"
    )
    damped = hessian + added * torch.eye(192)
    torch.testing.assert_close(rounded.loss, row_energy(weight - dense, damped), rtol=1e-3, atol=0)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("factor", [1e-6, 3.0, 1e8])
def test_uncorrelated_inputs_reduce_it_to_rounding(factor, order):
    weight, _ = correlated(16, 64)
    rule = GridRule(4, symmetric=False, scale_dtype=torch.float16)
    rounded, _, _ = solve(weight, factor * torch.eye(64), rule, 16, order)
    grid = fit_grid(weight, 16, rule)
    assert torch.equal(rounded.codes, grid.encode(weight))
    assert torch.equal(rounded.grid.scale, grid.scale)
    assert torch.equal(rounded.grid.zero_point, grid.zero_point)


@pytest.mark.parametrize("order", ORDERS)
def test_scale_of_the_hessian_changes_nothing(order):
    weight, hessian = correlated(16, 64)
    expected, _, _ = solve(weight, hessian, GridRule(3), 16, order)
    rounded, _, _ = solve(weight, hessian * 2.0**-20, GridRule(3), 16, order)  # a power of two: not a bit changes
    assert torch.equal(rounded.codes, expected.codes)


def test_order_of_the_inputs_does_not_matter_under_act_order():
    weight, hessian = correlated(16, 64)
    shuffle = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    expected, _, _ = solve(weight, hessian, GridRule(3), -1, "act")
    rounded, _, _ = solve(weight[:, shuffle], hessian[shuffle][:, shuffle], GridRule(3), -1, "act")
    assert torch.equal(rounded.codes, expected.codes[:, shuffle])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("order", ORDERS)
def test_less_loss_than_rounding(order, bits):
    weight, hessian = correlated(32, 96)
    rule = GridRule(bits, symmetric=False)
    _, dense, _ = solve(weight, hessian, rule, 32, order)
    grid = fit_grid(weight, 32, rule)
    plain = grid.decode(grid.encode(weight))
    assert row_energy(weight - dense, hessian).sum() < 0.7 * row_energy(weight - plain, hessian).sum()


@pytest.mark.parametrize("order", ORDERS)
def test_weights_on_the_grid_are_left_alone(order):
    _, hessian = correlated(16, 64)
    codes = torch.randint(0, 16, (16, 64), generator=torch.Generator().manual_seed(0))
    codes[:, ::16], codes[:, 1::16] = 0, 15  # both ends of every group, hence the same range
    weight = (codes - 6) * 2.0**-7
    rounded, dense, _ = solve(weight, hessian, GridRule(4, symmetric=False), 16, order)
    assert torch.equal(rounded.codes, codes.to(torch.uint8))
    assert torch.equal(dense, weight)


@pytest.mark.parametrize("order", ORDERS)
def test_eight_bits_are_nearly_exact(order):
    weight, hessian = correlated(32, 96)
    _, dense, _ = solve(weight, hessian, GridRule(8), -1, order)
    assert row_energy(weight - dense, hessian).sum() < 1e-4 * row_energy(weight, hessian).sum()  # of squares


@pytest.mark.parametrize("rows", [[0], [5, 6, 7], list(range(13, 37))])
def test_rows_are_independent(rows):
    weight, hessian = correlated(40, 64)
    rule = GridRule(4, symmetric=False)
    together, _, _ = solve(weight, hessian, rule, 16, "act")
    alone, _, _ = solve(weight[rows], hessian, rule, 16, "act")
    same_codes(alone.codes, together.codes[rows], allowed=0.03)
    assert torch.equal(alone.grid.scale, together.grid.scale[rows])


def test_feedback_of_zero_is_no_feedback():
    weight, hessian = correlated(16, 64)
    expected, _, _ = solve(weight, hessian, GridRule(3), 16, "act")
    rounded, _, _ = solve(weight, hessian, GridRule(3), 16, "act", feedback=torch.zeros(64, 64))
    assert torch.equal(rounded.codes, expected.codes)


def test_feedback_does_not_depend_on_blocks():
    weight, hessian = correlated(16, 96)
    feedback = torch.randn(96, 96, generator=torch.Generator().manual_seed(0)).triu(1) * 0.02
    expected, _, _ = solve(weight, hessian, GridRule(4), 32, block_size=1, feedback=feedback)
    rounded, _, _ = solve(weight, hessian, GridRule(4), 32, block_size=40, feedback=feedback)
    same_codes(rounded.codes, expected.codes, allowed=0.02)
