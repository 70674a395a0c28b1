"""What stands between the products of a token, on every instruction set, against the same formulas in torch."""

from __future__ import annotations

import pytest
import torch

from compress.errors import RecipeError
from compress.kernels import native, token
from compress.kernels.packed import Product, packed_linear, prepare
from compress.kernels.packing import pack

ABSENT = native.absent()
pytestmark = pytest.mark.skipif(ABSENT is not None, reason=f"no compiled kernels: {ABSENT}")
ISAS = native.isas() or [""]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def ulps(dtype: torch.dtype, n: float) -> dict[str, float]:
    return {"rtol": n * torch.finfo(dtype).eps, "atol": 1e-7}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 15, 16, 100, 2048])
def test_norm_and_gate(n, dtype, isa):
    generator = torch.Generator().manual_seed(n)
    x, weight = (torch.randn(n, generator=generator).to(dtype) for _ in range(2))
    gate_up = (torch.randn(2 * n, generator=generator) * 6).to(dtype)
    with native.using_isa(isa):
        normed = token.norm(x, weight, 1e-6, torch.empty_like(x))
        gated = token.gated(gate_up, torch.empty_like(x))
        in_place = token.norm(x.clone(), weight, 1e-6, x.clone())
    # another order of sums, another exponential: a value may round to its neighbour, and again after the next factor
    several = 4 if dtype == torch.float32 else 2
    torch.testing.assert_close(normed, token.references.norm(x, weight, 1e-6), **ulps(dtype, several))
    torch.testing.assert_close(gated, token.references.gated(gate_up), **ulps(dtype, several))
    assert torch.equal(in_place, normed)


@pytest.mark.parametrize("isa", ISAS)
def test_the_gate_over_all_magnitudes(isa):
    gate = torch.cat(
        [torch.linspace(-120, 120, 4001), torch.tensor([0.0, -0.0, float("inf"), float("nan"), 3e38, -3e38])]
    )
    with native.using_isa(isa):
        found = token.gated(torch.cat([gate, torch.ones_like(gate)]), torch.empty_like(gate))
    wanted = torch.nn.functional.silu(gate.double()).float()
    torch.testing.assert_close(found, wanted, rtol=4e-7, atol=1e-35, equal_nan=True)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "key_heads", "head"), [(1, 1, 2), (4, 2, 8), (6, 3, 80)])
def test_turning(heads, key_heads, head, dtype, isa):
    """Bit for bit: products and sums are rounded one by one, as torch rounds them."""
    generator = torch.Generator().manual_seed(head)
    qkv = torch.randn(heads + 2 * key_heads, head, generator=generator).to(dtype)
    cos, sin = (torch.randn(head, generator=generator).to(dtype) for _ in range(2))
    keys, values = (torch.full((1, key_heads, 5, head), 7.0, dtype=dtype) for _ in range(2))
    wanted = token.references.turned(qkv, cos, sin)
    plain = qkv.clone()
    with native.using_isa(isa):
        token.turn(qkv, cos, sin, keys, values, 3)
    assert torch.equal(qkv[:heads], wanted[:heads])
    assert torch.equal(keys[0, :, 3], wanted[heads : heads + key_heads])
    assert torch.equal(values[0, :, 3], plain[heads + key_heads :])
    others = [0, 1, 2, 4]
    assert (keys[:, :, others] == 7).all() and (values[:, :, others] == 7).all()


def test_a_product_from_buffer_to_buffer_is_packed_linear():
    codes = torch.randint(0, 16, (40, 64), generator=torch.Generator().manual_seed(0))
    weight = prepare(pack(codes, 4), torch.rand(40, 2), None, 4, 32, 64)
    x, out, bias = torch.randn(64).bfloat16(), torch.empty(40).bfloat16(), torch.randn(40)
    for activations in (8, 16):
        product = Product(weight, bias, activations, x, out)
        for _ in range(2):
            x.copy_(torch.randn(64))
            assert torch.equal(product(), packed_linear(x[None], weight, bias, activations)[0])
    with pytest.raises(RecipeError, match="do not fit"):
        Product(weight, None, 8, x, torch.empty(39).bfloat16())
    with pytest.raises(RecipeError, match="do not fit"):
        Product(weight, None, 8, x, torch.empty(40))


def test_what_cannot_be_is_refused():
    x = torch.randn(8)
    with pytest.raises(RecipeError):
        token.norm(x[:0], x, 1e-6, x)
    with pytest.raises(RecipeError):  # heads of an odd number of values have no halves
        token.turn(torch.randn(3, 3), x, x, torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 2, 3), 0)
    with pytest.raises(RecipeError):  # queries are missing
        token.turn(torch.randn(4, 2), x, x, torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2), 0)
