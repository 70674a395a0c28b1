from __future__ import annotations

import pytest
import torch

from compress.errors import NumericsError
from compress.linalg.cholesky import inverse_factor
from compress.linalg.error_feedback import round_columns, round_onto
from compress.linalg.grid import GridRule
from compress.linalg.lookup import (
    Lookup,
    LookupColumns,
    ScaleRule,
    fit_scales,
    fit_table,
    fit_tables,
    normal_float,
)
from compress.linalg.lookup_refit import refit
from compress.linalg.order import act_order, group_aware_order
from compress.linalg.quadratic import row_energy
from tests.linalg.problems import correlated
from tests.reference.lookup import descent

TABLES = {  # published
    4: [-1, -0.69619, -0.52507, -0.39492, -0.28444, -0.18477, -0.09105, 0]
    + [0.07958, 0.16093, 0.24611, 0.33792, 0.44071, 0.56262, 0.72296, 1],
    3: [-1, -0.47863, -0.21714, 0, 0.16093, 0.33792, 0.56262, 1],
    2: [-1, 0, 0.33792, 1],
}


def ones(n: int) -> torch.Tensor:
    return torch.ones(n)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_normal_float(bits):
    table = normal_float(bits)
    torch.testing.assert_close(table, torch.tensor(TABLES[bits], dtype=torch.float64), rtol=0, atol=1e-4)
    assert (table.diff() > 0).all() and 0 in table and table[-1] == 1 and table[0] == -1


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.37, -0.02])
def test_the_code_of_every_value_is_its_own(bits, dtype, scale):
    table = normal_float(bits).to(dtype)
    lookup = Lookup(table, torch.full((1, 1), scale).to(dtype))
    codes = torch.arange(2**bits, dtype=torch.uint8)[None]
    assert torch.equal(lookup.encode(lookup.decode(codes)), codes)
    rows = Lookup(torch.stack([table, table * 2]))
    assert torch.equal(rows.encode(rows.decode(codes.expand(2, -1))), codes.expand(2, -1))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_errors_are_at_most_half_a_gap(bits):
    weight, _ = correlated(6, 64)
    table = normal_float(bits).float()
    scale = fit_scales(weight, 16, ScaleRule(table, "absmax"), ones(64))
    lookup = Lookup(table, scale)
    codes = lookup.encode(weight).long()
    gap = torch.nn.functional.pad(table.diff(), (1, 1), value=0.0)
    local = torch.maximum(gap[codes], gap[codes + 1]).unflatten(1, (-1, 16)) * scale.unsqueeze(-1)
    error = (lookup.decode(codes) - weight).abs().unflatten(1, (-1, 16))
    assert (error <= local / 2 * (1 + 1e-5)).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fitted_scales_lose_less_and_may_be_negative(bits, dtype):
    weight, hessian = correlated(20, 64)
    h, table = hessian.diagonal(), normal_float(bits).to(dtype)

    def loss(fit) -> torch.Tensor:
        lookup = Lookup(table, fit_scales(weight, 16, ScaleRule(table, fit), h))
        return ((lookup.decode(lookup.encode(weight)) - weight).square() * h).unflatten(1, (-1, 16)).sum(-1)

    assert (loss("fitted") <= loss("absmax") * (1 + 1e-2)).float().mean() > 0.97  # local minima
    assert loss("fitted").sum() < 0.95 * loss("absmax").sum()
    scale = fit_scales(weight, 16, ScaleRule(table), h)
    assert (scale < 0).any() and (scale > 0).any()
    mirrored = fit_scales(-weight, 16, ScaleRule(table), h)
    assert ((mirrored + scale).abs() <= 1e-6).float().mean() > 0.9


@pytest.mark.parametrize("fit", ["absmax", "fitted"])
@pytest.mark.parametrize("bits", [2, 4])
def test_groups_of_zeros_constants_and_single_outliers(fit, bits):
    weight = torch.zeros(3, 32)
    weight[1], weight[2, 5] = 0.125, 7.0
    table = normal_float(bits).bfloat16()
    lookup = Lookup(table, fit_scales(weight, 16, ScaleRule(table, fit), torch.zeros(32)))
    assert (lookup.scale != 0).all() and torch.equal(lookup.decode(lookup.encode(weight)), weight)
    tables = Lookup(fit_tables(weight, bits, ones(32), torch.bfloat16))
    assert torch.equal(tables.decode(tables.encode(weight)), weight)
    shared = fit_table(weight, bits, 16, torch.zeros(32), torch.bfloat16)
    assert (
        torch.isfinite(shared).all() and torch.isfinite(fit_table(weight * 0, bits, 16, ones(32), torch.bfloat16)).all()
    )


def test_a_table_of_the_layer_loses_less_than_that_of_the_normal_distribution():
    weight, hessian = correlated(64, 128)
    h = hessian.diagonal()
    for bits in (2, 3, 4):
        losses = []
        for table in (normal_float(bits).float(), fit_table(weight, bits, 32, h, torch.float32)):
            assert (table.diff() >= 0).all() and table.abs().max() == 1
            lookup = Lookup(table, fit_scales(weight, 32, ScaleRule(table), h))
            losses.append(float(((lookup.decode(lookup.encode(weight)) - weight).square() * h).sum()))
        assert losses[1] < losses[0]


def test_values_that_cannot_be_stored():
    weight = torch.full((2, 32), 1e6)
    with pytest.raises(NumericsError, match="float16 cannot hold"):
        fit_tables(weight, 2, ones(32), torch.float16)
    with pytest.raises(NumericsError, match="float16 cannot hold"):
        fit_scales(weight, 16, ScaleRule(normal_float(2).half()), ones(32))


@pytest.mark.parametrize("order", [None, "act", "gar"])
@pytest.mark.parametrize("static", [True, False])
def test_a_table_of_integers_is_the_integer_grid(order, static):
    """The loop of tables and that of grids round to the same codes and have the same loss."""
    if order == "act" and not static:
        return
    weight, hessian = correlated(10, 64)
    columns = None
    if order is not None:
        columns = act_order(hessian.diagonal()) if order == "act" else group_aware_order(hessian.diagonal(), 16)
    upper = inverse_factor(hessian, 0.01, columns).upper
    grids = round_columns(weight, upper, GridRule(3), 16, columns, static)
    table = torch.arange(-4.0, 4.0)

    class Columns(LookupColumns):
        def fit(self, groups, group_weight) -> None:
            largest = group_weight.unflatten(1, (-1, 16)).abs().amax(-1)
            self.scale[groups] = (2 * largest / 7).T

    levels = Columns(Lookup(table, torch.ones(10, 4)))
    tables = round_onto(levels, weight, upper, 16, columns, static)
    assert torch.equal(tables.codes, grids.codes)
    torch.testing.assert_close(tables.loss, grids.loss)
    torch.testing.assert_close(tables.grid.scale, grids.grid.scale)


def test_uncorrelated_inputs_reduce_feedback_to_the_nearest_value():
    weight, _ = correlated(8, 64)
    upper = inverse_factor(torch.eye(64), 0.01).upper
    table = normal_float(3).float()
    lookup = Lookup(table, fit_scales(weight, 16, ScaleRule(table), ones(64)))
    for each, size in ((lookup, 16), (Lookup(fit_tables(weight, 3, ones(64), torch.float32)), 64)):
        assert torch.equal(round_onto(LookupColumns(each), weight, upper, size).codes, each.encode(weight))


def test_scales_fitted_in_the_loop_are_those_of_the_columns_as_they_are_then():
    weight, hessian = correlated(8, 64)
    h = hessian.diagonal()
    order = group_aware_order(h, 16)
    table, rule = normal_float(3).float(), ScaleRule(normal_float(3).float())
    first = int(order[0]) // 16  # nothing is fed back to the first window of 128 columns
    by_group = h[order].view(4, 16)[(order[::16] // 16).argsort()]
    levels = LookupColumns(Lookup(table, torch.ones(8, 4)), rule, by_group)
    found = round_onto(levels, weight, inverse_factor(hessian, 0.01, order).upper, 16, order, False)
    torch.testing.assert_close(found.grid.scale, fit_scales(weight, 16, rule, h))
    assert found.grid.scale[:, first].abs().min() > 0


def tables_of(kind: str, bits: int, dtype: torch.dtype = torch.float32):
    weight, hessian = correlated(12, 64)
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    h = hessian.diagonal()
    if kind == "rows":
        lookup = Lookup(fit_tables(weight, bits, h, dtype))
    else:
        table = normal_float(bits).to(dtype)
        lookup = Lookup(table, fit_scales(weight, 16, ScaleRule(table), h))
    return weight, hessian, lookup, lookup.encode(weight)


@pytest.mark.parametrize("kind", ["rows", "groups"])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_refit_never_raises_the_loss_of_a_row(kind, bits, dtype):
    weight, hessian, lookup, codes = tables_of(kind, bits, dtype)
    before = row_energy(weight - lookup.decode(codes), hessian)
    for rounds in (0, 1, 2, 8):
        found, chosen, loss = refit(weight, hessian, lookup, codes, rounds)
        torch.testing.assert_close(loss, row_energy(weight - found.decode(chosen), hessian), rtol=1e-3, atol=1e-6)
        assert (loss <= before * (1 + 1e-5)).all()
        assert found.table.dtype == dtype and (found.table.diff(dim=-1) >= 0).all()
        before = loss
    assert before.sum() < 0.8 * row_energy(weight - lookup.decode(codes), hessian).sum()


@pytest.mark.parametrize("kind", ["rows", "groups"])
def test_values_are_the_least_squares_solution(kind):
    """For the codes that it ends with, nothing that could be stored instead is better; sweeps over codes are switched off."""
    from compress.linalg import lookup_refit

    weight, hessian, lookup, codes = tables_of(kind, 3)
    fit = lookup_refit._evaluated(weight.T.contiguous(), hessian, lookup, codes.T.contiguous())
    found = lookup_refit._values(weight.T.contiguous(), hessian, fit)
    root = torch.linalg.cholesky(hessian.double())
    for row in range(3):
        code = codes[row].long()
        if kind == "rows":
            linear = torch.nn.functional.one_hot(code, 8).double()
        else:
            linear = torch.block_diag(*lookup.table[code].view(4, 16, 1)).double()
        best = torch.linalg.lstsq(root.T @ linear, root.T @ weight[row].double()).solution
        least = float((root.T @ (weight[row].double() - linear @ best)).square().sum())
        assert float(found.loss[row]) == pytest.approx(least, rel=1e-3)


@pytest.mark.parametrize("kind", ["rows", "groups"])
def test_a_sweep_is_coordinate_descent(kind):
    from compress.linalg import lookup_refit

    weight, hessian, lookup, codes = tables_of(kind, 3)
    fit = lookup_refit._evaluated(weight.T.contiguous(), hessian, lookup, codes.T.contiguous())
    found = lookup_refit._codes(weight.T.contiguous(), hessian, fit).codes.T
    values = [
        [lookup.table[row] if kind == "rows" else lookup.table * lookup.scale[row, i // 16] for i in range(64)]
        for row in range(len(weight))
    ]
    expected = descent(weight, hessian, codes, values)
    assert (found == expected).float().mean() > 0.998  # ties and rounding


def test_rows_of_kmeans_are_at_rest_where_inputs_are_not_correlated():
    weight, _ = correlated(6, 40)
    lookup = Lookup(fit_tables(weight, 2, ones(40), torch.float32))
    found, codes, _ = refit(weight, torch.eye(40), lookup, lookup.encode(weight), 5)
    assert torch.equal(codes, lookup.encode(weight))
    torch.testing.assert_close(found.table, lookup.table, rtol=1e-4, atol=1e-6)


def test_values_that_no_code_uses_stay_where_they_are_useful_to_nobody():
    """Two of four values are used: the system is singular, and the result is finite and exact."""
    weight = torch.tensor([[0.5, -0.25] * 8])
    lookup = Lookup(torch.tensor([[-0.3, 0.4, 5.0, 6.0]]))
    found, codes, loss = refit(weight, torch.eye(16), lookup, lookup.encode(weight), 3)
    assert torch.isfinite(found.table).all() and float(loss[0]) < 1e-6
    torch.testing.assert_close(found.decode(codes), weight, rtol=1e-4, atol=1e-4)
