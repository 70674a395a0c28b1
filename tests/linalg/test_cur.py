"""Columns, rows and their link, held to the formulas as written down (tests/reference/cur.py)."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.linalg import cur
from compress.linalg.low_rank import decompose
from tests.reference import cur as reference

SHAPES = [(12, 20), (20, 12), (16, 16)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def decaying(m: int, n: int, seed: int = 0) -> Tensor:
    """Singular values 1, 0.8, 0.64, ..."""
    left, right = torch.linalg.qr(random(m, m, seed=seed)).Q, torch.linalg.qr(random(n, n, seed=seed + 1)).Q
    k = min(m, n)
    return left[:, :k] * 0.8 ** torch.arange(k) @ right[:, :k].T


def root_of(n: int, seed: int = 5) -> Tensor:
    """S of correlated inputs of unequal size."""
    return torch.eye(n, dtype=torch.float64) * torch.linspace(0.2, 3, n) + 0.2 * random(n, n, seed=seed)


# ---- how many


@given(st.integers(1, 400), st.integers(1, 400))
@settings(max_examples=200, deadline=None)
def test_break_even_is_the_last_rank_that_is_smaller(m: int, n: int):
    rank = cur.break_even_rank(m, n)
    assert rank == 0 or cur.size(m, n, rank) < m * n
    assert cur.size(m, n, rank + 1) >= m * n
    r_star = (math.sqrt(m * m + 6 * m * n + n * n) - (m + n)) / 2
    assert rank == math.ceil(r_star - 1e-9) - 1


def test_published_sizes():
    """Grouped keys of Llama-3.1-8B; 71.4 M numbers less per block at rank 256."""
    assert cur.break_even_rank(1024, 4096) == 718
    shapes = [(4096, 4096), (1024, 4096), (14336, 4096)]
    saved = sum(m * n - cur.size(m, n, 256) for m, n in shapes)
    assert round(saved / 1e6, 1) == 71.4 and round(8.03 - 10 * saved / 1e9, 2) == 7.32


@given(st.integers(2, 300), st.integers(2, 300), st.sampled_from([0.05, 0.29, 0.5, 0.8, 0.95]))
@settings(max_examples=100, deadline=None)
def test_uniform_rank_is_the_largest_within(m: int, n: int, ratio: float):
    rank = cur.uniform_rank(m, n, ratio)
    assert rank == 1 or cur.size(m, n, rank) <= ratio * m * n + 1e-9
    assert cur.size(m, n, rank + 1) > ratio * m * n - 1e-9
    assert cur.uniform_rank(m, n, ratio, 8) == max(rank // 8, 1) * 8


# ---- which


@pytest.mark.parametrize("seed", range(5))
def test_deim_is_lu_with_partial_pivoting(seed: int):
    vectors = torch.linalg.qr(random(40, 15, seed=seed)).Q
    picks = cur.deim(vectors)
    assert picks.tolist() == reference.deim(vectors)
    assert len(set(picks.tolist())) == 15
    signs = torch.where(random(15, seed=seed) > 0, 1.0, -1.0)
    assert cur.deim(vectors * signs).tolist() == picks.tolist()
    for rank in (1, 4, 14):
        assert cur.deim(vectors[:, :rank]).tolist() == picks[:rank].tolist()


def test_deim_of_tied_and_full_vectors_takes_each_row_once():
    tied = torch.full((8, 8), 8**-0.5, dtype=torch.float64)
    assert sorted(cur.deim(torch.eye(8, dtype=torch.float64)).tolist()) == list(range(8))
    assert len(set(cur.deim(tied).tolist())) == 8


@pytest.mark.parametrize("shape", SHAPES)
def test_pivots_are_those_of_gram_schmidt_and_lapack(shape: tuple[int, int]):
    linalg = pytest.importorskip("scipy.linalg")
    matrix = random(*shape)
    picks = cur.pivoted(matrix, 10)
    assert picks.tolist() == reference.pivoted_qr(matrix, 10)
    assert picks.tolist() == linalg.qr(matrix.numpy(), mode="r", pivoting=True)[1][:10].tolist()


def test_pivots_of_a_deficient_matrix_are_distinct():
    matrix = random(10, 3) @ random(3, 12, seed=1)
    assert len(set(cur.pivoted(matrix, 10).tolist())) == 10
    assert len(set(cur.pivoted(torch.zeros(5, 5), 5).tolist())) == 5


@pytest.mark.parametrize("moment", ["full", "diagonal", None])
@pytest.mark.parametrize("shape", [*SHAPES, (30, 12)])
def test_greedy_takes_what_holds_most(shape: tuple[int, int], moment: str | None):
    weight, root = random(*shape), root_of(shape[1])
    hessian = root @ root.T
    if moment == "diagonal":
        root = hessian.diagonal().sqrt().diag()
    elif moment is None:
        root = torch.eye(shape[1], dtype=torch.float64)
    given_moment = {"full": hessian, "diagonal": hessian.diagonal(), None: None}[moment]
    rows, columns = cur.select_greedily(weight, given_moment, 8)
    assert columns.tolist() == reference.greedy(weight, weight @ root, 8)
    assert rows.tolist() == reference.greedy((weight @ root).T, (weight @ root).T, 8)


def test_greedy_of_a_deficient_matrix_is_distinct_and_exact():
    weight = random(10, 3) @ random(3, 12, seed=1)
    rows, columns = cur.select_greedily(weight, None, 9)
    assert len(set(rows.tolist())) == len(set(columns.tolist())) == 9
    found = cur.link(weight, rows[:3], columns[:3])
    torch.testing.assert_close(found.columns @ found.link @ found.rows, weight, rtol=0, atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_vectors_by_squares_and_directly(shape: tuple[int, int]):
    """A rank that reaches below what squares can tell goes the other way."""
    matrix = decaying(*shape)
    left, right = cur.singular_vectors(matrix, 6)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close((left.T @ u[:, :6]).abs(), torch.eye(6, dtype=torch.float64), atol=1e-8, rtol=0)
    torch.testing.assert_close(left.T @ matrix @ right, s[:6].diag(), atol=1e-8, rtol=0)
    steep = (u * 1e-3 ** torch.arange(len(s))) @ vh
    left, right = cur.singular_vectors(steep, 6)
    torch.testing.assert_close(left.T @ left, torch.eye(6, dtype=torch.float64), atol=1e-8, rtol=0)
    torch.testing.assert_close(right.T @ right, torch.eye(6, dtype=torch.float64), atol=1e-8, rtol=0)


# ---- how they are linked


@pytest.mark.parametrize("how", ["deim", "qr"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_matrix_of_that_rank_is_given_back(shape: tuple[int, int], how: str):
    weight = random(shape[0], 5) @ random(5, shape[1], seed=1)
    rows, columns = cur.select(weight, weight, 5, how)
    root = root_of(shape[1])
    for moment in (None, (root @ root.T).diagonal(), root @ root.T):
        found = cur.link(weight, rows, columns, moment)
        torch.testing.assert_close(found.columns @ found.link @ found.rows, weight, rtol=0, atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_is_exact(shape: tuple[int, int]):
    weight, root = random(*shape), root_of(shape[1])
    rows, columns = cur.select(weight, weight, min(shape), "deim")
    for moment in (None, root @ root.T):
        found = cur.link(weight, rows, columns, moment)
        torch.testing.assert_close(found.columns @ found.link @ found.rows, weight, rtol=0, atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_link_is_the_formula(shape: tuple[int, int]):
    weight, root = decaying(*shape), root_of(shape[1])
    rows, columns = cur.select(weight, weight, 7, "deim")
    hessian = root @ root.T
    for moment, known in (
        (hessian, root),
        (hessian.diagonal(), hessian.diagonal().sqrt().diag()),
        (None, torch.eye(shape[1], dtype=torch.float64)),
    ):
        found = cur.link(weight, rows, columns, moment)
        expected = weight[:, columns] @ reference.link(weight, rows, columns, known) @ weight[rows]
        torch.testing.assert_close(found.columns @ found.link @ found.rows, expected, rtol=1e-7, atol=1e-9)


def test_link_is_optimal_and_the_weighted_one_better_where_it_counts():
    weight, root = decaying(16, 16), root_of(16)
    rows, columns = cur.select(weight @ root, weight, 6, "deim")
    found = cur.link(weight, rows, columns, root @ root.T)

    def loss(u: Tensor) -> float:
        return reference.loss(weight, found.columns, u, found.rows, root)

    best = loss(found.link)
    for seed in range(20):
        assert loss(found.link + 1e-3 * random(6, 6, seed=seed)) > best
    plain, identity = cur.link(weight, rows, columns), torch.eye(16, dtype=torch.float64)
    assert best < loss(plain.link)
    assert reference.loss(weight, plain.columns, plain.link, plain.rows, identity) < reference.loss(
        weight, found.columns, found.link, found.rows, identity
    )


@given(st.integers(0, 10_000), st.integers(1, 11))
@settings(max_examples=30, deadline=None)
def test_error_lies_between_the_best_of_its_rank_and_the_bound_of_deim(seed: int, rank: int):
    weight = decaying(12, 17, seed=seed)
    left, right = cur.singular_vectors(weight, rank)
    rows, columns = cur.deim(left), cur.deim(right)
    found = cur.link(weight, rows, columns)
    difference = weight - found.columns @ found.link @ found.rows
    values = torch.linalg.svdvals(weight)
    spread = sum(float(torch.linalg.inv(v[p]).norm(2)) for v, p in ((left, rows), (right, columns)))
    assert float(difference.norm(2)) <= spread * float(values[rank]) * (1 + 1e-9)
    assert float(difference.square().sum()) >= float(values[rank:].square().sum()) * (1 - 1e-9)


@pytest.mark.parametrize("how", ["deim", "qr", "greedy"])
def test_error_of_outputs_falls_with_the_rank_and_stays_above_the_truncated(how: str):
    """Picks are nested, and a larger rank has every U of the smaller one."""
    weight, root = decaying(14, 18), root_of(18)
    hessian = root @ root.T
    losses = []
    for rank in range(1, 14):
        select = (
            cur.select_greedily(weight, hessian, rank)
            if how == "greedy"
            else cur.select(weight @ root, weight, rank, how)
        )
        found = cur.link(weight, *select, hessian)
        losses.append(reference.loss(weight, found.columns, found.link, found.rows, root))
        assert losses[-1] >= decompose(weight, rank, hessian).loss * (1 - 1e-9)
    assert all(after <= before * (1 + 1e-9) for before, after in pairwise(losses))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_columns_and_rows_are_the_weight_s_own_to_the_last_bit(dtype: torch.dtype):
    """Times a power of two: the digits are the same."""
    weight = (decaying(16, 12) * torch.logspace(-3, 3, 12)).to(dtype)
    rows, columns = cur.select(weight, weight, 5, "deim")
    found = cur.link(weight, rows, columns)
    for stored, own in ((found.columns.to(dtype), weight[:, columns]), (found.rows.to(dtype).T, weight[rows].T)):
        digits, _ = torch.frexp(stored.float())
        assert torch.equal(digits, torch.frexp(own.float())[0])
        factor = (stored.double() / own.double()).nan_to_num(0)
        factors = factor.amax(0)
        assert torch.equal(factors.log2(), factors.log2().round())
        assert torch.equal(stored.double(), own.double() * factors)
        lengths = stored.double().norm(dim=0)
        assert float(lengths.min()) > 0.7 and float(lengths.max()) < 1.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_link_that_will_be_rounded_is_found_for_it(dtype: torch.dtype):
    """Two columns and two rows that nearly depend on each other: the exact U has entries of 10^5 that cancel."""
    weight, picks = decaying(24, 24), torch.arange(8)
    weight[:, 1] = weight[:, 0] + 1e-5 * random(24)
    weight[1] = weight[0] + 1e-5 * random(24, seed=2)

    def error(picks: Tensor, rounding: float) -> float:
        found = cur.link(weight, picks, picks, rounding=rounding)
        left, middle, right = (part.to(dtype).double() for part in (found.columns, found.link, found.rows))
        return float((weight - left @ middle @ right).norm() / weight.norm())

    without = error(picks[picks != 1], 0.0)
    unready, ready = error(picks, 0.0), error(picks, cur.rounding_of(dtype))
    assert ready < 1.02 * without  # as if they were not there
    assert unready > 1.5 * without or math.isnan(unready)  # float16 overflows


def test_float32_pays_nothing_for_it():
    weight, root = decaying(16, 16), root_of(16)
    rows, columns = cur.select(weight, weight, 6, "deim")
    exact = cur.link(weight, rows, columns, root @ root.T)
    ready = cur.link(weight, rows, columns, root @ root.T, rounding=cur.rounding_of(torch.float32))
    torch.testing.assert_close(ready.link, exact.link, rtol=1e-6, atol=1e-8)


def test_rounding_of_is_what_rounding_does():
    values = torch.exp(torch.rand(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 12 - 6)
    for dtype in (torch.bfloat16, torch.float16):
        measured = float(((values.to(dtype).double() - values) / values).square().mean())
        assert measured == pytest.approx(cur.rounding_of(dtype), rel=0.05)


def test_a_singular_moment_is_no_obstacle():
    """Fewer tokens than rows: U has the rank of the tokens, and the outputs on them are as good as any U gives."""
    weight, x = random(16, 20), random(4, 20, seed=3)
    rows, columns = cur.select(weight, weight, 8, "deim")
    found = cur.link(weight, rows, columns, x.T @ x)
    assert found.n_reached == 4 and torch.isfinite(found.link).all()
    outputs = x @ weight.T
    basis = torch.linalg.qr(weight[:, columns]).Q
    expected = outputs @ basis @ basis.T  # the best within the span of the columns
    torch.testing.assert_close(x @ (found.columns @ found.link @ found.rows).T, expected, rtol=1e-6, atol=1e-7)


def test_crossed_is_what_least_squares_on_the_inputs_gives():
    """Towards what the weight makes of other inputs: the layer's distillation, its minimum."""
    weight, x = random(10, 12), random(200, 12, seed=1)
    undisturbed = x + 0.3 * random(200, 12, seed=2)
    rows, columns = cur.select(weight, weight, 5, "deim")
    found = cur.link(weight, rows, columns, x.T @ x, crossed=undisturbed.T @ x)
    inside = x @ found.rows.T  # [tokens, r]
    u = torch.zeros(5, 5, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [u], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def step() -> Tensor:
        optimiser.zero_grad()
        loss = (inside @ u.T @ found.columns.T - undisturbed @ weight.T).square().sum()
        loss.backward()
        return loss

    optimiser.step(step)
    torch.testing.assert_close(found.link, u.detach(), rtol=1e-4, atol=1e-5)


def test_dead_rows_columns_and_inputs():
    weight, hessian = random(8, 9), torch.eye(9, dtype=torch.float64)
    weight[2], weight[:, 3] = 0, 0
    hessian[5, 5] = 0
    found = cur.link(weight, torch.tensor([2, 0, 1]), torch.tensor([3, 0, 1]), hessian)
    assert torch.isfinite(found.link).all() and found.n_reached == 2
    assert not cur.link(torch.zeros(4, 4), torch.arange(2), torch.arange(2)).link.any()
