from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.linalg.armor import Descent, best_pairs, wrap
from compress.linalg.block_diagonal import block_dense, block_left, block_linear, block_right
from compress.linalg.sparsity import highest_of_groups, nowag_normalised, nowag_scores
from tests.reference.armor import best_group

OUT, IN, SIZES = 24, 32, (6, 8)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def problem(out: int = OUT, n: int = IN, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A normalised weight, the mask of NoWag-P, and squares of inputs of unequal size."""
    weight, squares = random(out, n, seed=seed), random(n, seed=seed + 1).square() + 0.01
    mask = highest_of_groups(nowag_scores(weight, squares), 2, 4)
    return nowag_normalised(weight)[0], mask, squares


def start(sizes: tuple[int, int] = SIZES, seed: int = 0) -> Descent:
    descent = Descent(*problem(seed=seed), sizes)
    descent.pull()
    return descent


def loss(weight: Tensor, squares: Tensor, a: Tensor, core: Tensor, b: Tensor) -> float:
    return float(((block_left(a, block_right(core, b)) - weight).square() * squares).sum())


def test_products_are_those_of_the_dense_matrices():
    blocks, other, matrix = random(4, 6, 6), random(4, 8, 8, seed=1), random(24, 32, seed=2)
    torch.testing.assert_close(block_left(blocks, matrix), block_dense(blocks) @ matrix)
    torch.testing.assert_close(block_right(matrix, other), matrix @ block_dense(other))
    x = random(2, 3, 32, seed=3)
    torch.testing.assert_close(block_linear(x, other), x @ block_dense(other).T)
    assert block_linear(x[:, :0], other).shape == (2, 0, 32)


@pytest.mark.parametrize("step", ["adam", "sequential"])
@pytest.mark.parametrize("sizes", [(6, 8), (1, 4), (24, 32), (3, 16)])
def test_what_is_carried_along_is_what_it_stands_for(step, sizes):
    """Residual, gradients and loss behind rank-one updates equal those computed from scratch; the mask stays 2:4."""
    weight, _, squares = problem()
    descent, chosen = start(sizes), generator()
    for _ in range(8):
        descent.iterate(step, chosen)
        a, b, root = block_dense(descent.output_blocks), block_dense(descent.input_blocks), descent.root
        error = (a @ descent.core @ b - weight) * root
        torch.testing.assert_close(descent.inner, descent.core @ b * root)
        torch.testing.assert_close(descent.error, error)
        torch.testing.assert_close(descent.back, a.T @ error)
        torch.testing.assert_close(descent.slope, a.T @ error @ (b * root).T)
        whole = float((weight.square() * squares).sum())
        found = loss(weight, squares, descent.output_blocks, descent.core, descent.input_blocks)
        assert descent.loss == pytest.approx(found / whole, rel=1e-10)
        assert descent.kept.unique().tolist() == [0, 1]
        assert (descent.kept.unflatten(1, (-1, 4)).sum(-1) == 2).all()
        assert not descent.core[descent.kept == 0].any()


@pytest.mark.parametrize("sizes", [(6, 8), (1, 4), (24, 32)])
def test_sequential_steps_and_new_groups_never_raise_the_loss(sizes):
    descent, chosen = start(sizes), generator()
    for _ in range(60):
        before = descent.loss
        descent.sequential_step()
        descent._forward()
        descent.pull()
        between = descent.loss
        descent.reselect(chosen)
        assert descent.loss <= between * (1 + 1e-12) <= before * (1 + 1e-12)


def test_gradients_are_those_of_autograd():
    weight, _, squares = problem()
    descent = start()
    descent.iterate("sequential", generator())
    parts = [part.clone().requires_grad_() for part in (descent.output_blocks, descent.core, descent.input_blocks)]
    error = block_dense(parts[0]) @ parts[1] @ block_dense(parts[2]) - weight
    (error.square() * squares / squares.mean()).sum().backward()
    torch.testing.assert_close(2 * descent._slope_output(), parts[0].grad)
    torch.testing.assert_close(2 * descent.slope, parts[1].grad)
    torch.testing.assert_close(2 * descent._slope_input() * descent._columns(), parts[2].grad)


def test_adam_steps_are_those_of_torch_on_the_relative_loss():
    weight, mask, squares = problem()
    descent = start()
    whole = float((weight.square() * squares).sum())
    parts = [p.clone().requires_grad_() for p in (descent.output_blocks, descent.input_blocks, descent.core)]
    optimizer = torch.optim.Adam(parts, 1e-4)
    for _ in range(3):
        optimizer.zero_grad()
        product = block_dense(parts[0]) @ (parts[2] * mask) @ block_dense(parts[1])
        (((product - weight).square() * squares).sum() / whole).backward()
        optimizer.step()
        descent.adam_step()
        descent._forward()
        descent.pull()
    for found, expected in zip(
        (descent.output_blocks, descent.input_blocks, descent.core), (*parts[:2], parts[2] * mask), strict=True
    ):
        torch.testing.assert_close(found, expected.detach(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_a_new_group_is_the_best_one_by_least_squares(seed):
    weight, _, squares = problem(seed=seed)
    descent, chosen = start(seed=seed), generator(seed)
    for _ in range(3):
        descent.iterate("sequential", chosen)
    before = descent.core.clone()
    i, j, p, q = descent._drawn(generator(seed))
    descent.reselect(generator(seed))
    a, b = block_dense(descent.output_blocks), block_dense(descent.input_blocks)
    expected = before
    for tile in range(len(i)):  # tiles do not see each other
        row, first = int(i[tile]) * SIZES[0] + int(p[tile]), int(j[tile]) * SIZES[1] + int(q[tile])
        expected, _ = best_group(weight, squares, a, expected, b, row, first)
    torch.testing.assert_close(descent.core, expected, rtol=1e-6, atol=1e-9)


def test_groups_are_drawn_in_proportion_to_their_gradients():
    descent = start((24, 32))
    scores = descent.slope.abs().unflatten(1, (-1, 4)).sum(-1)  # [24, 8]
    chosen, counts = generator(), torch.zeros(24, 8)
    for _ in range(4000):
        _, _, p, q = descent._drawn(chosen)
        counts[p, q // 4] += 1
    expected = scores / scores.sum()
    assert ((counts / 4000 - expected).abs() < 5 * (expected / 4000).sqrt()).all()


def test_two_inputs_that_are_one_give_finite_values():
    row = random(1, 5)
    curvature = (row.T @ row)[:4, :4, None]  # of rank one
    places, values = best_pairs(curvature, row.T[:4], torch.ones(1, dtype=torch.float64))
    assert places.shape == (2, 1) and torch.isfinite(values).all()
    _, values = best_pairs(torch.zeros(4, 4, 1), torch.zeros(4, 1), torch.zeros(1))
    assert not values.any()


@pytest.mark.parametrize("step", ["adam", "sequential"])
def test_never_worse_than_its_start_and_wraps_what_can_be_wrapped(step):
    weight, mask, squares = problem(32, 32)
    found = wrap(weight, mask, squares, (8, 8), 150, step, 3e-3, 100, generator())
    assert len(found.losses) == 151 and found.losses[-1] < 0.7 * found.losses[0]
    assert (found.mask.unflatten(1, (-1, 4)).sum(-1) == 2).all() and not found.core[~found.mask].any()
    eye = torch.eye(8).double().repeat(4, 1, 1)
    start = loss(weight, squares, eye, weight * mask, eye)
    assert loss(weight, squares, found.output_blocks, found.core, found.input_blocks) < start


def test_a_product_near_the_identity_is_found_again():
    """W = A* S* B* with wrappers near the identity: far less is left than NoWag-P leaves."""
    core = random(32, 32)
    core = core * highest_of_groups(core.abs(), 2, 4)
    near = [torch.eye(8).double() + 0.15 * random(4, 8, 8, seed=seed) for seed in (1, 2)]
    weight = nowag_normalised(block_left(near[0], block_right(core, near[1])))[0]
    squares = torch.ones(32).double()
    mask = highest_of_groups(nowag_scores(weight, squares), 2, 4)
    found = wrap(weight, mask, squares, (8, 8), 400, "sequential", 1e-4, 100, generator())
    assert found.losses[-1] < 0.15 * found.losses[0]


def test_no_iterations_and_diverging_ones_give_the_start():
    weight, mask, squares = problem()
    for found in (
        wrap(weight, mask, squares, SIZES, 0, "adam", 1e-4, 100, generator()),
        wrap(weight, mask, squares, SIZES, 3, "adam", 1.0, 100, generator()),
    ):
        assert torch.equal(found.core, weight * mask) and torch.equal(found.mask, mask)
        assert torch.equal(block_dense(found.output_blocks), torch.eye(OUT).double())
        assert torch.equal(block_dense(found.input_blocks), torch.eye(IN).double())


def test_stops_where_nothing_is_gained_and_tells_of_its_way():
    weight, mask, squares = problem()
    sparse, told = weight * mask, []
    found = wrap(sparse, mask, squares, SIZES, 50, "sequential", 1e-4, 3, generator(), lambda *said: told.append(said))
    assert len(found.losses) == 4 and max(found.losses) < 1e-12  # a start that is exact
    assert [done for done, _ in told] == [1, 2, 3] and [x for _, x in told] == found.losses[1:]
    zero = wrap(torch.zeros_like(weight), mask, squares, SIZES, 50, "adam", 1e-4, 3, generator())
    assert zero.losses == [0.0]


def test_equal_seeds_equal_results():
    runs = [wrap(*problem(), SIZES, 5, "adam", 1e-3, 100, generator(seed)) for seed in (1, 1, 2)]
    assert torch.equal(runs[0].core, runs[1].core) and not torch.equal(runs[0].core, runs[2].core)


def test_float32_goes_the_way_of_float64():
    weight, mask, squares = problem(32, 64)
    losses = [
        wrap(weight.to(dtype), mask, squares.to(dtype), (8, 16), 60, "sequential", 1e-4, 100, generator()).losses[-1]
        for dtype in (torch.float32, torch.float64)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)
