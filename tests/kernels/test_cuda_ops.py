"""How the CUDA kernels hang on the operations: shapes without a GPU, what is packed where, what is refused."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from compress.errors import RecipeError
from compress.kernels.cuda import ops as cuda_ops
from compress.kernels.ops import hadamard_transform
from compress.kernels.packed import PackedWeight, packed_linear, prepare
from compress.kernels.packed_layout import Layout
from compress.kernels.packing import dequantize, pack
from tests.kernels.emulated import emulation
from tests.kernels.test_cuda_layout import problem


def test_operations_are_opaque_to_tracing_on_a_gpu_that_is_not_there():
    """What torch.compile asks for: shape, dtype and device, with no data, no library and no GPU."""
    layout = Layout(4, 64, 70, 128, 8, 2)
    with FakeTensorMode():
        x = torch.empty(2, 3, 128, dtype=torch.float16, device="cuda")
        buffer = torch.empty(cuda_ops.cuda_layout(layout).n_bytes, dtype=torch.uint8, device="cuda")
        y = packed_linear(x, PackedWeight(buffer, layout))
        assert (y.shape, y.dtype, y.device.type) == ((2, 3, 70), torch.float16, "cuda")
        turned = hadamard_transform(x, 128)
        assert (turned.shape, turned.device.type) == (x.shape, "cuda")


@pytest.mark.parametrize("bits", [1, 3, 4, 6, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_implementation_for_gpus_equals_the_one_for_cpus(bits, symmetric, monkeypatch):
    """`linear_on_gpu` itself, with the emulated library in the place of a GPU's, and then with none."""
    codes, scale, zeros = problem(70, 128, bits, 64, symmetric, torch.bfloat16)
    on_cpu = prepare(pack(codes, bits), scale, zeros, bits, 64, 128)
    layout = on_cpu.layout
    buffer = cuda_ops.packed_on_gpu(codes, scale, zeros, layout)
    x, bias = torch.randn(5, 128).bfloat16(), torch.randn(70).bfloat16()
    sizes = (layout.bits, 64, 70, 128, layout.zero_point, layout.scale_dtype)
    wanted = x.double() @ dequantize(codes, scale.double(), zeros, bits).T + bias.double()
    if symmetric:
        wanted = (
            x.double() @ ((codes.double() - 2 ** (bits - 1)) * scale.double().repeat_interleave(64, 1)).T
            + bias.double()
        )
    for library in (emulation(), None):
        monkeypatch.setattr(cuda_ops.native, "library", lambda library=library: library)
        monkeypatch.setattr(cuda_ops, "unusable", lambda device: None)
        y = cuda_ops.linear_on_gpu(x, buffer, bias, *sizes, 8)
        assert (y.double() - wanted).norm() <= 2.0**-7 * wanted.norm()
    found = cuda_ops.read_on_gpu(buffer, layout)
    assert torch.equal(found[0], codes) and torch.equal(found[1], scale)
    with pytest.raises(RecipeError, match="the weight takes 128"):
        cuda_ops.linear_on_gpu(x[:, :64], buffer, bias, *sizes, 8)


def test_a_low_rank_part_follows_its_factors(monkeypatch):
    codes, scale, _ = problem(70, 128, 4, 64, True, torch.float16)
    layout = Layout(4, 64, 70, 128, 8, 2)
    buffer = cuda_ops.packed_on_gpu(codes, scale, None, layout)
    left, right, x = torch.randn(70, 12).half(), torch.randn(12, 128).half() * 0.1, torch.randn(5, 128).half()
    dense = (codes.double() - 8) * scale.double().repeat_interleave(64, 1)
    monkeypatch.setattr(cuda_ops, "unusable", lambda device: None)
    for library in (emulation(), None):
        monkeypatch.setattr(cuda_ops.native, "library", lambda library=library: library)
        for _ in range(2):
            left.mul_(0.5)  # in place: what was packed of it is made anew
            y = cuda_ops.low_rank_linear_on_gpu(x, buffer, left, right, None, 4, 64, 70, 128, 8, 2, 8)
            wanted = x.double() @ dense.T + (x @ right.T).double() @ left.double().T
            assert (y.double() - wanted).norm() <= 2.0**-9 * wanted.norm()
    monkeypatch.setattr(cuda_ops.native, "library", emulation)
    with pytest.raises(RecipeError, match="do not fit"):
        cuda_ops.low_rank_linear_on_gpu(x, buffer, left[:5], right, None, 4, 64, 70, 128, 8, 2, 8)


def test_weights_on_several_devices_are_refused():
    codes, scale, _ = problem(70, 128, 4, 64, True, torch.float16)
    with pytest.raises(RecipeError, match="on one GPU"):
        prepare(pack(codes, 4), scale.to("meta"), None, 4, 64, 128)


def test_a_transform_without_a_library_is_the_reference(monkeypatch):
    x = torch.randn(3, 96).half()
    for library in (emulation(), None):
        monkeypatch.setattr(cuda_ops.native, "library", lambda library=library: library)
        monkeypatch.setattr(cuda_ops, "unusable", lambda device: None)
        monkeypatch.setattr(cuda_ops, "_largest_block", lambda index: 4096)
        y = cuda_ops.transformed_on_gpu(x, 48, False)
        assert (y.double() - hadamard_transform(x.double(), 48)).norm() <= 2.0**-10 * x.double().norm()
        assert cuda_ops.transformed_on_gpu(x.double(), 48, True).dtype == torch.float64
