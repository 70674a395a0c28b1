import pytest
import torch

from compress.errors import NumericsError
from compress.linalg.cayley import cayley_step, cayley_step_approximate, deviation, projected
from compress.linalg.hadamard import random_orthogonal


def problem(n=16, rows=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    point = random_orthogonal(n, generator)[: rows or n]
    return point, torch.randn(point.shape, generator=generator, dtype=torch.float64), generator


@pytest.mark.parametrize("rows", [1, 5, 16])
@pytest.mark.parametrize("lr", [1e-3, 0.3, 1.5, 1e6])
def test_exact_steps_stay_orthogonal(rows, lr):
    point, gradient, generator = problem(rows=rows)
    direction = None
    for _ in range(50):
        point, direction = cayley_step(point, gradient, lr, direction, momentum=0.5)
        gradient = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
    assert deviation(point) < 1e-12
    assert direction.shape == point.T.shape


def test_a_step_of_nothing_is_the_identity():
    point, gradient, _ = problem()
    torch.testing.assert_close(cayley_step(point, gradient, 0.0)[0], point)
    torch.testing.assert_close(cayley_step(point, torch.zeros_like(gradient), 1.5)[0], point)
    torch.testing.assert_close(cayley_step_approximate(point, gradient, 0.0)[0], point)


@pytest.mark.parametrize("take", [cayley_step, cayley_step_approximate])
def test_a_fixed_vector_stays(take):
    point, gradient, generator = problem()
    fixed = torch.randn(16, generator=generator, dtype=torch.float64)
    fixed /= fixed.norm()
    image = point @ fixed
    first = (gradient * point).sum()
    for _ in range(10):
        point, _ = take(point, gradient, 0.05, fixed=fixed)
    torch.testing.assert_close(point @ fixed, image, rtol=0, atol=1e-6 if take is cayley_step_approximate else 1e-13)
    assert (gradient * point).sum() < first - 0.5  # a linear loss, and it falls
    assert deviation(point) < 1e-4


def test_the_solved_step_is_the_cayley_transform():
    """An implementation by the formulas of the paper, without the tricks."""
    point, gradient, _ = problem(rows=5)
    x, m = point.T, -gradient.T
    hat = m @ x.T - 0.5 * x @ (x.T @ m @ x.T)
    skew = hat - hat.T
    step = min(0.7, 1 / float(skew.abs().sum(0).max()))
    inverse = torch.linalg.inv(torch.eye(16) - step / 2 * skew)
    expected = inverse @ (torch.eye(16) + step / 2 * skew) @ x
    found, direction = cayley_step(point, gradient, 0.7)
    torch.testing.assert_close(found, expected.T)
    torch.testing.assert_close(direction, skew @ x)


def test_approximate_and_exact_steps_agree():
    point, gradient, _ = problem()
    exact, direction = cayley_step(point, gradient, 1.5)
    approximate, same = cayley_step_approximate(point, gradient, 1.5)
    torch.testing.assert_close(same, direction)
    # a contraction by t |A| / 2 <= 1/2 each time, from an error of second order
    assert float((approximate - exact).abs().max()) < 0.5**6
    assert 1e-9 < deviation(approximate) < 1e-3
    small, _ = cayley_step_approximate(point, gradient, 1e-4)
    torch.testing.assert_close(small, cayley_step(point, gradient, 1e-4)[0], rtol=0, atol=1e-12)


def test_first_order_decrease():
    """To first order a step changes the loss by -t |A|^2 / 2 (for a full rotation; A = (M P - P^T M^T) / 2)."""
    point, gradient, _ = problem()
    step = 1e-6
    moved, direction = cayley_step(point, gradient, step)
    change = float((gradient * (moved - point)).sum())
    skew = direction @ point
    assert change == pytest.approx(-step * float(skew.square().sum()), rel=1e-4)


@pytest.mark.parametrize("take", [cayley_step, cayley_step_approximate])
def test_finds_a_rotation(take):
    """min |P B - C|^2 over orthogonal P: Procrustes, whose solution is known."""
    point, _, generator = problem(n=12)
    b = torch.randn(12, 30, generator=generator, dtype=torch.float64)
    target = random_orthogonal(12, generator)
    if torch.linalg.det(target) * torch.linalg.det(point) < 0:
        target[0] *= -1  # steps are rotations: they do not reflect
    c = target @ b
    losses = []
    for step in range(400):
        gradient = 2 * (point @ b - c) @ b.T
        losses.append(float((point @ b - c).square().sum()))
        arguments = {} if take is cayley_step else {"generator": generator}
        point, _ = take(point, gradient, 1.5 * (1 - step / 400), **arguments)
    assert losses[-1] < 1e-3 * losses[0]
    assert losses[20] < losses[0]
    assert deviation(projected(point)) < 1e-12


def test_approximate_steps_are_brought_back():
    """Rows have length 1 whatever the steps did before, and QR makes them orthonormal when it is drawn."""
    point, gradient, generator = problem()
    spoilt = point * torch.linspace(0.9, 1.1, 16, dtype=torch.float64)[:, None]
    assert deviation(cayley_step_approximate(spoilt, gradient, 0.0)[0]) < 1e-12
    skewed = point + 0.01 * torch.randn(16, 16, generator=generator, dtype=torch.float64)
    for _ in range(2000):
        skewed, _ = cayley_step_approximate(skewed, torch.zeros_like(gradient), 0.0, generator=generator)
        if deviation(skewed) < 1e-12:
            break
    else:
        pytest.fail("QR was never drawn")
    assert float((skewed - point).abs().max()) < 0.2  # of the same sign and order


def test_projected_is_the_nearest():
    point, noise, generator = problem()
    spoilt = point + 1e-3 * noise
    nearest = projected(spoilt.float())
    assert deviation(nearest) < 1e-12
    distance = float((nearest - spoilt).norm())
    for _ in range(20):
        other, _ = cayley_step(nearest, torch.randn(16, 16, generator=generator, dtype=torch.float64), 1e-3)
        assert float((other - spoilt).norm()) > distance - 1e-7  # 1e-7: `spoilt` was given in float32


def test_what_cannot_go_on_is_said():
    point, gradient, _ = problem()
    gradient[0, 0] = float("nan")
    for take in (cayley_step, cayley_step_approximate):
        with pytest.raises(NumericsError, match="smaller learning rate"):
            take(point, gradient, 1.0)
    with pytest.raises(NumericsError, match="not finite"):
        projected(gradient)
