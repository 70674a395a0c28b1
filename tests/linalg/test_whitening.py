from __future__ import annotations

import pytest
import torch

from compress.errors import NumericsError
from compress.linalg.whitening import whitening
from tests.methods.layers import inputs, weight


def test_the_plain_norm_behind_it_is_the_error_of_the_outputs():
    x = inputs(300, 24).double()
    white = whitening(x.T @ x, 0.0)
    torch.testing.assert_close(white.upper.T @ white.upper, x.T @ x)
    assert white.damping == 0 and not white.upper.tril(-1).any()
    w, other = weight(10, 24).double(), weight(10, 24, seed=5).double()
    error = (white.forward(w) - white.forward(other)).norm()
    torch.testing.assert_close(error, (x @ (w - other).T).norm(), rtol=1e-4, atol=0)
    torch.testing.assert_close(white.back(white.forward(w)), w)


def test_too_few_tokens_and_inputs_that_are_never_there_are_repaired():
    x = inputs(5, 24)
    x[:, 3] = 0
    white = whitening(x.T @ x, 0.0)
    assert 0 < white.damping <= 1e-4
    w = weight(10, 24).double()
    torch.testing.assert_close(white.back(white.forward(w)), w)
    assert whitening(torch.zeros(4, 4), 0.0).upper.equal(torch.eye(4).double())
    assert whitening(x.T @ x, 0.01).damping == 0.01


def test_what_cannot_be_factored_is_said():
    with pytest.raises(NumericsError, match="NaN or infinity"):
        whitening(torch.full((3, 3), torch.nan), 0.0)
    with pytest.raises(NumericsError, match="could not be factored"):
        whitening(torch.tensor([[1.0, 5.0e6], [5.0e6, 1.0]]), 0.0)
