from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.linalg.grid import GridRule, fit_grid
from compress.linalg.learned_rounding import (
    Start,
    hard_offset,
    learned_codes,
    learned_grid,
    learned_scale,
    rectified,
    regulariser,
    rounded,
    soft_start,
    softly_rounded,
    undecided,
)


def start(bits: int = 3, symmetric: bool = True, signed: bool = False, dtype=torch.float32, seed: int = 0) -> Start:
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(seed))
    weight[1, :8] = 0
    weight[2] = weight[2].abs()
    return Start(weight, fit_grid(weight, 8, GridRule(bits, symmetric, "mse", dtype, signed)))


SETTINGS = {
    "bits": st.integers(2, 8),
    "kind": st.sampled_from(["symmetric", "asymmetric", "signed"]),
    "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    "seed": st.integers(0, 10**6),
}


def made(bits, kind, dtype, seed) -> Start:
    return start(bits, kind != "asymmetric", kind == "signed", dtype, seed)


@given(**SETTINGS)
@settings(max_examples=30, deadline=None)
def test_nothing_learned_is_the_start_bit_for_bit(bits, kind, dtype, seed):
    begin = made(bits, kind, dtype, seed)
    offset, factor = torch.zeros_like(begin.grouped()), torch.ones_like(begin.scale())
    codes = begin.grid.encode(begin.weight)
    assert torch.equal(learned_codes(begin, offset, factor), codes)
    assert torch.equal(learned_codes(begin, None, factor), codes)
    assert torch.equal(rounded(begin, offset, factor), begin.grid.decode(codes))
    assert torch.equal(learned_grid(begin, factor).scale, begin.grid.scale)


@given(**SETTINGS)
@settings(max_examples=30, deadline=None)
def test_what_is_stored_is_what_was_trained(bits, kind, dtype, seed):
    begin = made(bits, kind, dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    offset = torch.rand(begin.grouped().shape, generator=generator) - 0.5
    factor = 0.8 + 0.4 * torch.rand(begin.scale().shape, generator=generator)
    codes, grid = learned_codes(begin, offset, factor), learned_grid(begin, factor)
    assert torch.equal(grid.decode(codes), rounded(begin, offset, factor))
    assert torch.equal(grid.scale.sign(), begin.grid.scale.sign())
    floor = (begin.grouped() / learned_scale(begin, factor)).floor()
    low, high = -torch.as_tensor(begin.zero()), begin.most - torch.as_tensor(begin.zero())
    steps = codes.unflatten(1, (4, 8)) + low
    assert (((steps == floor) | (steps == floor + 1)) | (steps == low) | (steps == high)).all()


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric", "signed"])
def test_the_fused_gradient_is_that_of_the_plain_expression(kind):
    begin = made(2, kind, torch.float32, 3)
    generator = torch.Generator().manual_seed(1)
    offset = (torch.rand(begin.grouped().shape, generator=generator) - 0.5).requires_grad_()
    factor = (0.7 + 0.5 * torch.rand(begin.scale().shape, generator=generator)).requires_grad_()
    upstream = torch.randn(begin.weight.shape, generator=generator)
    found = torch.autograd.grad((rounded(begin, offset, factor) * upstream).sum(), (offset, factor))
    scale = begin.scale() * factor
    steps = begin.grouped() / scale + offset
    steps = steps + (steps.round() - steps).detach()  # straight through
    low, high = -torch.as_tensor(begin.zero()), begin.most - torch.as_tensor(begin.zero())
    plain = (torch.clamp(steps, low, high) * scale).flatten(1)
    expected = torch.autograd.grad((plain * upstream).sum(), (offset, factor))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_adaround_starts_at_the_weight_and_ends_at_a_neighbour():
    begin = start(4)
    variable = soft_start(begin)
    rest = begin.grouped() / begin.scale() % 1
    torch.testing.assert_close(rectified(variable), rest, rtol=0, atol=1e-5)
    inside = (begin.grouped() / begin.scale()).abs() < 7
    soft = softly_rounded(begin, variable).unflatten(1, (4, 8))
    torch.testing.assert_close(soft[inside], begin.grouped()[inside], rtol=1e-4, atol=1e-5)
    factor = torch.ones_like(begin.scale())
    nearest = learned_codes(begin, None, factor)
    hard = learned_codes(begin, hard_offset(begin, variable), factor)
    assert (hard != nearest).float().mean() < 0.01  # 0 <= V is 1/2 <= h: to the nearest, but for ties
    turned = learned_codes(begin, hard_offset(begin, -variable), factor)
    assert ((turned.int() - hard.int()).abs() <= 1).all() and (turned != hard).float().mean() > 0.5
    decided = torch.where(variable >= 0, 10.0, -10.0)
    assert undecided(variable) > 0.5 and undecided(decided) == 0
    assert float(regulariser(decided, 2.0)) == 0
    assert float(regulariser(variable, 20.0)) > float(regulariser(variable, 2.0)) > 0
