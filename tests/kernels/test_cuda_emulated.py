"""The CUDA kernels' own sources, run lane by lane on the CPU: every index, every code, every tail; not speed, not a GPU."""

from __future__ import annotations

import pytest
import torch

from compress.errors import RecipeError
from compress.kernels.cuda import linear as calls
from compress.kernels.cuda.hadamard import transform
from compress.kernels.cuda.layout import pack_weight
from compress.kernels.cuda.linear import LowRank, linear
from compress.kernels.packing import dequantize
from compress.linalg.hadamard import transformed
from tests.kernels.emulated import emulation
from tests.kernels.test_cuda_layout import GROUPS, problem

DTYPES = [torch.float16, torch.bfloat16]
# Codes and scales are exact in float32, so that rounding the output remains: half an ulp, and some for sums of 16-bit inputs.
BOUND = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@pytest.fixture(scope="module")
def library():
    return emulation()


def weighed(n_out, n_in, bits, group, symmetric, dtype):
    """Buffer, layout, and the weight in float64 and as the reference rounds it."""
    codes, scale, zeros = problem(n_out, n_in, bits, group, symmetric, dtype)
    buffer, layout = pack_weight(codes, scale, zeros, bits, group)
    return buffer, layout, dequantize(codes, scale.double(), zeros, bits), dequantize(codes, scale, zeros, bits)


def close(y, wanted):
    return bool((y.double() - wanted).norm() <= BOUND[y.dtype] * wanted.norm())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_dequantising_is_the_reference_bit_for_bit(library, bits, symmetric):
    for group, n_in in GROUPS:
        for dtype in DTYPES:
            buffer, layout, _, weight = weighed(70, n_in, bits, group, symmetric, dtype)
            for out in DTYPES:
                assert torch.equal(calls.dequantize(library, buffer, layout, out), weight.to(out))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_unit_inputs_give_the_weight_itself(library, bits, dtype):
    """All codes stand at all places of a block: code = row + column and further, modulo their number."""
    n_out, n_in = 128, 128
    place = torch.arange(n_out)[:, None] * 3 + torch.arange(n_in)[None] + torch.arange(n_in)[None] // 2**bits
    codes = (place % 2**bits).to(torch.uint8)
    _, scale, zeros = problem(n_out, n_in, bits, 32, False, dtype)
    for zero_points in (None, zeros):
        buffer, layout = pack_weight(codes, scale, zero_points, bits, 32)
        weight = dequantize(codes, scale, zero_points, bits)
        unit = torch.eye(n_in, dtype=dtype)
        for first in range(0, n_in, 64):
            rows = unit[first : first + 64]
            assert torch.equal(linear(library, rows, buffer, layout, path="tensor"), weight[:, first : first + 64].T)
        for first in (0, 16, 48, 112):
            rows = unit[first : first + 16]
            assert torch.equal(linear(library, rows, buffer, layout, path="decode"), weight[:, first : first + 16].T)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("path", ["decode", "tensor"])
def test_products(library, bits, path):
    cases = [(1, 1, True, 1), (7, 70, False, 2), (9, 65, True, 1), (16, 257, False, 3)]
    for i, (group, n_in) in enumerate(GROUPS):
        tokens, n_out, symmetric, splits = cases[i % len(cases)]
        dtype = DTYPES[i % 2]
        buffer, layout, weight, _ = weighed(n_out, n_in, bits, group, symmetric, dtype)
        x, bias = torch.randn(tokens, n_in).to(dtype), torch.randn(n_out).to(dtype)
        y = linear(library, x, buffer, layout, bias, path=path, splits=splits)
        assert close(y, x.double() @ weight.T + bias.double()), (group, n_in)


@pytest.mark.parametrize("tokens", [2, 8, 15, 17, 32, 33, 64, 65])
def test_any_number_of_tokens_in_order_as_the_table_says(library, tokens):
    buffer, layout, weight, _ = weighed(130, 192, 4, 64, False, torch.float16)
    x = torch.randn(tokens, 192).half()
    y = linear(library, x, buffer, layout)
    assert close(y, x.double() @ weight.T)
    assert torch.equal(linear(library, x, buffer, layout), y)


def test_splits_are_summed_alike_every_time(library):
    buffer, layout, weight, _ = weighed(64, 640, 4, 128, True, torch.bfloat16)
    x = torch.randn(5, 640).bfloat16()
    for path in ("decode", "tensor"):
        for splits in (1, 3, 16):  # the last: more parts than blocks
            y = linear(library, x, buffer, layout, path=path, splits=splits)
            assert close(y, x.double() @ weight.T)
            assert torch.equal(y, linear(library, x, buffer, layout, path=path, splits=splits))


def test_low_rank_parts_are_added(library):
    for rank, tokens, splits, path in (
        (8, 3, 1, "decode"),
        (72, 16, 2, "decode"),
        (64, 33, 2, "tensor"),
        (20, 4, 1, "dequantize"),
    ):
        buffer, layout, weight, _ = weighed(70, 128, 3, 64, False, torch.float16)
        right, left = torch.randn(rank, 128).half() * 0.05, torch.randn(70, rank).half() * 0.05
        x = torch.randn(tokens, 128).half()
        y = linear(library, x, buffer, layout, low_rank=LowRank.of(left, right), path=path, splits=splits)
        hidden = (x @ right.T).double()
        wanted = x.double() @ weight.T + hidden @ left.double().T
        assert (y.double() - wanted).norm() <= 3 * BOUND[torch.float16] * wanted.norm()


def test_inputs_of_any_shape_and_strides(library):
    buffer, layout, weight, _ = weighed(65, 96, 4, 32, True, torch.bfloat16)
    wide = torch.full((4, 200), float("nan")).bfloat16()
    wide[:, 8:104] = torch.randn(4, 96).bfloat16()
    wanted = wide[:, 8:104].double() @ weight.T
    assert close(linear(library, wide[:, 8:104], buffer, layout), wanted)  # NaN on both sides is not read
    odd = torch.cat([wide[:, :1], wide[:, 8:104]], dim=1)[:, 1:]  # not aligned
    assert close(linear(library, odd, buffer, layout), wanted)
    turned = wide[:, 8:104].T.contiguous().T
    assert close(linear(library, turned.view(2, 2, 96), buffer, layout).flatten(0, 1), wanted)
    assert linear(library, wide[:0, 8:104], buffer, layout).shape == (0, 65)
    nothing = torch.zeros(2, 0, 96).bfloat16()
    low_rank = LowRank.of(torch.zeros(65, 8).bfloat16(), torch.zeros(8, 96).bfloat16())
    for part in (None, low_rank):
        assert linear(library, nothing, buffer, layout, low_rank=part).shape == (2, 0, 65)


def test_what_is_not_finite_stays_with_its_token(library):
    buffer, layout, weight, _ = weighed(64, 128, 4, 64, False, torch.float16)
    x = torch.randn(9, 128).half()
    x[3, 5], x[8, 100] = float("nan"), float("inf")
    y = linear(library, x, buffer, layout)
    fine = [i for i in range(9) if i not in (3, 8)]
    assert y[3].isnan().all() and not y[8].isfinite().any()
    assert close(y[fine], x[fine].double() @ weight.T)


def test_what_cannot_be_is_refused_with_op_shape_and_device(library):
    buffer, layout, _, _ = weighed(64, 128, 4, 64, True, torch.float16)
    x = torch.randn(4, 128).half()
    with pytest.raises(RecipeError, match=r"packed_linear \(17, 128\) x \(64, 128\) on cpu: too many tokens"):
        linear(library, torch.zeros(17, 128).half(), buffer, layout, path="decode")
    with pytest.raises(RecipeError, match="splits are not 1 to 64"):
        linear(library, x, buffer, layout, splits=65)
    with pytest.raises(RecipeError, match="float32"):
        linear(library, x.float(), buffer, layout)
    with pytest.raises(RecipeError, match="128 inputs"):
        linear(library, x[:, :64], buffer, layout)
    with pytest.raises(RecipeError, match="the buffer is"):
        linear(library, x, buffer[:-128], layout)
    with pytest.raises(RecipeError, match="the bias is .* on meta"):
        linear(library, x, buffer, layout, torch.zeros(64, device="meta"))
    with pytest.raises(RecipeError, match="the low-rank part is on meta"):
        part = LowRank.of(torch.zeros(64, 8).half(), torch.zeros(8, 128, device="meta").half())
        linear(library, x, buffer, layout, low_rank=part)
    with pytest.raises(RecipeError, match="no such Hadamard matrix"):
        transform(library, torch.zeros(2, 6).half(), 6, False)


@pytest.mark.parametrize(
    ("n", "block"),
    [(1, 1), (2, 2), (128, 128), (256, 32), (4096, 4096), (24, 12), (448, 448), (336, 168), (1040, 1040)],
)
def test_hadamard_transforms(library, n, block):
    """Powers of two, cores of up to 64, of more than 64 (84), and two of them (20 and 52)."""
    for dtype in DTYPES:
        x = torch.randn(3, n).to(dtype)
        for transposed in (False, True):
            assert close(transform(library, x, block, transposed), transformed(x.double(), block, transposed))
