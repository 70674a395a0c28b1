"""Packed models: equal results, equal state, one product where linears share an input, and safe whatever is done to them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import StaticCache

from compress.errors import RecipeError
from compress.kernels import native, packed
from compress.kernels.choice import Choice, choosing, chosen
from compress.models.experts import unfuse_experts
from compress.models.families import architecture_of, module_name
from compress.modules.quantized import QuantizedLinear
from compress.modules.quantized_spec import QuantizedSpec
from compress.runtime.prepare import arithmetic, pack_model, packed_bytes, packed_linears, products_of
from tests.tiny_models import TINY, tiny_model

pytestmark = pytest.mark.skipif(native.absent() is not None, reason=f"needs the compiled kernels: {native.absent()}")
FLOAT = Choice(activations="float")
EXACT = {"rtol": 0, "atol": 1e-4}  # float32 sums in another order; logits are about 1


def rounded(linear: nn.Module, bits: int = 4, group_size: int = 32, symmetric: bool = True) -> QuantizedLinear:
    """Rounded to nearest. A Conv1D's weight is transposed."""
    weight = linear.weight.detach().T if type(linear).__name__ == "Conv1D" else linear.weight.detach()
    groups = weight.unflatten(1, (-1, group_size))
    low, high = groups.amin(-1), groups.amax(-1)
    if symmetric:
        low, high = -torch.maximum(-low, high), torch.maximum(-low, high)
    scale = (high - low).clamp_min(1e-6) / (2**bits - 1)
    zero = torch.full_like(low, 2 ** (bits - 1)) if symmetric else (-low / scale).round().clamp(0, 2**bits - 1)
    codes = (groups / scale[..., None] + zero[..., None]).round().clamp(0, 2**bits - 1).flatten(1)
    spec = QuantizedSpec(weight.shape[1], weight.shape[0], bits, group_size, symmetric)
    return QuantizedLinear.from_codes(codes, scale, None if symmetric else zero.int(), spec, linear.bias)


def quantized_model(family: str, **grid):
    """A tiny model with all linears of its blocks rounded, and its architecture."""
    model = tiny_model(family)
    architecture = architecture_of(model.config.to_dict())
    if architecture.experts is not None:
        unfuse_experts(model, architecture)
    for sites in architecture.block_sites:
        for site in sites:
            for name in site.linears:
                inner = module_name(architecture, name)
                model.set_submodule(inner, rounded(model.get_submodule(inner), **grid))
    return model, architecture


def prompt(n: int = 7) -> torch.Tensor:
    return torch.randint(0, 256, (2, n), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def packing(monkeypatch):
    monkeypatch.delenv("COMPRESS_PACK", raising=False)


@pytest.fixture
def counted(monkeypatch):
    """How many products a native kernel has made."""
    calls = []
    real = packed.packed_linear
    monkeypatch.setattr("compress.modules.packed.packed_linear", lambda *a: calls.append(a[1]) or real(*a))
    return calls


@pytest.mark.parametrize("family", list(TINY))
def test_one_product_for_linears_that_share_an_input(family, counted):
    model, architecture = quantized_model(family)
    with torch.inference_mode():
        expected = model(prompt(), use_cache=False).logits
        names = set(model.state_dict())
        n_products = pack_model(model, FLOAT, architecture)
        torch.testing.assert_close(model(prompt(), use_cache=False).logits, expected, **EXACT)
    sites = [site for sites in architecture.block_sites for site in sites]
    assert n_products == len(sites)
    assert set(model.state_dict()) == names
    if architecture.experts is None:
        assert len(counted) == len(sites), "a product was made more than once"
    else:
        assert len(set(map(id, counted))) == len(counted) <= len(sites)
    assert all(linear.packed._kept is None for linear in packed_linears(model))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_loses_nothing(bits, symmetric, dtype):
    generator = torch.Generator().manual_seed(bits)
    members = []
    for out in (24, 7):
        spec = QuantizedSpec(96, out, bits, 32, symmetric)
        zero = None if symmetric else torch.randint(0, 2**bits, (out, 3), generator=generator)
        scale = torch.rand(out, 3, generator=generator).to(dtype)
        members.append(
            QuantizedLinear.from_codes(torch.randint(0, 2**bits, (out, 96), generator=generator), scale, zero, spec)
        )
    before = [copy.deepcopy(member.state_dict()) for member in members]
    sizes = [member.nbytes for member in members]
    dense = [member.dense() for member in members]
    site = nn.ModuleList(members)
    pack_model(site, FLOAT)
    assert [name for name, _ in site.named_parameters()] == ["0.weight_shape", "1.weight_shape"]
    for member, state, size, weight in zip(members, before, sizes, dense, strict=True):
        after = member.state_dict()
        assert list(after) == list(state)
        assert all(torch.equal(after[name], state[name]) and after[name].dtype == state[name].dtype for name in state)
        assert member.nbytes == size
        assert torch.equal(member.dense(), weight)
        assert torch.equal(member.codes(), QuantizedLinear(member.spec, dict(state)).codes())
        member.unpack()
        assert torch.equal(member.weight_packed, state["weight_packed"])
        assert member.packed is None


def pair(dtype=torch.float32, bias=True, **grid):
    """Two linears of one input, packed as one, and what they compute."""
    torch.manual_seed(0)
    linears = [nn.Linear(64, out, bias=bias).to(dtype) for out in (24, 40)]
    site = nn.ModuleDict({"a": rounded(linears[0], **grid), "b": rounded(linears[1], **grid)})
    plain = copy.deepcopy(site)
    packed = pack_together(site)
    return packed, plain


def pack_together(site):
    from compress.modules.packed import pack_rows

    members = list(site.values())
    shared = pack_rows(members, "float")
    for place, member in enumerate(members):
        member.move_into(shared, place)
    return site


def check(site, plain, x, **tolerance):
    for name in site:
        torch.testing.assert_close(site[name](x), plain[name](x), **(tolerance or EXACT))


@torch.no_grad()
def test_one_alone_twice_in_any_order_and_with_other_tensors(counted):
    site, plain = pair()
    x, y = torch.randn(2, 3, 64), torch.randn(1, 64)
    for name, tensor in [("b", x), ("b", x), ("a", x), ("a", y), ("b", x), ("b", y), ("a", y.clone()), ("b", x[0])]:
        torch.testing.assert_close(site[name](tensor), plain[name](tensor), **EXACT)
    counted.clear()
    check(site, plain, x)
    assert len(counted) == 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_tensor_that_changes_in_between_is_seen(mode):
    site, plain = pair()
    with torch.no_grad():
        x = torch.randn(3, 64)
        site["a"](x)
        x.mul_(2)
        torch.testing.assert_close(site["b"](x), plain["b"](x), **EXACT)

    def halve(module, inputs):  # a hook on one of them changes what it reads, in place
        inputs[0].mul_(0.5)

    with mode():
        for place in ("a", "b"):
            handle = site[place].register_forward_pre_hook(halve)
            x = torch.randn(3, 64)
            seen = x.clone()
            for name in ("a", "b"):
                seen = seen * 0.5 if name == place else seen
                torch.testing.assert_close(site[name](x), plain[name](seen), **EXACT)
            handle.remove()


def test_gradients_and_doubles_go_through_the_reference():
    site, plain = pair()
    x = torch.randn(3, 64, requires_grad=True)
    grads = [torch.autograd.grad(s["a"](x).square().sum() + s["b"](x).sum(), x)[0] for s in (site, plain)]
    assert torch.equal(*grads)
    x = torch.randn(3, 64, dtype=torch.float64)
    check(site, plain, x, rtol=0, atol=0)


@torch.no_grad()
def test_moved_cast_copied_pickled_and_filled():
    site, plain = pair()
    x = torch.randn(3, 64)
    buffer = site["a"].packed
    site.to("cpu").to(torch.float32).float().eval()
    assert site["a"].packed is buffer, "nothing moved, nothing to pack again"
    for changed in (copy.deepcopy(site), pickle.loads(pickle.dumps(site))):
        assert changed["a"].packed is not None
        assert changed["a"].packed is not buffer
        check(changed, plain, x)
    half = copy.deepcopy(site).to(torch.bfloat16)
    expected = copy.deepcopy(plain).to(torch.bfloat16)
    assert half["a"].packed is not None
    assert half["a"].weight_scale.dtype == torch.bfloat16
    assert all(
        torch.equal(a, b) for a, b in zip(half.state_dict().values(), expected.state_dict().values(), strict=True)
    )
    check(half, expected, x.bfloat16(), rtol=0.02, atol=0.02)
    check(half, expected, x, rtol=0, atol=1e-2)  # activations of another dtype than the scales
    assert copy.deepcopy(site).to("meta")["a"].packed is None
    torch.manual_seed(5)
    state = nn.ModuleDict({n: rounded(nn.Linear(64, m.out_features)) for n, m in plain.items()}).state_dict()
    site.load_state_dict(state)
    plain.load_state_dict(state)
    assert site["a"].packed is not None
    check(site, plain, x)
    site["a"].hold(torch.float32)
    check(site, plain, x)
    site["a"].release()


def test_what_differs_is_not_fused():
    model, architecture = quantized_model("llama_gqa_tied")
    block = model.model.layers[0]
    block.self_attn.k_proj = rounded(nn.Linear(64, 32), bits=8)
    block.self_attn.v_proj = rounded(nn.Linear(64, 32), symmetric=False)
    block.mlp.up_proj = rounded(nn.Linear(64, 128, bias=False)).to(torch.bfloat16)
    assert [len(product) for product in products_of(model, architecture)] == [
        1,
        1,
        1,
        1,
        1,
        1,
        1,
        3,
        1,
        2,
        1,
        3,
        1,
        2,
        1,
    ]
    assert all(len(product) == 1 for product in products_of(model, None))
    x = prompt()
    with torch.no_grad():
        expected = model(x, use_cache=False).logits
        pack_model(model, FLOAT, architecture)
        torch.testing.assert_close(model(x, use_cache=False).logits, expected, rtol=0, atol=0.05)  # up_proj is bfloat16
    assert packed_bytes(model) == sum({id(m.packed): m.packed.weight.nbytes for m in packed_linears(model)}.values())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_without_a_break(backend, counted):
    model, architecture = quantized_model("llama")
    model.config.num_hidden_layers = 1
    model.model.layers = model.model.layers[:1]
    with torch.no_grad():
        expected = model(prompt(), use_cache=False).logits
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        assert torch.equal(compiled(prompt(), use_cache=False).logits, expected)
        pack_model(model, FLOAT, architecture)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        for _ in range(2):
            torch.testing.assert_close(compiled(prompt(), use_cache=False).logits, expected, **EXACT)
        cache = StaticCache(config=model.config, max_cache_len=12)
        first = compiled(prompt(), past_key_values=cache).logits
        torch.testing.assert_close(first, expected, **EXACT)
        token = prompt(8)[:, -1:]
        step = compiled(token, past_key_values=cache).logits
        whole = torch.cat([prompt(), token], dim=1)
        torch.testing.assert_close(step, model(whole, use_cache=False).logits[:, -1:], **EXACT)
    torch._dynamo.reset()


def test_the_choice(monkeypatch):
    model, architecture = quantized_model("llama")
    assert pack_model(model, Choice(kernels="reference"), architecture) == 0
    with monkeypatch.context() as patch:
        patch.setenv("COMPRESS_PACK", "off")
        assert pack_model(model, FLOAT, architecture) == 0
    assert arithmetic(model) == {"kernels": "reference", "activations": "float", "products": 0, "linears": 0}
    assert chosen() == Choice()
    with choosing(Choice("reference", "float")):
        assert chosen() == Choice("reference", "float")
    assert pack_model(model, Choice(), architecture) == 12
    assert arithmetic(model) == {
        "kernels": native.current_isa(), "activations": "int8", "products": 12, "linears": 21
    }  # fmt: skip
    with pytest.raises(RecipeError, match="kernels='fast': choose auto or reference"):
        Choice("fast")
    with pytest.raises(RecipeError, match="activations='int4': choose int8 or float"):
        Choice("auto", "int4")


@torch.no_grad()
def test_rounded_activations_stay_close():
    """int8: about half a percent of each product (docs/kernels.md); through three blocks, of the logits' own spread."""
    model, architecture = quantized_model("llama", bits=8)
    expected = model(prompt(), use_cache=False).logits
    pack_model(model, Choice(), architecture)
    error = model(prompt(), use_cache=False).logits - expected
    assert 0 < error.norm() < 0.03 * expected.norm()
