from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.checkpoint.reader import SAFETENSORS_DTYPES
from compress.checkpoint.stream import rebuild_module
from compress.errors import CheckpointError
from compress.kernels import native
from compress.kernels.choice import Choice
from compress.methods.base import Layer, SiteTask
from compress.methods.rtn import RTN, RTNConfig
from compress.modules.corrected import CorrectedLinear
from compress.modules.corrected_spec import CorrectedSpec
from compress.modules.quantized import QuantizedLinear
from compress.modules.quantized_spec import QuantizedSpec
from compress.modules.spec import spec_from_dict
from compress.runtime.prepare import arithmetic, pack_model
from tests.methods.layers import inputs

OUT, IN, RANK = 24, 64, 8
needs_kernels = pytest.mark.skipif(native.absent() is not None, reason=f"needs the compiled kernels: {native.absent()}")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(weight: Tensor, bits: int, group_size: int, dtype: torch.dtype = torch.float32) -> QuantizedLinear:
    task = Layer("layer", weight.float(), None, RTNConfig(bits=bits, group_size=group_size), dtype)
    return RTN.compress(SiteTask("site", (task,)), None, torch.Generator())["layer"].module


def module(dtype: torch.dtype = torch.float32, bias: bool = True, factor_bits: int = 16) -> CorrectedLinear:
    base = rounded(random(OUT, IN) / 8, 3, 16, dtype)
    left, right = (random(*shape, seed=1) * 0.1 for shape in ((OUT, RANK), (RANK, IN)))
    made = CorrectedLinear.from_parts(
        base, left.to(dtype), right.to(dtype), random(OUT, seed=2).to(dtype) if bias else None
    )
    for name in ("right", "left") if factor_bits < 16 else ():
        made = made.with_leaf(name, rounded(made.leaves()[name].weight, factor_bits, -1, dtype), None)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bias", "factor_bits"), [(True, 16), (False, 8)])
@pytest.mark.parametrize("held", [True, False])
def test_forward_is_that_of_the_merged_weight(dtype, bias, factor_bits, held):
    m = module(dtype, bias, factor_bits)
    if held:
        m.hold(dtype)
    x = random(2, 5, IN, seed=4).to(dtype)
    found = m(x)
    assert found.dtype == dtype and found.shape == (2, 5, OUT)
    merged = m.base.dense(torch.float32) + m.correction()
    assert torch.equal(m.dense(torch.float32), merged) and m.dense().dtype == dtype
    expected = functional.linear(x.float(), merged, None if m.bias is None else m.bias.float())
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("factor_bits", [16, 8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_tensors_are_those_of_the_spec_and_come_back(factor_bits, dtype):
    m = module(dtype, factor_bits=factor_bits)
    stored = m.stored()
    bias = stored.pop("bias")
    found = {name: (SAFETENSORS_DTYPES[t.dtype], tuple(t.shape)) for name, t in stored.items()}
    assert found == m.spec.tensors(SAFETENSORS_DTYPES[dtype])
    assert m.nbytes == m.spec.nbytes(SAFETENSORS_DTYPES[dtype])
    again = rebuild_module("m", m.spec, {**stored, "bias": bias}, dtype)
    assert all(torch.equal(t, stored[name]) for name, t in again.stored().items() if name != "bias")
    x = random(3, IN, seed=4).to(dtype)
    for other in (again, copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert torch.equal(other(x), m(x))


def test_bytes_are_those_of_the_codes_and_of_the_pair():
    base = QuantizedSpec(4096, 4096, 3, 128)
    pair = 32 * (4096 + 4096)
    spec = CorrectedSpec(4096, 4096, 32, base)
    assert spec.nbytes("BF16") == base.nbytes("BF16") + 2 * pair
    eight = CorrectedSpec(4096, 4096, 32, base, QuantizedSpec(4096, 32, 8, -1), QuantizedSpec(32, 4096, 8, -1))
    assert eight.nbytes("BF16") == base.nbytes("BF16") + pair + 2 * (4096 + 32) + 2 * 16  # scales, shapes


def test_leaves_meet_the_inputs_that_they_really_have():
    m = module()
    leaves = m.leaves()
    assert list(leaves) == list(m.spec.leaf_shapes()) == ["base", "right", "left"]
    assert leaves["base"].input_map is None and leaves["right"].input_map is None
    assert torch.equal(leaves["left"].input_map, m.right.weight)
    merged = leaves["base"].weight + leaves["left"].weight @ leaves["right"].weight
    torch.testing.assert_close(merged, m.dense(), rtol=1e-6, atol=1e-7)


def test_a_changed_base_refits_the_pair_and_a_changed_right_factor_the_left_one():
    m, x = module(), inputs(400, IN, seed=5)
    moment = x.T @ x
    base = rounded(m.base.dense(), 2, 32)
    changed = m.with_leaf("base", base, moment)
    assert changed.spec == m.spec.with_leaf("base", base.spec) and isinstance(changed.right, nn.Linear)
    kept = CorrectedLinear.from_parts(base, m.left.weight, m.right.weight, m.bias)
    errors = [float((other(x) - m(x)).square().mean()) for other in (changed, kept)]
    assert errors[0] < 0.9 * errors[1]
    right = rounded(m.right.weight, 2, -1)
    changed = m.with_leaf("right", right, moment)
    kept = CorrectedLinear(changed.spec, m.base, right, m.left, bias=m.bias)
    errors = [float((other(x) - m(x)).square().mean()) for other in (changed, kept)]
    assert errors[0] < 0.9 * errors[1]
    small = module(factor_bits=8).with_leaf("base", base, moment)  # compressed factors stay
    assert torch.equal(small.correction(), module(factor_bits=8).correction())


@needs_kernels
@pytest.mark.parametrize("factor_bits", [16, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_packed_it_is_one_operation(factor_bits, dtype, monkeypatch):
    import compress.modules.corrected as home

    monkeypatch.delenv("COMPRESS_PACK", raising=False)
    model = nn.Sequential(module(dtype, factor_bits=factor_bits))
    plain = copy.deepcopy(model)
    calls = []
    fused = home.packed_low_rank_linear
    monkeypatch.setattr(home, "packed_low_rank_linear", lambda *a: calls.append(a) or fused(*a))
    assert pack_model(model, Choice(activations="float")) == 1
    assert arithmetic(model)["linears"] == 1
    state = plain.state_dict()
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    for tokens in (1, 7, 200):
        x = random(tokens, IN, seed=4).to(dtype)
        tolerance = 1e-5 if dtype == torch.float32 else 4e-2
        torch.testing.assert_close(model(x), plain(x), rtol=tolerance, atol=tolerance * 4)
    assert len(calls) == 3
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(x), model(x))
    model.load_state_dict({name: t * 0 if name == "0.bias" else t for name, t in state.items()})
    assert torch.equal(model(x * 0), torch.zeros(200, OUT, dtype=dtype))


@needs_kernels
def test_gradients_and_hooks_take_the_parts_one_by_one(monkeypatch):
    monkeypatch.delenv("COMPRESS_PACK", raising=False)
    model = nn.Sequential(module(bias=False))
    pack_model(model, Choice(activations="float"))
    x = random(3, IN, seed=4).requires_grad_()
    (found,) = torch.autograd.grad(model(x).square().sum(), x)
    dense = model[0].dense()
    (expected,) = torch.autograd.grad((x @ dense.T).square().sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    seen = []
    model[0].right.register_forward_hook(lambda *a: seen.append(a))
    with torch.no_grad():
        model(x)
    assert len(seen) == 1


def test_spec_goes_through_json():
    for factor_bits in (16, 8):
        spec = module(factor_bits=factor_bits).spec
        assert spec_from_dict(spec.to_dict(), "here") == spec
    assert "right" not in module().spec.to_dict()


SPEC = module().spec.to_dict()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"base": None}, "base=None is not how the base can be stored"),
        ({"base": {"representation": "corrected"}}, "base='corrected' is not how a factor can be stored"),
        ({"base": {**SPEC["base"], "out_features": 12}}, r"base is described as \[12, 64\]"),
        ({"base": {**SPEC["base"], "kind": "embedding"}}, "base='quantized' is not how a factor can be stored"),
        ({"rank": 25}, "rank=25 is not a whole number from 1 to 24"),
        ({"rank": 0}, "rank=0"),
        ({"right": {**SPEC["base"]}}, "right is described as"),
        ({"extra": 1}, "does not fit"),
    ],
)
def test_impossible_descriptions_are_refused(changed, said):
    with pytest.raises(CheckpointError, match=said):
        spec_from_dict({**SPEC, **changed}, "here")


def test_a_description_without_a_base_is_refused():
    with pytest.raises(CheckpointError, match="does not fit"):
        spec_from_dict({name: value for name, value in SPEC.items() if name != "base"}, "here")
