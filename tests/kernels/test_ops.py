import pytest
import torch
from torch.nn import functional

from compress.kernels.ops import hadamard_transform, quantized_linear
from compress.linalg.hadamard import hadamard
from compress.modules.quantized import QuantizedLinear
from compress.modules.quantized_spec import QuantizedSpec


def arguments(bits=4, group_size=8, symmetric=True, bias=True, dtype=torch.float32, out=24, n=40):
    generator = torch.Generator().manual_seed(0)
    spec = QuantizedSpec(n, out, bits, group_size, symmetric)
    codes = torch.randint(0, 2**bits, (out, n), generator=generator)
    scale = torch.rand(out, spec.n_groups, generator=generator).to(dtype)
    zero = None if symmetric else torch.randint(0, 2**bits, scale.shape, generator=generator)
    b = torch.randn(out, generator=generator).to(dtype) if bias else None
    m = QuantizedLinear.from_codes(codes, scale, zero, spec, b)
    return m, (m.weight_packed, m.weight_scale, m.weight_zero_point, m.bias, bits, group_size, n)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_a_linear_with_the_dense_weight(bits, symmetric, dtype, monkeypatch):
    monkeypatch.setattr("compress.kernels.ops.TILE", 40 * 7)  # several tiles, the last one smaller
    module, rest = arguments(bits, symmetric=symmetric, dtype=dtype)
    x = torch.randn(2, 3, 40).to(dtype)
    expected = functional.linear(x.double(), module.dense().double(), module.bias.double())
    tolerance = 40 * torch.finfo(dtype).eps * 2**bits  # 40 products, each of at most about 2^bits
    torch.testing.assert_close(quantized_linear(x, *rest).double(), expected, rtol=0, atol=tolerance)


def test_shapes_and_strides():
    module, rest = arguments(bias=False)
    assert quantized_linear(torch.randn(0, 5, 40), *rest).shape == (0, 5, 24)
    assert quantized_linear(torch.randn(40), *rest).shape == (24,)
    x = torch.randn(40, 6).T
    torch.testing.assert_close(quantized_linear(x, *rest), x @ module.dense().T)


def test_activations_of_another_dtype_than_the_scale():
    module, rest = arguments(dtype=torch.bfloat16)
    x = torch.randn(3, 40)
    torch.testing.assert_close(
        quantized_linear(x, *rest), functional.linear(x, module.dense().float(), module.bias.float())
    )


@pytest.mark.parametrize("symmetric", [True, False])
def test_opcheck(symmetric):
    _, rest = arguments(symmetric=symmetric)
    torch.library.opcheck(torch.ops.compress.quantized_linear.default, (torch.randn(2, 3, 40), *rest))
    x = torch.randn(3, 40, requires_grad=True)
    torch.library.opcheck(torch.ops.compress.quantized_linear.default, (x, *rest))


def test_gradients_of_input_and_bias(monkeypatch):
    monkeypatch.setattr("compress.kernels.ops.TILE", 40 * 7)
    module, _ = arguments()
    module.double().bias.requires_grad_(True)
    x = torch.randn(2, 3, 40, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(functional.linear(x, module.dense(), module.bias).square().sum(), (x, module.bias))
    torch.testing.assert_close(torch.autograd.grad(module(x).square().sum(), (x, module.bias)), expected)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("n", "block_size"), [(28, 28), (56, 4), (64, 64)])
def test_hadamard_transform(n, block_size, transposed):
    x = torch.randn(2, 3, n, dtype=torch.float64, requires_grad=True)
    dense = torch.block_diag(*[hadamard(block_size)] * (n // block_size))
    expected = x @ (dense.T if transposed else dense)
    out = hadamard_transform(x, block_size, transposed)
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(x)
    torch.testing.assert_close(torch.autograd.grad(out, x, weight), torch.autograd.grad(expected, x, weight))
    op = torch.ops.compress.hadamard_transform.default
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(op, (torch.randn(2, 3, n).to(dtype), block_size, transposed))
        torch.library.opcheck(op, (torch.randn(n, 3, dtype=dtype).T.requires_grad_(), block_size, transposed))
    assert op(torch.empty(0, n), block_size, transposed).shape == (0, n)
