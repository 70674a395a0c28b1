from __future__ import annotations

import pytest
import torch

from compress.linalg import krylov
from compress.linalg.correction import best_pair
from compress.linalg.krylov import leading
from compress.linalg.low_rank import decompose
from tests.methods.layers import inputs, weight


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(krylov, "LEAST", 100)
    monkeypatch.setattr(krylov, "NARROW", 8)


@pytest.mark.parametrize("shape", [(128, 160), (160, 128)])
@pytest.mark.parametrize("kind", ["plain", "diagonal", "whitened"])
@pytest.mark.parametrize("rank", [1, 8])
def test_as_good_as_the_full_decomposition(shape, kind, rank):
    """Of errors of rounding, whose spectrum under the identity is as flat as any: the hardest case."""
    matrix = weight(*shape)
    matrix, x = matrix - matrix.mul(20).round().div(20), inputs(400, shape[1])
    moment = {"plain": None, "diagonal": x.square().sum(0), "whitened": x.T @ x}[kind]
    few, full = leading(matrix, rank, moment), decompose(matrix, rank, moment)
    assert few is not None
    best = float(full.energies[:rank].sum())
    assert few.total == pytest.approx(full.total, rel=1e-9)
    assert best - 1e-5 * full.loss <= few.held <= best * (1 + 1e-9)
    torch.testing.assert_close(few.basis.T @ few.basis, torch.eye(rank).double(), rtol=0, atol=1e-10)
    left = few.basis @ (few.basis.T @ matrix.double())
    root = torch.linalg.cholesky(x.T.double() @ x.double()) if kind == "whitened" else torch.eye(shape[1]).double()
    root = moment.double().sqrt().diag() if kind == "diagonal" else root
    assert float(((matrix - left) @ root).square().sum()) == pytest.approx(few.total - few.held, rel=1e-6)
    again = leading(matrix, rank, moment)
    assert again is not None and torch.equal(again.basis, few.basis)


def test_no_answer_where_there_are_fewer_directions_or_no_use_of_one():
    thin = torch.randn(128, 3, generator=torch.Generator().manual_seed(0)) @ weight(3, 160)
    assert leading(thin, 4, None) is None and leading(torch.zeros(128, 160), 4, None) is None
    assert best_pair(thin, 4, None).loss == pytest.approx(0, abs=1e-8 * float(thin.square().sum()))
    assert leading(weight(128, 160), 9, None) is None, "too wide"
    assert leading(weight(99, 160), 1, None) is None, "too small"
