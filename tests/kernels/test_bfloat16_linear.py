"""Products of bfloat16 activations with packed weights, on every instruction set, against the reference in float32."""

from __future__ import annotations

import pytest
import torch

from compress.kernels import native
from compress.kernels.packed import PackedWeight, packed_linear, prepare
from compress.kernels.packing import pack

ABSENT = native.absent()
pytestmark = pytest.mark.skipif(ABSENT is not None, reason=f"no compiled kernels: {ABSENT}")
ISAS = native.isas() or [""]


def weight(bits: int, group_size: int, symmetric: bool, out: int, in_features: int) -> PackedWeight:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.arange(out * in_features).view(out, in_features) * 7 % 2**bits  # every code at every place
    n_groups = in_features // group_size if group_size > 0 else 1
    scale = (torch.rand(out, n_groups, generator=generator) + 0.5).half()
    zeros = None if symmetric else torch.randint(0, 2**bits, (out, n_groups), generator=generator)
    return prepare(pack(codes, bits), scale, zeros, bits, group_size, in_features)


def differs(found: torch.Tensor, x: torch.Tensor, w: PackedWeight) -> float:
    """Largest difference from the exact product, in units of what rounding it to bfloat16, and a float32 sum, explain."""
    dense = w.dense(torch.float64)
    exact = x.double() @ dense.T
    terms = (
        x.double().abs() @ (dense.abs() + dense.abs().amax(1, keepdim=True)).T
    )  # codes enter before their zero point
    bound = (
        exact.abs() * torch.finfo(torch.bfloat16).eps + 2 * terms * torch.finfo(torch.float32).eps * x.shape[1] ** 0.5
    )
    return float(((found.double() - exact).abs() / bound.clamp_min(1e-30)).max())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("group_size", "out", "in_features"), [(32, 50, 96), (20, 17, 60), (-1, 16, 300), (-1, 16, 139), (128, 33, 256)]
)
def test_equals_the_product_with_the_dense_weight(bits, symmetric, group_size, out, in_features, isa):
    w = weight(bits, group_size, symmetric, out, in_features)
    for tokens in (1, 2, 3, 4, 5, 12, 13, 31, 33, 97, 385):  # codes are unpacked once from 33 on, in two slabs at 385
        x = torch.randn(tokens, in_features, generator=torch.Generator().manual_seed(tokens)).bfloat16()
        with native.using_isa(isa):
            found = packed_linear(x, w, activations=16)
            assert torch.equal(found, packed_linear(x, w, activations=16))
        assert differs(found, x, w) <= 1, tokens


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_one_input_at_a_time_gives_the_weight_itself(bits):
    w = weight(bits, 32, True, 20, 128)
    expected = w.dense(torch.float32).bfloat16()
    torch.testing.assert_close(packed_linear(torch.eye(128).bfloat16(), w, activations=16).T, expected, rtol=0, atol=0)


@pytest.mark.parametrize("isa", ISAS)
def test_rows_of_another_tensor(isa):
    """Strided input whose rows start at odd places, and the same numbers side by side."""
    w, wide = weight(4, 20, False, 40, 60), torch.randn(400, 171).bfloat16()
    with native.using_isa(isa):
        for tokens in (3, 50, 400):
            x = wide[:tokens, 7:67]
            assert torch.equal(packed_linear(x, w, activations=16), packed_linear(x.contiguous(), w, activations=16))


def test_threads_change_nothing():
    w, x = weight(4, 64, False, 200, 256), torch.randn(400, 256).bfloat16()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = packed_linear(x, w, activations=16)
        torch.set_num_threads(2)
        assert torch.equal(packed_linear(x, w, activations=16), one)
    finally:
        torch.set_num_threads(before)
