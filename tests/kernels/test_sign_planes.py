"""The product with sign planes beside the dense one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from compress.errors import RecipeError
from compress.kernels import native, ops, sign_planes
from compress.kernels.sign_planes import TABLE_TOKENS, rebuilt, sign_planes_linear
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


compiled = pytest.mark.skipif(native.absent() is not None, reason=f"no compiled kernels: {native.absent()}")
SHAPES = [  # out, in, rank, blocks, scaled, bias: odd ones, tails of tiles, ranks of less and more than a vector
    (1, 1, 1, 1, False, False), (24, 40, 4, 3, True, True), (33, 100, 16, 2, True, False), (65, 129, 17, 2, False, True),
    (97, 516, 20, 1, True, True), (64, 128, 33, 4, False, True),
]  # fmt: skip


def isas() -> list[str]:
    return native.isas() if native.absent() is None else []


@compiled
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compiled_kernels_equal_the_reference(isa, dtype):
    tolerance = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}[dtype]  # of the output as a whole
    with native.using_isa(isa):
        for shape in SHAPES:
            p = planes(*shape)
            for n_tokens in (1, TABLE_TOKENS, TABLE_TOKENS + 1, 40):
                x = torch.randn(n_tokens, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
                found = sign_planes_linear(x, *p)
                expected = functional.linear(x.double(), dense(p), None if p[4] is None else p[4].double())
                assert found.dtype == dtype and found.shape == expected.shape
                error = (found.double() - expected).norm() / expected.norm()
                assert error < tolerance, (shape, n_tokens, float(error))


@compiled
@pytest.mark.parametrize("isa", isas())
def test_tables_of_words_are_as_exact_as_stated(isa):
    p = planes(256, 1024, 16, 2)
    x = torch.randn(4, 1024, generator=torch.Generator().manual_seed(1)).half()
    expected = x.double() @ dense(p).T
    with native.using_isa(isa):
        found = sign_planes_linear(x, *p).double()
    rounded = (expected.half().double() - expected).norm() / expected.norm()
    assert (found - expected).norm() / expected.norm() < (rounded**2 + 5e-4**2) ** 0.5


@compiled
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("n_tokens", [1, TABLE_TOKENS + 1])
def test_compiled_kernels_see_every_sign_and_rank_where_it_is(isa, n_tokens):
    n_out, n_in = 70, 140
    signs = [pack_signs(torch.arange(n_out * n_in).view(n_out, n_in) * 7 % 5 < 2)]
    left, right = torch.zeros(n_out, 3).half(), torch.zeros(n_in, 3).half()
    left[:, 1], right[:, 1] = 1, 2
    expected = (unpack_signs(signs[0], n_in) * 2).T
    with native.using_isa(isa):
        for first in range(0, n_in, n_tokens):
            x = torch.eye(n_in)[first : first + n_tokens]
            assert torch.equal(
                sign_planes_linear(x, signs, [left], [right], None, None, n_in), expected[first : first + n_tokens]
            )


@compiled
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_tokens_together_and_strides_change_no_bit(isa, dtype):
    p = planes(130, 200, 16, 2, scaled=True, bias=True)
    x = torch.randn(200, TABLE_TOKENS, generator=torch.Generator().manual_seed(1)).to(dtype).T
    before = torch.get_num_threads()
    with native.using_isa(isa):
        alone = torch.cat([sign_planes_linear(row[None], *p) for row in x])
        try:
            torch.set_num_threads(3)
            assert torch.equal(sign_planes_linear(x, *p), alone)
            assert torch.equal(sign_planes_linear(x.reshape(2, -1, 200), *p).flatten(0, 1), alone)
        finally:
            torch.set_num_threads(before)
        assert torch.equal(sign_planes_linear(torch.cat([x, x], 1)[:, :200], *p), alone)


@compiled
@pytest.mark.parametrize("n_tokens", [1, TABLE_TOKENS + 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(n_tokens, value):
    p = planes(40, 64, 16, 1)
    x = torch.randn(n_tokens, 64).bfloat16()
    x[0, 5] = value
    found = sign_planes_linear(x, *p)
    assert not found[0].isfinite().any() and found[1:].isfinite().all()


@compiled
def test_silence_is_silence():
    p = planes(40, 64, 16, 2)
    assert not sign_planes_linear(torch.zeros(1, 64).bfloat16(), *p).any()


@compiled
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, u, v: ([s[0][:, :-1]], u, v), "is not of 12 x 20"),
        (lambda s, u, v: (s, [u[0].float()], v), "not uint8 and float16"),
        (lambda s, u, v: (s, u, [v[0][:-1]]), "is not of 12 x 20"),
        (lambda s, u, v: (s, u, []), "in 1 blocks"),
    ],
)
def test_tensors_that_do_not_belong_together_are_refused(change, message):
    signs, left, right, *_ = planes(12, 20, 2, 1)
    with pytest.raises(RecipeError, match=message):
        sign_planes_linear(torch.randn(1, 20), *change(signs, left, right), None, None, 20)


@compiled
def test_rows_are_rebuilt_tile_by_tile(monkeypatch):
    p = planes(50, 64, 4, 2, scaled=True, bias=True)
    x = torch.randn(TABLE_TOKENS + 1, 64)
    whole = sign_planes_linear(x, *p)
    monkeypatch.setattr(ops, "TILE", 64 * 7)
    torch.testing.assert_close(sign_planes_linear(x, *p), whole, rtol=1e-5, atol=1e-5)
