from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import NumericsError
from compress.linalg import grid as grid_module
from compress.linalg.grid import SEARCH_NORM, Grid, GridRule, fit_grid, fit_range, stored_scale
from tests.reference.grid import grid_reference, round_reference

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    clip=st.sampled_from(["none", "mse"]),
    group_size=st.sampled_from([-1, 4, 8]),
    seed=st.integers(0, 10**6),
    spread=st.floats(1e-3, 1e2),
    shift=st.floats(-1, 1),
)
@settings(max_examples=60, deadline=None)
def test_every_grid_is_sound(bits, symmetric, dtype, clip, group_size, seed, spread, shift):
    weight = (normal(5, 16, seed=seed) + shift) * spread
    grid = fit_grid(weight, group_size, GridRule(bits, symmetric, clip, dtype))
    codes = grid.encode(weight)
    values = grid.decode(codes)
    n_groups = 1 if group_size == -1 else 16 // group_size

    assert grid.scale.dtype == dtype
    assert grid.scale.shape == (5, n_groups)
    assert (grid.scale > 0).all()
    assert torch.isfinite(grid.scale).all()
    assert codes.dtype == torch.uint8
    assert int(codes.max()) < 2**bits
    assert (grid.zero_point is None) == symmetric
    if grid.zero_point is not None:
        assert grid.zero_point.dtype == torch.int32
        assert int(grid.zero_point.min()) >= 0
        assert int(grid.zero_point.max()) < 2**bits
    assert torch.equal(grid.decode(grid.encode(torch.zeros_like(weight))), torch.zeros_like(weight))  # 0 is on the grid
    if dtype != torch.bfloat16 or bits <= 6:  # at more bits bfloat16 rounds neighbours of the grid into one
        assert torch.equal(grid.encode(values), codes)  # a value of the grid is its own nearest
    if clip == "none":  # half a step, and what the roundings of scale and value to their dtype make of it
        step = grid.scale.float().repeat_interleave(16 // n_groups, 1)
        slack = 0.5 + 1.5 * (2**bits - 1) * torch.finfo(dtype).eps + 1e-4
        slack += 0.5 if not symmetric else 0.0  # a rounded zero point moves the range by up to half a step
        assert ((values - weight).abs() <= slack * step).all()


@given(
    bits=st.integers(2, 5),
    dtype=st.sampled_from(DTYPES),
    clip=st.sampled_from(["none", "mse"]),
    seed=st.integers(0, 10**6),
    shift=st.floats(-1, 1),
)
@settings(max_examples=40, deadline=None)
def test_a_signed_grid_loses_nothing_against_the_unsigned_search(bits, dtype, clip, seed, shift):
    weight = normal(5, 16, seed=seed) + shift
    grid = fit_grid(weight, 8, GridRule(bits, True, clip, dtype, signed=True))
    codes = grid.encode(weight)
    values = grid.decode(codes)
    assert torch.isfinite(grid.scale).all() and (grid.scale != 0).all() and grid.zero_point is None
    assert torch.equal(grid.encode(values), codes)
    assert torch.equal(grid.decode(grid.encode(torch.zeros_like(weight))), torch.zeros_like(weight))
    if clip == "none":  # the largest weight of a group lands on the extra code, exactly but for the dtype of the scale
        groups, found = weight.unflatten(1, (2, 8)), codes.unflatten(1, (2, 8))
        at = groups.abs().argmax(-1, keepdim=True)
        assert (found.gather(-1, at) == 0).all()
        largest = groups.gather(-1, at)
        assert torch.allclose(values.unflatten(1, (2, 8)).gather(-1, at), largest, rtol=4 * torch.finfo(dtype).eps)


def test_signed_scales_pay_at_two_bits():
    weight = normal(64, 256)
    rules = [GridRule(2, clip="mse"), GridRule(2, clip="mse", signed=True)]
    plain, signed = (
        float((weight - grid.decode(grid.encode(weight))).square().sum())
        for grid in (fit_grid(weight, 32, rule) for rule in rules)
    )
    assert signed < 0.95 * plain


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_grid_is_the_reference_number_by_number(bits, symmetric):
    weight = normal(4, 8, seed=bits) + 0.3
    grid = fit_grid(weight, 8, GridRule(bits, symmetric))
    codes = grid.encode(weight)
    for row in range(4):
        scale, zero = grid_reference(weight[row].tolist(), bits, symmetric)
        assert float(grid.scale[row, 0]) == pytest.approx(scale, rel=1e-6)
        if grid.zero_point is not None:
            assert int(grid.zero_point[row, 0]) == zero
        step = float(grid.scale[row, 0])
        for value, code in zip(weight[row].tolist(), codes[row].tolist(), strict=True):
            nearest = round_reference(value, step, zero, bits)
            tie = abs(abs((code - zero) * step - value) - abs((nearest - zero) * step - value)) < 1e-6 * step
            assert code == nearest or tie


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_clip_search_lowers_the_error_it_minimises(symmetric, dtype):
    weight = normal(64, 64) ** 3  # heavy tails, where clipping pays
    error = {}
    for clip in ("none", "mse"):
        grid = fit_grid(weight, 32, GridRule(3, symmetric, clip, dtype))
        exact = Grid(3, grid.scale.float(), grid.zero_point)  # the search does not see the rounding of values
        difference = (exact.decode(exact.encode(weight)) - weight).abs()
        error[clip] = difference.pow(SEARCH_NORM).unflatten(1, (2, 32)).sum(-1)
    assert (error["mse"] <= error["none"] * (1 + 1e-5)).all()
    assert error["mse"].sum() < 0.95 * error["none"].sum()


def test_a_symmetric_grid_does_not_depend_on_the_sign():
    weight = normal(8, 32)
    rule = GridRule(4)
    assert torch.equal(fit_grid(weight, 16, rule).scale, fit_grid(-weight, 16, rule).scale)


def test_all_positive_group_keeps_its_whole_range():
    weight = torch.linspace(0.5, 1, 16).unsqueeze(0)  # the original code clips these at 0.5
    grid = fit_grid(weight, -1, GridRule(4))
    assert (grid.decode(grid.encode(weight)) - weight).abs().max() <= grid.scale.float().max() / 2 * 1.001


@pytest.mark.parametrize("clip", ["none", "mse"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_group_of_zeros_stays_zero(dtype, symmetric, clip):
    grid = fit_grid(torch.zeros(3, 8), 4, GridRule(4, symmetric, clip, dtype))
    assert (grid.scale > 0).all()
    assert torch.equal(grid.decode(grid.encode(torch.zeros(3, 8))), torch.zeros(3, 8))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("magnitude", [1e-2, 1e-3, 1e-4, 1e-5])
def test_float16_scales_below_its_normal_range_clip_nothing(magnitude, bits):
    weight = normal(16, 32) * magnitude
    grid = fit_grid(weight, -1, GridRule(bits, scale_dtype=torch.float16))
    step = grid.scale.float()
    assert (step > 0).all()
    slack = 0.5 + (2**bits - 1) * torch.finfo(torch.float16).eps + 0.5  # values below 2^-14 are multiples of 2^-24
    assert ((grid.decode(grid.encode(weight)) - weight).abs() <= slack * step).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_stored_scale_is_representable_and_positive(dtype):
    scale = torch.tensor([1e-45, 1e-30, 1e-8, 1e-7, 3e-5, 7e-5, 0.01, 1.0, 1e3])
    stored = stored_scale(scale, dtype)
    assert (stored > 0).all()
    assert torch.equal(stored.to(dtype).float(), stored)


def test_scale_that_does_not_fit_is_an_error():
    with pytest.raises(NumericsError, match="float16 cannot hold"):
        fit_grid(torch.full((2, 4), 1e6), -1, GridRule(2, scale_dtype=torch.float16))
    with pytest.raises(NumericsError):
        fit_grid(torch.tensor([[1.0, float("nan")]]), -1, GridRule(4))


def test_chunks_leave_no_trace(monkeypatch):
    weight = normal(11, 64)
    rule = GridRule(4, symmetric=False, clip="mse", scale_dtype=torch.bfloat16)
    whole = fit_grid(weight, 32, rule)
    codes = whole.encode(weight)
    monkeypatch.setattr(grid_module, "CHUNK", 3 * 64)
    chunked = fit_grid(weight, 32, rule)
    assert torch.equal(whole.scale, chunked.scale)
    assert torch.equal(whole.zero_point, chunked.zero_point)
    assert torch.equal(chunked.encode(weight), codes)
    assert torch.equal(chunked.decode(codes), whole.rows(slice(None)).decode(codes))


def test_range_of_any_shape_and_stride():
    weight = normal(6, 4, 8)
    scale, zero = fit_range(weight, GridRule(4, symmetric=False))
    assert scale.shape == zero.shape == (6, 4)
    turned, _ = fit_range(weight.permute(2, 0, 1).contiguous().permute(1, 2, 0), GridRule(4, symmetric=False))
    assert torch.equal(scale, turned)
