"""Repacked integer weights: the layout, the compiled kernels against the reference on every instruction set, refusals."""

from __future__ import annotations

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import RecipeError
from compress.kernels import native
from compress.kernels.buffers import HUGE_PAGE, allocate, huge_pages_possible
from compress.kernels.packed import PackedWeight, _dense, _reference, _weight, packed_linear, prepare
from compress.kernels.packed_layout import read, written
from compress.kernels.packing import dequantize, pack

ISAS = native.isas() or ["reference"]
TOKENS = (1, 2, 7, 8, 9, 13, 33, 193)  # one, few, a whole block of registers and more, and a second slab


@pytest.fixture(params=ISAS)
def isa(request):
    if request.param == "reference":
        pytest.skip(f"only the reference is tested: {native.absent()}")
    with native.using_isa(request.param):
        yield request.param


def problem(bits, group_size, n_in, n_out=37, symmetric=True, dtype=torch.float32, seed=0):
    """codes, scale, zero points, and the weight packed from them."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (n_out, n_in), generator=generator)
    n_groups = 1 if group_size == -1 else n_in // group_size
    scale = (torch.rand(n_out, n_groups, generator=generator) + 0.1).to(dtype)
    zero = None if symmetric else torch.randint(0, 2**bits, scale.shape, generator=generator)
    return codes, scale, zero, prepare(pack(codes, bits), scale, zero, bits, group_size, n_in)


def reference(x, weight: PackedWeight, bias=None, activations=8):
    w = weight.layout
    sizes = (w.bits, w.group_size, w.out_features, w.in_features, w.zero_point, w.scale_dtype)
    return _reference(x, weight.buffer, bias, *sizes, activations)


def close(found, expected, x, weight, dtype=torch.float32):
    """Within the rounding of float32 sums of the products' magnitudes, and of the result."""
    w = weight.layout
    offset = 2.0**w.bits  # sums of codes are formed before the zero point is taken off
    magnitude = x.float().abs().sum(-1, keepdim=True) * offset * weight.dense().abs().max() / 2 ** (w.bits - 1)
    bound = 8 * torch.finfo(torch.float32).eps * magnitude + 2 * torch.finfo(dtype).eps * expected.float().abs()
    assert ((found.float() - expected.float()).abs() <= bound).all()


SIZES = [(2, 128, 256), (2, 20, 60), (3, 32, 96), (3, 128, 384), (3, -1, 300), (4, 32, 64), (4, 128, 256), (4, -1, 139),
         (4, 256, 512), (5, 64, 128), (8, 128, 256), (8, -1, 131), (1, 16, 48), (4, 1, 7), (8, 1, 1)]  # fmt: skip


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group_size", "n_in"), SIZES)
def test_every_code_comes_back_from_the_buffer(bits, group_size, n_in, symmetric):
    codes, scale, zero, weight = problem(bits, group_size, n_in, symmetric=symmetric, dtype=torch.bfloat16)
    again, scales, zeros = read(weight.buffer, weight.layout)
    assert torch.equal(again.long(), codes) and torch.equal(scales, scale)
    assert (zeros is None) == symmetric and (zeros is None or torch.equal(zeros.long(), zero))
    slow = torch.empty_like(weight.buffer)  # the compiled packer writes what the obvious one writes
    written(codes, scale, zero, weight.layout, slow)
    assert torch.equal(slow, weight.buffer)
    assert weight.buffer.numel() == weight.nbytes
    zero8 = None if zero is None else zero.to(torch.uint8)
    expected = dequantize(codes.to(torch.uint8), scale.float(), zero8, bits)
    torch.testing.assert_close(weight.dense(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("activations", [8, 16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group_size", "n_in"), SIZES)
def test_equals_the_reference(isa, bits, group_size, n_in, symmetric, activations):
    _, _, _, weight = problem(bits, group_size, n_in, symmetric=symmetric)
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(37, generator=generator)
    x = torch.randn(193, n_in, generator=generator) * torch.logspace(-2, 2, n_in)
    expected = reference(x, weight, bias, activations)
    for n in TOKENS:
        found = packed_linear(x[:n], weight, bias, activations)
        close(found, expected[:n], x[:n], weight)


@pytest.mark.parametrize("activations", [8, 16])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_of_activations_scales_and_bias(isa, dtype, scale_dtype, activations):
    _, _, _, weight = problem(4, 32, 64, n_out=48, dtype=scale_dtype)
    x = torch.randn(5, 64).to(dtype)
    for bias in (None, torch.randn(48).to(dtype), torch.randn(48)):
        found = packed_linear(x, weight, bias, activations)
        assert found.dtype == dtype
        close(found, reference(x, weight, bias, activations), x, weight, dtype)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_identity_gives_the_weight(isa, bits):
    """Rows of the identity are whole steps of their own block's scale: nothing is rounded, and every place is seen."""
    _, _, _, weight = problem(bits, 32, 96)
    for activations in (8, 16):
        found = packed_linear(torch.eye(96) * 127, weight, activations=activations)
        torch.testing.assert_close(found.T / 127, weight.dense(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_whole_numbers_multiply_exactly(isa, bits):
    """Activations that are -127 .. 127 already, scales that are powers of two: every sum is exact."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**bits, (40, 256), generator=generator)
    scale = 2.0 ** torch.randint(-4, 4, (40, 2), generator=generator)
    weight = prepare(pack(codes, bits), scale, None, bits, 128, 256)
    x = torch.randint(-127, 128, (193, 256), generator=generator).float()
    x[:, ::128] = 127
    exact = (x.double() @ weight.dense().double().T).float()
    for n in TOKENS:
        assert torch.equal(packed_linear(x[:n], weight), exact[:n])


@pytest.mark.parametrize("activations", [8, 16])
def test_shapes_and_strides(isa, activations):
    _, _, _, weight = problem(4, 32, 64)
    x = torch.randn(2, 3, 64)
    flat = packed_linear(x.view(6, 64), weight, activations=activations)
    assert torch.equal(packed_linear(x, weight, activations=activations).view(6, 37), flat)
    assert torch.equal(
        packed_linear(x.transpose(0, 1), weight, activations=activations).transpose(0, 1).reshape(6, 37), flat
    )
    wide = torch.randn(6, 200)
    wide[:, 70:134] = x.view(6, 64)
    assert torch.equal(packed_linear(wide[:, 70:134], weight, activations=activations), flat)
    assert torch.equal(packed_linear(x.view(6, 64).T.contiguous().T, weight, activations=activations), flat)
    assert packed_linear(torch.randn(0, 5, 64), weight, activations=activations).shape == (0, 5, 37)
    assert packed_linear(torch.randn(64), weight, activations=activations).shape == (37,)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_bits_do_not_depend_on_company_threads_or_the_run(isa, bits):
    """A token's result is the same alone and among others, with one thread and with two, and every time."""
    _, _, _, weight = problem(bits, 64, 256, n_out=80, symmetric=False)
    x = torch.randn(193, 256)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        together = packed_linear(x, weight)
        assert torch.equal(packed_linear(x, weight), together)
        torch.set_num_threads(1)
        assert torch.equal(packed_linear(x, weight), together)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.cat([packed_linear(row, weight) for row in x.split(1)]), together)
    assert torch.equal(packed_linear(x[3:8], weight), together[3:8])


def test_instruction_sets_agree_to_the_last_bit():
    if len(ISAS) < 3:
        pytest.skip(f"this processor and build have {ISAS}")
    _, _, _, weight = problem(3, 32, 96, symmetric=False)
    x = torch.randn(9, 96)
    results = []
    for name in ISAS[1:]:  # the portable path has no fused multiply-add
        with native.using_isa(name):
            results.append(packed_linear(x, weight))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("activations", [8, 16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(isa, bad, activations):
    _, _, _, weight = problem(4, 32, 64)
    x = torch.randn(9, 64)
    x[4, 40] = bad
    y = packed_linear(x, weight, activations=activations)
    assert not y[4].isfinite().any()
    assert y[[0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()


def test_zeros_and_tiny_activations(isa):
    _, _, _, weight = problem(4, 32, 64)
    assert torch.equal(packed_linear(torch.zeros(3, 64), weight), torch.zeros(3, 37))
    assert packed_linear(torch.full((3, 64), 1e-39), weight).abs().max() < 1e-30


@given(st.integers(1, 8), st.integers(1, 40), st.integers(1, 3), st.integers(1, 40), st.integers(1, 30), st.booleans())
@settings(max_examples=25, deadline=None)
def test_any_shape(bits, group_size, n_groups, n_out, n_tokens, symmetric):
    _, _, _, weight = problem(bits, group_size, group_size * n_groups, n_out, symmetric, torch.float16)
    x = torch.randn(n_tokens, group_size * n_groups)
    for activations in (8, 16):
        close(packed_linear(x, weight, activations=activations), reference(x, weight, None, activations), x, weight)


@pytest.mark.parametrize("activations", [8, 16])
def test_opcheck_and_gradient(activations):
    _, _, _, weight = problem(4, 32, 64)
    w = weight.layout
    rest = (w.bits, w.group_size, w.out_features, w.in_features, w.zero_point, w.scale_dtype, activations)
    operation = torch.ops.compress.packed_linear.default
    torch.library.opcheck(operation, (torch.randn(2, 3, 64), weight.buffer, torch.randn(37), *rest))
    x = torch.randn(3, 64, requires_grad=True)
    torch.library.opcheck(operation, (x, weight.buffer, None, *rest))
    packed_linear(x, weight, activations=activations).sum().backward()
    torch.testing.assert_close(x.grad, _dense(weight.buffer, w).sum(0).expand(3, 64))


def test_compiles_without_a_break():
    _, _, _, weight = problem(4, 32, 64)
    compiled = torch.compile(lambda x: packed_linear(x, weight).relu(), fullgraph=True, backend="eager")
    x = torch.randn(2, 64)
    assert torch.equal(compiled(x), packed_linear(x, weight).relu())


def test_rounded_activations_cost_what_the_docs_say():
    """Gaussian weights and activations: about 0.6 % of the output's norm for blocks of 128, less for 32."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(64, 1024, generator=generator).mul_(3).round_().clamp_(-8, 7).long() + 8
    x = torch.randn(64, 1024, generator=generator)
    errors = []
    for group in (128, 32):
        weight = prepare(pack(codes, 4), torch.ones(64, 1024 // group), None, 4, group, 1024)
        kept = packed_linear(x, weight, activations=16)
        errors.append(((packed_linear(x, weight, activations=8) - kept).norm() / kept.norm()).item())
    assert errors[1] < errors[0] < 0.008


def test_what_does_not_fit_is_refused():
    codes, scale, _, weight = problem(4, 32, 64)
    words = pack(codes, 4)
    for wrong in (
        lambda: prepare(words, scale, None, 9, 32, 64),
        lambda: prepare(words, scale, None, 4, 24, 64),
        lambda: prepare(words, scale, None, 4, 32, 96),
        lambda: prepare(words, scale[:, :1], None, 4, 32, 64),
        lambda: prepare(words, scale.double(), None, 4, 32, 64),
        lambda: prepare(words, scale, torch.zeros(37, 1), 4, 32, 64),
    ):
        with pytest.raises(RecipeError):
            wrong()
    if native.absent():
        pytest.skip(f"the compiled kernels' own checks are not tested: {native.absent()}")
    short = PackedWeight(weight.buffer[:-64], weight.layout)
    for call in (
        lambda: packed_linear(torch.randn(2, 32), weight),
        lambda: packed_linear(torch.randn(2, 64).double(), weight),
        lambda: packed_linear(torch.randn(2, 64), weight, torch.randn(36)),
        lambda: packed_linear(torch.randn(2, 64), weight, activations=4),
        lambda: packed_linear(torch.randn(2, 64), short),
        lambda: packed_linear(torch.randn(2, 64), PackedWeight(allocate(weight.nbytes + 1)[1:], weight.layout)),
    ):
        with pytest.raises(RecipeError, match="packed_linear|bias"):
            call()


@pytest.mark.parametrize(
    ("field", "value"),
    [("version", 2), ("bits", 5), ("symmetric", 2), ("zero_point", 16), ("zero_point", -1), ("scale_dtype", 3), ("reserved", 1),
     ("out_features", 0), ("out_features", 2**40), ("in_features", -64), ("group_size", 0), ("group_size", 48)],
)  # fmt: skip
def test_a_bad_layout_is_refused_before_a_pointer_is_touched(field, value):
    """Every pointer is nonsense: reading one would end the process."""
    library = native.library()
    if library is None:
        pytest.skip(f"not tested: {native.absent()}")
    _, _, _, weight = problem(4, 32, 64)
    bad = native.Weight.from_buffer_copy(_weight(weight.layout).contents)
    setattr(bad, field, value)
    assert library.ck_weight_bytes(ctypes.byref(bad)) < 0
    assert library.ck_linear_workspace(ctypes.byref(bad), 1, 8) < 0
    assert library.ck_weight_pack(ctypes.byref(bad), 64, 8, 4, 64, 64, 64, weight.nbytes, 1) < 0
    assert library.ck_linear(ctypes.byref(bad), 64, weight.nbytes, 64, 0, 1, 64, None, 0, 64, 37, 8, 64, 1 << 20, 1) < 0


def test_bad_arguments_are_refused_before_a_pointer_is_touched():
    library = native.library()
    if library is None:
        pytest.skip(f"not tested: {native.absent()}")
    _, _, _, weight = problem(4, 32, 64)
    w = _weight(weight.layout)
    good = [w, 64, weight.nbytes, 64, 0, 2, 64, None, 0, 64, 37, 8, 64, 1 << 20, 1]
    for place, value in ((1, 0), (1, 32), (2, 1), (3, 0), (4, 7), (5, -1), (6, 63), (9, 0), (10, 36), (11, 7), (12, 0),
                         (12, 32), (13, 8), (14, 0)):  # fmt: skip
        bad = list(good)
        bad[place] = value
        status = library.ck_linear(*bad)
        assert status < 0, (place, value)
        assert b"unknown" not in library.ck_status_text(status) or place == 11


def test_threads_are_those_of_torch():
    """One OpenMP runtime is mapped, and a region gets as many threads as it asks for."""
    library = native.library()
    if library is None:
        pytest.skip(f"not tested: {native.absent()}")
    with open("/proc/self/maps") as maps:
        runtimes = {line.split()[-1] for line in maps if "libgomp" in line or "libiomp" in line or "libomp." in line}
    assert len(runtimes) <= 1
    assert library.ck_threads_used(1) == 1
    assert library.ck_threads_used(2) in ((2,) if runtimes else (1,))


def test_buffers_are_aligned_and_their_memory_is_theirs():
    first, second, large = allocate(100), allocate(5000), allocate(20 << 20)
    for buffer, n in ((first, 100), (second, 5000), (large, 20 << 20)):
        assert buffer.numel() == n and buffer.data_ptr() % 64 == 0
    assert first.data_ptr() + 100 <= second.data_ptr() or second.data_ptr() + 5000 <= first.data_ptr()
    if huge_pages_possible():
        assert large.data_ptr() % HUGE_PAGE == 0
    view = large[1000:2000].fill_(7)
    del large
    assert (view == 7).all()
