from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import NumericsError
from compress.linalg import low_rank
from compress.linalg.low_rank import (
    decompose,
    factors,
    fixed_signs,
    gram,
    mixing,
    refitted_left,
    shifted,
    spectrum,
    whitener,
)  # fmt: skip
from tests.reference import low_rank as reference

SHAPES = [(12, 20), (20, 12), (16, 16), (5, 40), (40, 5)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
both_routes = pytest.mark.parametrize("route", ["gram", "svd"])


def problem(out, n, n_tokens=None, seed=0):
    """Weight [out, n] and correlated inputs [tokens, n] of unequal size, float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=generator, dtype=torch.float64) / n**0.5
    x = torch.randn(n_tokens or 4 * n, n, generator=generator, dtype=torch.float64) @ mix
    x *= torch.rand(n, generator=generator, dtype=torch.float64) * 3 + 0.1
    return torch.randn(out, n, generator=generator, dtype=torch.float64), x


def truncated(weight, rank, moment=None):
    basis = decompose(weight, rank, moment).basis
    return basis @ basis.T @ weight


def error(weight, approximation, x):
    return reference.output_error(weight.numpy(), approximation.numpy(), x.numpy())


def take(route, monkeypatch):
    monkeypatch.setattr(low_rank, "GRAM_FLOOR", 0.0 if route == "gram" else 2.0)


# ---- the spec's invariants, one by one


@every_shape
@both_routes
def test_full_rank_is_the_weight(shape, route, monkeypatch):
    take(route, monkeypatch)
    w, x = problem(*shape)
    torch.testing.assert_close(truncated(w, min(shape), x.T @ x), w, rtol=0, atol=1e-10)


@every_shape
def test_full_rank_is_the_weight_where_the_second_moment_is_singular(shape):
    w, x = problem(*shape, n_tokens=3)
    torch.testing.assert_close(truncated(w, min(shape), x.T @ x), w, rtol=0, atol=1e-10)


@every_shape
@both_routes
def test_loss_is_known_before_and_whitened_has_the_least(shape, route, monkeypatch):
    take(route, monkeypatch)
    w, x = problem(*shape)
    h = x.T @ x
    for rank in range(1, min(shape)):
        found = decompose(w, rank, h)
        assert found.route == route
        mine = error(w, truncated(w, rank, h), x)
        assert mine == pytest.approx(found.loss, rel=1e-8)
        assert found.total == pytest.approx(error(w, torch.zeros_like(w), x), rel=1e-12)
        others = [
            reference.plain(w.numpy(), rank), reference.awsvd(w.numpy(), x.numpy(), rank),
            reference.asvd(w.numpy(), x.numpy(), rank, 0.5), reference.asvd(w.numpy(), x.numpy(), rank, 1.0),
        ]  # fmt: skip
        assert all(mine <= reference.output_error(w.numpy(), other, x.numpy()) * (1 + 1e-12) for other in others)


@every_shape
def test_white_inputs_leave_plain_truncation(shape):
    w, _ = problem(*shape)
    for rank in (1, 3, min(shape) - 1):
        plain = torch.from_numpy(reference.plain(w.numpy(), rank))
        torch.testing.assert_close(truncated(w, rank), plain, rtol=0, atol=1e-10)
        torch.testing.assert_close(
            truncated(w, rank, 7.0 * torch.eye(shape[1], dtype=w.dtype)), plain, rtol=0, atol=1e-10
        )


@every_shape
def test_uncorrelated_inputs_leave_awsvd_and_asvd(shape):
    w, x = problem(*shape)
    diagonal = (x.T @ x).diagonal()
    size = x.abs().mean(0)
    for rank in (1, 3, min(shape) - 1):
        awsvd = torch.from_numpy(reference.awsvd(w.numpy(), x.numpy(), rank))
        torch.testing.assert_close(truncated(w, rank, diagonal), awsvd, rtol=0, atol=1e-8)
        torch.testing.assert_close(truncated(w, rank, diagonal.diag()), awsvd, rtol=0, atol=1e-8)
        asvd = torch.from_numpy(reference.asvd(w.numpy(), x.numpy(), rank, 0.5))
        torch.testing.assert_close(truncated(w, rank, size), asvd, rtol=0, atol=1e-8)


@every_shape
@both_routes
def test_equals_the_papers_with_their_inverses(shape, route, monkeypatch):
    take(route, monkeypatch)
    w, x = problem(*shape)
    for rank in (1, 2, min(shape) - 1):
        mine = truncated(w, rank, x.T @ x)
        for paper in (reference.svd_llm, reference.svd_llm_v2):
            theirs = torch.from_numpy(paper(w.numpy(), x.numpy(), rank))
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-8)


@every_shape
def test_loss_falls_with_rank_and_rotated_inputs_change_nothing(shape):
    w, x = problem(*shape)
    energies = spectrum(w, x.T @ x)
    assert (energies[:-1] >= energies[1:]).all()
    losses = [error(w, truncated(w, rank, x.T @ x), x) for rank in range(1, min(shape) + 1)]
    assert all(more >= less for more, less in pairwise(losses))
    turn = torch.linalg.qr(torch.randn(shape[1], shape[1], dtype=w.dtype, generator=torch.Generator().manual_seed(1))).Q
    turned, moved = w @ turn, x @ turn
    torch.testing.assert_close(spectrum(turned, moved.T @ moved), energies, rtol=1e-9, atol=1e-9 * float(energies[0]))
    assert error(turned, truncated(turned, 3, moved.T @ moved), moved) == pytest.approx(losses[2], rel=1e-8)


def test_scale_of_the_second_moment_changes_nothing():
    w, x = problem(12, 20)
    torch.testing.assert_close(truncated(w, 4, x.T @ x), truncated(w, 4, x.T @ x * 1e-9), rtol=0, atol=1e-9)


@every_shape
@pytest.mark.parametrize("what", ["zero", "duplicate", "few tokens", "one token", "no input"])
def test_singular_second_moments(shape, what):
    w, x = problem(*shape, n_tokens={"few tokens": 4, "one token": 1}.get(what))
    if what == "zero":
        x[:, ::2] = 0
    if what == "duplicate":
        x[:, 1:4] = x[:, :1]
    if what == "no input":
        x[:] = 0
    h = x.T @ x
    for rank in range(1, min(shape) + 1):
        found = decompose(w, rank, h)
        assert torch.isfinite(found.basis).all()
        orthonormal = found.basis.T @ found.basis
        torch.testing.assert_close(orthonormal, torch.eye(rank, dtype=w.dtype), rtol=0, atol=1e-10)
        mine = error(w, truncated(w, rank, h), x)
        assert mine == pytest.approx(found.loss, rel=1e-6, abs=1e-12 * found.total)
    reached = decompose(w, min(shape), h).n_reached
    assert reached == np.linalg.matrix_rank((w @ x.T).numpy())


def test_directions_that_no_input_reaches_are_chosen_by_the_weight():
    w, x = problem(12, 20, n_tokens=3)
    found = decompose(w, 7, x.T @ x)
    assert found.n_reached == 3
    first = found.basis[:, :3]
    rest = w - first @ first.T @ w
    best = torch.linalg.svdvals(rest)[4:].square().sum()
    mine = w - found.basis @ found.basis.T @ w
    assert float(mine.square().sum()) == pytest.approx(float(best), rel=1e-10)


@pytest.mark.parametrize("rank", [1, 2, 5, 11])
def test_massive_activations(rank):
    """Two inputs a million times the others: lambda_1 / lambda_n beyond 1e12."""
    w, x = problem(12, 20, n_tokens=400)
    x[:, 3] *= 1e6
    x[:, 11] *= 1e5
    found = decompose(w, rank, x.T @ x)
    assert error(w, truncated(w, rank, x.T @ x), x) == pytest.approx(found.loss, rel=1e-4)
    assert found.route == ("svd" if rank > 2 else "gram")
    if rank > 2:
        u, s, _ = torch.linalg.svd(w @ x.T, full_matrices=False)  # never squared
        assert found.loss == pytest.approx(float(s[rank:].square().sum()), rel=1e-4)
        torch.testing.assert_close(found.basis @ found.basis.T, u[:, :rank] @ u[:, :rank].T, rtol=0, atol=1e-4)


@given(
    out=st.integers(1, 24), n=st.integers(1, 24), n_tokens=st.integers(1, 60), seed=st.integers(0, 99), data=st.data()
)
@settings(max_examples=60, deadline=None)
def test_no_other_matrix_of_that_rank_is_better(out, n, n_tokens, seed, data):
    w, x = problem(out, n, n_tokens, seed)
    rank = data.draw(st.integers(1, min(out, n)))
    found = decompose(w, rank, x.T @ x)
    mine = error(w, truncated(w, rank, x.T @ x), x)
    scale = 1e-9 * found.total
    assert mine == pytest.approx(found.loss, rel=1e-6, abs=scale)
    bound = np.linalg.svd((w @ x.T).numpy(), compute_uv=False)[rank:]  # Eckart-Young, on the outputs themselves
    assert mine == pytest.approx(float((bound**2).sum()), rel=1e-6, abs=scale)


# ---- determinism and precision


def test_same_input_same_bits_and_nothing_given_is_changed():
    w, x = problem(20, 12)
    h = x.T @ x
    before = w.clone(), h.clone()
    first, second = decompose(w, 5, h), decompose(w, 5, h)
    assert torch.equal(first.basis, second.basis) and torch.equal(first.energies, second.energies)
    assert torch.equal(w, before[0]) and torch.equal(h, before[1])


def test_signs_do_not_depend_on_the_library():
    w, x = problem(12, 20)
    basis = decompose(w, 6, x.T @ x).basis
    flips = torch.tensor([1.0, -1, -1, 1, -1, 1], dtype=w.dtype)
    assert torch.equal(fixed_signs(basis * flips), basis)
    assert (basis.gather(0, basis.abs().argmax(0, keepdim=True)) > 0).all()


@every_shape
@pytest.mark.parametrize("kind", ["full", "diagonal", "none"])
def test_spectrum_is_that_of_the_decomposition(shape, kind):
    w, x = problem(*shape)
    moment = {"full": x.T @ x, "diagonal": (x.T @ x).diagonal(), "none": None}[kind]
    found = decompose(w, 2, moment).energies
    torch.testing.assert_close(spectrum(w, moment), found, rtol=1e-9, atol=1e-12 * float(found[0]))
    assert found.shape == (min(shape),) and found.dtype == torch.float64


def test_float32_statistics_are_taken_to_float64_tile_by_tile(monkeypatch):
    w, x = problem(12, 20)
    h = (x.T @ x).float()
    expected = w @ h.double() @ w.T
    monkeypatch.setattr(low_rank, "TILE", 7)
    found = gram(w, h)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13 * float(expected.abs().max()))


def test_whitener_is_a_root():
    _, x = problem(4, 20, n_tokens=7)
    h = x.T @ x
    torch.testing.assert_close(whitener(h) @ whitener(h).T, h, rtol=0, atol=1e-12 * float(h.max()))
    assert int((whitener(h).square().sum(0) > 0).sum()) == 7  # what is rounding only counts as 0
    torch.testing.assert_close(whitener(h.diagonal()), h.diagonal().sqrt().diag())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_an_error(bad):
    w, x = problem(6, 8)
    w[2, 3] = bad
    with pytest.raises(NumericsError, match="NaN or infinity"):
        decompose(w, 2, x.T @ x)
    with pytest.raises(NumericsError, match="NaN or infinity"):
        spectrum(w)


def test_a_decomposition_that_fails_is_an_error():
    w, x = problem(6, 8)
    h = x.T @ x
    h[1, 1] = float("nan")
    with pytest.raises(NumericsError, match="W H W"):
        decompose(w, 2, h)


# ---- factors


@every_shape
@pytest.mark.parametrize("size", [1e-6, 1.0, 3e5])
def test_left_factor_is_orthogonal_and_both_are_of_a_size(shape, size):
    w, x = problem(*shape)
    w *= size
    rank = min(shape) // 2
    found = decompose(w, rank, x.T @ x)
    left, right = factors(w, found.basis)
    torch.testing.assert_close(left @ right, found.basis @ found.basis.T @ w, rtol=0, atol=1e-12 * float(w.abs().max()))
    gram_of_left = left.T @ left
    scale = float(gram_of_left.diagonal().mean())
    torch.testing.assert_close(
        gram_of_left, scale * torch.eye(rank, dtype=w.dtype), rtol=0, atol=1e-12 * max(scale, 1.0)
    )
    assert np.log2(scale) == pytest.approx(round(np.log2(scale)), abs=1e-9)
    ratio = float(right.square().mean().sqrt() / left.square().mean().sqrt())
    assert 0.49 < ratio < 2.04


def test_product_of_float16_factors_is_within_a_thousandth():
    for size in (1e-3, 0.05, 300.0):
        w, x = problem(64, 96)
        w *= size
        left, right = factors(w, decompose(w, 32, x.T @ x).basis)
        exact, stored = left @ right, left.half().double() @ right.half().double()
        assert float((stored - exact).norm() / exact.norm()) < 1e-3


def test_factors_of_a_zero_weight():
    left, right = factors(torch.zeros(6, 8), decompose(torch.zeros(6, 8), 3).basis)
    assert torch.isfinite(left).all() and not right.any()


@pytest.mark.parametrize("rank", [1, 2, 3, 64, 100])
def test_mixing_is_orthogonal_and_leaves_no_entry_out(rank):
    c = mixing(rank)
    torch.testing.assert_close(c @ c.T, torch.eye(rank, dtype=c.dtype), rtol=0, atol=1e-12)
    assert float(c.abs().max()) <= (2 / rank) ** 0.5 + 1e-12


def test_mixing_makes_inputs_of_the_left_factor_alike_and_correlated():
    w, x = problem(64, 96)
    found = decompose(w, 32, x.T @ x)
    _, right = factors(w, found.basis)
    mixed = right @ x.T @ x @ right.T
    energies = found.energies[:32] * float(mixed.trace() / found.energies[:32].sum())
    torch.testing.assert_close(torch.linalg.eigvalsh(mixed).flip(0), energies, rtol=1e-9, atol=0)

    def feedback(moment):
        """Share of an input that those behind it do not tell: what rounding with error feedback is left with."""
        return float(torch.linalg.cholesky(moment).diagonal().square().mean() / moment.diagonal().mean())

    best = float(energies.log().mean().exp() / energies.mean())  # no rotation leaves less than the geometric mean
    assert feedback(energies.diag()) == pytest.approx(1, abs=1e-12)
    assert best <= feedback(mixed) < best**0.5  # more than half of what is there to gain, in logarithms
    assert float(mixed.diagonal().max() / mixed.diagonal().min()) < float(energies[0] / energies[-1]) ** 0.5


# ---- refitting


@pytest.mark.parametrize("rank", [None, 1, 3, 7])
@pytest.mark.parametrize("strength", [0.25, 1.0])
@every_shape
def test_shifted_weight_solves_the_least_squares_problem(shape, strength, rank):
    w, original = problem(*shape)
    x = original + 0.3 * problem(*shape, seed=1)[1]
    h, cross = x.T @ x, (original - x).T @ x
    target, moment, used = shifted(w, h, cross, strength, 0.01)
    ridge = 0.01 * float(h.diagonal().mean())
    assert used == 0.01
    torch.testing.assert_close(moment, h + ridge * torch.eye(shape[1], dtype=h.dtype))
    outputs = (x + strength * (original - x)) @ w.T
    if rank is not None and rank > min(shape):
        return
    expected = reference.reduced_rank_ridge(x.numpy(), outputs.numpy(), w.numpy(), ridge, rank)
    mine = target if rank is None else truncated(target, rank, moment)
    torch.testing.assert_close(mine, torch.from_numpy(expected), rtol=0, atol=1e-8)


def test_undisturbed_inputs_shift_nothing():
    w, x = problem(12, 20)
    target, _, _ = shifted(w, x.T @ x, torch.zeros(20, 20), 1.0, 0.5)
    torch.testing.assert_close(target, w, rtol=0, atol=1e-12)


def test_damping_rises_until_the_second_moment_is_definite():
    w, x = problem(12, 20, n_tokens=5)
    h = x.T @ x
    h -= 0.05 * float(h.diagonal().mean()) * torch.eye(20, dtype=h.dtype)  # as rounding would, much enlarged
    target, moment, used = shifted(w, h, torch.zeros(20, 20), 1.0, 0.01)
    assert used == pytest.approx(0.1)
    assert float(torch.linalg.eigvalsh(moment)[0]) > 0
    torch.testing.assert_close(target, w, rtol=0, atol=1e-10)
    with pytest.raises(NumericsError, match="could not be factored in 8 attempts"):
        shifted(w, -torch.eye(20, dtype=h.dtype), torch.zeros(20, 20), 1.0, 0.01)


@every_shape
def test_left_factor_is_refitted_behind_a_changed_right_one(shape):
    w, x = problem(*shape)
    rank = min(shape) // 2
    left, right = factors(w, decompose(w, rank, x.T @ x).basis)
    coarse = float(right.abs().max()) / 4
    changed = (right / coarse).round() * coarse
    fitted = refitted_left(left, right, changed, x.T @ x, 1e-9)
    exact = np.linalg.lstsq((x @ changed.T).numpy(), (x @ (left @ right).T).numpy(), rcond=None)[0].T
    torch.testing.assert_close(fitted, torch.from_numpy(exact), rtol=1e-5, atol=1e-5 * float(left.abs().max()))
    assert error(left @ right, fitted @ changed, x) < error(left @ right, left @ changed, x)
    blind = refitted_left(left, right, changed, None, 1e-9)
    assert (left @ right - blind @ changed).norm() < (left @ right - left @ changed).norm()


def test_an_unchanged_right_factor_leaves_the_left_one():
    w, x = problem(12, 20)
    left, right = factors(w, decompose(w, 6, x.T @ x).basis)
    for moment in (x.T @ x, None, torch.zeros(20, 20)):
        torch.testing.assert_close(refitted_left(left, right, right, moment, 1e-6), left, rtol=0, atol=1e-9)


def test_refitting_survives_rows_that_became_equal():
    w, x = problem(12, 20)
    left, right = factors(w, decompose(w, 6, x.T @ x).basis)
    changed = right.clone()
    changed[1] = changed[0]
    changed[2] = 0
    fitted = refitted_left(left, right, changed, x.T @ x, 1e-6)
    assert torch.isfinite(fitted).all()
    assert error(left @ right, fitted @ changed, x) <= error(left @ right, left @ changed, x)
