"""The product with sign planes beside the dense one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from compress.kernels import ops, sign_planes
from compress.kernels.sign_planes import rebuilt, sign_planes_linear
from compress.linalg.signs import pack_signs, unpack_signs

Planes = tuple[list[Tensor], list[Tensor], list[Tensor], Tensor | None, Tensor | None, int]


def planes(n_out: int, n_in: int, rank: int, blocks: int, scaled: bool = False, bias: bool = False) -> Planes:
    g = torch.Generator().manual_seed(n_out * 1000 + n_in)
    signs = [pack_signs(torch.rand(n_out, n_in, generator=g) < 0.5) for _ in range(blocks)]
    left, right = ([(torch.randn(n, rank, generator=g) * 0.5**b).half() for b in range(blocks)] for n in (n_out, n_in))
    scale = (torch.rand(n_in, generator=g) + 0.5).half() if scaled else None
    return signs, left, right, scale, torch.randn(n_out, generator=g) if bias else None, n_in


def dense(p: Planes) -> Tensor:
    signs, left, right, scale, _, n_in = p
    terms = [
        unpack_signs(s, n_in, torch.float64) * (u.double() @ v.double().T)
        for s, u, v in zip(signs, left, right, strict=True)
    ]
    weight = torch.stack(terms).sum(0)
    return weight if scale is None else weight * scale.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("n_out", "n_in", "rank", "blocks", "scaled", "bias"),
    [
        (1, 1, 1, 1, False, False),
        (24, 40, 4, 3, True, True),
        (17, 13, 5, 2, True, False),
        (33, 100, 16, 1, False, True),
    ],
)
def test_the_product_is_that_of_the_dense_weight(n_out, n_in, rank, blocks, scaled, bias, dtype):
    p = planes(n_out, n_in, rank, blocks, scaled, bias)
    x = torch.randn(2, 3, n_in, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = sign_planes_linear(x, *p)
    assert found.shape == (2, 3, n_out) and found.dtype == dtype
    expected = functional.linear(x.double(), dense(p), None if p[4] is None else p[4].double())
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def test_identity_inputs_give_the_weight_itself():
    p = planes(20, 30, 3, 2, scaled=True)
    torch.testing.assert_close(sign_planes_linear(torch.eye(30), *p).T.double(), dense(p), rtol=1e-5, atol=1e-6)


def test_tiles_change_nothing(monkeypatch):
    p = planes(50, 64, 4, 2, scaled=True, bias=True)
    whole = torch.cat([tile for _, tile in rebuilt(*p[:4], p[5])])
    monkeypatch.setattr(ops, "TILE", 64 * 7)
    tiles = list(rebuilt(*p[:4], p[5]))
    assert len(tiles) == 8
    torch.testing.assert_close(torch.cat([tile for _, tile in tiles]), whole, rtol=1e-6, atol=1e-6)


def test_strides_and_empty_inputs():
    p = planes(12, 20, 2, 2)
    x = torch.randn(20, 6).T
    torch.testing.assert_close(sign_planes_linear(x, *p), sign_planes_linear(x.contiguous(), *p))
    assert sign_planes_linear(torch.empty(0, 20), *p).shape == (0, 12)


def test_gradients_are_those_of_the_dense_product():
    p = planes(12, 20, 2, 2, scaled=True, bias=True)
    assert p[4] is not None
    bias = p[4].clone().requires_grad_()
    x = torch.randn(3, 20, requires_grad=True)
    sign_planes_linear(x, *p[:4], bias, 20).square().sum().backward()
    other, its_bias = x.detach().clone().requires_grad_(), bias.detach().clone().requires_grad_()
    functional.linear(other, dense(p).float(), its_bias).square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bias.grad, its_bias.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grad", [False, True])
def test_the_operation_is_one_that_torch_can_trace(grad):
    p = planes(12, 20, 2, 2, scaled=True, bias=True)
    torch.library.opcheck(torch.ops.compress.sign_planes_linear.default, (torch.randn(3, 20, requires_grad=grad), *p))
    assert sign_planes.LIBRARY is ops.LIBRARY
