from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.linalg.correction import Alternation, best_pair
from compress.linalg.grid import GridRule, fit_grid
from compress.linalg.quadratic import energy
from tests.methods.layers import inputs, weight

OUT, IN, RANK = 24, 40, 5
RULE = GridRule(2)


def moment(kind: str, x: Tensor) -> Tensor | None:
    return {"plain": None, "diagonal": x.square().sum(0), "whitened": x.T @ x}[kind]


def rounded(matrix: Tensor) -> Tensor:
    grid = fit_grid(matrix, 8, RULE)
    return grid.decode(grid.encode(matrix))


def turned(matrix: Tensor, m: Tensor | None, rank: int = RANK, rounds: int = 6, low_rank_first: bool = False):
    turns: Alternation[Tensor] = Alternation(matrix, rank, m, rounds, low_rank_first)
    while not turns.finished:
        found = rounded(turns.target)
        turns.take(found, found)
    return turns


def error(matrix: Tensor, m: Tensor | None) -> float:
    return energy(matrix.double(), m.diag().double() if m is not None and m.ndim == 1 else m)


@pytest.mark.parametrize("kind", ["plain", "diagonal", "whitened"])
@pytest.mark.parametrize("shape", [(OUT, IN), (IN, OUT)])
def test_no_pair_nearby_and_no_pair_of_directions_does_better(kind, shape):
    matrix, m = weight(*shape), moment(kind, inputs(200, shape[1]))
    pair = best_pair(matrix, RANK, m)
    least = error(matrix - pair.left @ pair.right, m)
    assert least == pytest.approx(pair.loss, rel=1e-6) and pair.total == pytest.approx(error(matrix, m), rel=1e-6)
    generator = torch.Generator().manual_seed(0)
    for size in (1e-3, 1e-2, 0.1, 1.0):
        for _ in range(5):
            left, right = (
                f + size * f.std() * torch.randn(f.shape, generator=generator, dtype=f.dtype)
                for f in (pair.left, pair.right)
            )
            assert error(matrix - left @ right, m) > least


def test_weights_of_rows_and_columns_are_met_exactly():
    """Errors weighted by u_i^2 v_j^2: rows are scaled before and after, columns are the diagonal."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.rand(n, generator=generator).double() + 0.1 for n in (OUT, IN))
    matrix = weight(OUT, IN).double()
    pair = best_pair(u[:, None] * matrix, RANK, v.square())
    left = pair.left / u[:, None]
    weights = u.square()[:, None] * v.square()
    expected = torch.linalg.svdvals(u[:, None] * matrix * v)[RANK:].square().sum()
    found = (weights * (matrix - left @ pair.right).square()).sum()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    constant = best_pair(3.0 * matrix, RANK, torch.full((IN,), 4.0))  # equal weights are none
    torch.testing.assert_close(constant.product() / 3, best_pair(matrix, RANK, None).product(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("low_rank_first", [False, True])
@pytest.mark.parametrize("kind", ["plain", "diagonal", "whitened"])
@pytest.mark.parametrize("seed", range(3))
def test_never_worse_than_rounding_or_the_first_round(kind, low_rank_first, seed):
    matrix, m = weight(OUT, IN, seed), moment(kind, inputs(200, IN, seed))
    turns = turned(matrix, m, low_rank_first=low_rank_first)
    alone = rounded(matrix)
    first = best_pair(matrix - alone, RANK, m)
    assert turns.alone == pytest.approx(error(matrix - alone, m), rel=1e-6)
    assert turns.losses[0] == pytest.approx(first.loss, rel=1e-9)
    assert turns.best.loss == min(turns.losses) <= first.loss < turns.alone
    assert error(matrix - turns.kept - turns.best.product(), m) == pytest.approx(turns.best.loss, rel=1e-4)
    one = turned(matrix, m, rounds=1, low_rank_first=low_rank_first)
    assert turns.losses[: len(one.losses)] == one.losses and turns.best.loss <= one.best.loss


def test_it_stops_where_a_round_is_worse_than_the_one_before():
    matrix = weight(OUT, IN)
    turns = turned(matrix, None, rounds=100)
    assert len(turns.losses) < 100 and turns.losses[-1] >= turns.losses[-2]
    assert turns.losses[:-1] == sorted(turns.losses[:-1], reverse=True)


@pytest.mark.parametrize("low_rank_first", [False, True])
def test_full_rank_leaves_nothing(low_rank_first):
    matrix = weight(OUT, IN)
    m = moment("whitened", inputs(200, IN))
    turns = turned(matrix, m, rank=OUT, low_rank_first=low_rank_first)
    assert turns.best.loss <= 1e-12 * turns.best.total
    torch.testing.assert_close(turns.kept + turns.best.product(), matrix, rtol=1e-4, atol=1e-6)


def test_nothing_needs_no_correction():
    turns = turned(torch.zeros(OUT, IN), moment("whitened", inputs(200, IN)))
    assert turns.alone == 0 and turns.best.loss == 0 and not turns.best.product().any()
