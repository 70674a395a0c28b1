import pytest
import torch

from compress.linalg import quadratic
from compress.linalg.quadratic import row_energy
from tests.linalg.problems import correlated


@pytest.mark.parametrize("tile", [1, 5, 24, 64])
def test_row_energy_is_the_squared_output(tile, monkeypatch):
    monkeypatch.setattr(quadratic, "TILE", tile)
    weight, hessian = correlated(7, 24)
    torch.testing.assert_close(row_energy(weight, hessian), (weight @ hessian @ weight.T).diagonal())
