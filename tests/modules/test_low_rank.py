import copy
import pickle

import pytest
import torch
from torch.nn import functional

from compress.checkpoint.reader import SAFETENSORS_DTYPES
from compress.checkpoint.stream import rebuild_module
from compress.linalg.low_rank import decompose, factors
from compress.methods.base import Layer, SiteTask
from compress.methods.rtn import RTN, RTNConfig
from compress.modules.base import CompressedModule
from compress.modules.low_rank import LowRankLinear
from compress.modules.low_rank_spec import LowRankSpec
from compress.modules.quantized import QuantizedLinear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OUT, IN, RANK = 24, 40, 8


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def module(dtype=torch.float32, bias=True) -> LowRankLinear:
    made = random(OUT, seed=2, dtype=dtype) if bias else None
    return LowRankLinear.from_factors(
        random(OUT, RANK, dtype=dtype), random(RANK, IN, seed=1, dtype=dtype) / IN**0.5, made
    )


def rounded(m: LowRankLinear, leaf: str, bits=8, group_size=8) -> QuantizedLinear:
    """A leaf of `m` rounded to nearest, as a later step makes it."""
    task = Layer(leaf, m.leaves()[leaf].weight, None, RTNConfig(bits=bits, group_size=group_size), torch.float32)
    return RTN.compress(SiteTask("site", (task,)), None, torch.Generator())[leaf].module


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_that_of_the_dense_weight(dtype, bias):
    m = module(dtype, bias)
    x = random(2, 5, IN, seed=3, dtype=dtype)
    expected = functional.linear(x.float(), m.dense(torch.float32), None if m.bias is None else m.bias.float())
    found = m(x)
    assert found.dtype == dtype and found.shape == (2, 5, OUT)
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps * expected.abs().max())
    assert m.dense().dtype == m.weight.dtype == dtype


def test_bias_is_applied_once():
    m = module()
    assert torch.equal(m(torch.zeros(3, IN)), m.bias.expand(3, OUT))


@pytest.mark.parametrize("dtype", DTYPES)
def test_stored_tensors_and_bytes_are_those_of_the_spec(dtype):
    m = module(dtype)
    stored = m.stored()
    assert torch.equal(stored.pop("bias"), m.bias)
    found = {n: (SAFETENSORS_DTYPES[t.dtype], tuple(t.shape)) for n, t in stored.items()}
    assert found == m.spec.tensors(SAFETENSORS_DTYPES[dtype])
    assert m.nbytes == m.spec.nbytes(SAFETENSORS_DTYPES[dtype]) == RANK * (OUT + IN) * dtype.itemsize
    assert list(found) == ["right.weight", "left.weight"]  # data order


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("quantized", [(), ("right",), ("left",), ("right", "left")])
def test_from_spec_can_be_filled(bias, quantized):
    m = module(bias=bias)
    for leaf in quantized:
        m = m.with_leaf(leaf, rounded(m, leaf), None)
    empty = LowRankLinear.from_spec(m.spec, bias, torch.float32)
    assert all(t.is_meta for t in empty.state_dict().values())
    again = rebuild_module("layer", m.spec, m.stored(), torch.float32)
    assert isinstance(again, LowRankLinear)
    assert {n: t.shape for n, t in empty.state_dict().items()} == {n: t.shape for n, t in m.stored().items()}
    x = random(5, IN, seed=3)
    assert torch.equal(again(x), m(x))
    assert m.nbytes == m.spec.nbytes("F32")
    assert not any(p.requires_grad for p in again.parameters())


def test_leaves_and_how_their_inputs_follow():
    m = module(torch.bfloat16)
    x = random(50, IN, seed=4)
    leaves = m.leaves()
    assert {name: tuple(leaf.weight.shape) for name, leaf in leaves.items()} == m.spec.leaf_shapes()
    assert list(leaves) == ["right", "left"]
    assert leaves["right"].input_map is None
    seen = {}
    for name in leaves:
        getattr(m, name).register_forward_hook(lambda mod, args, out, name=name: seen.__setitem__(name, args[0]))
    m.float()(x)
    torch.testing.assert_close(seen["right"], x)
    torch.testing.assert_close(seen["left"], x @ leaves["left"].input_map.T)
    assert all(leaf.weight.dtype == torch.float32 for leaf in leaves.values())


def test_a_changed_right_factor_refits_the_left_one():
    w, x = random(OUT, IN), random(200, IN, seed=5) @ random(IN, IN, seed=6)
    h = (x.T @ x).double()
    left, right = factors(w, decompose(w, RANK, h).basis)
    m = LowRankLinear.from_factors(left.float(), right.float())
    before = m.dense(torch.float32).clone()
    coarse = rounded(m, "right", bits=3)
    refitted = m.with_leaf("right", coarse, h)
    stale = LowRankLinear(refitted.spec, coarse, m.left)

    def error(changed):
        return float(((before - changed.dense(torch.float32)) @ x.T).square().sum())

    assert error(refitted) < 0.9 * error(stale)
    assert torch.equal(m.dense(torch.float32), before)  # the module that it was made from is as it was
    assert refitted.right is coarse and refitted.spec.right == coarse.spec
    assert refitted.left.weight.dtype == m.left.weight.dtype
    torch.testing.assert_close(
        m.with_leaf("right", rounded(m, "right"), h).left.weight, m.left.weight, atol=0.1, rtol=0
    )


def test_a_left_factor_that_is_rounded_already_stays():
    m = module()
    m = m.with_leaf("left", rounded(m, "left"), None)
    codes = m.left.codes().clone()
    again = m.with_leaf("right", rounded(m, "right"), torch.eye(IN))
    assert torch.equal(again.left.codes(), codes)
    assert isinstance(again.left, QuantizedLinear) and isinstance(again.right, QuantizedLinear)


def test_leaf_of_a_leaf_can_be_replaced_again():
    m = module()
    m = m.with_leaf("right", rounded(m, "right", bits=8), None)
    again = m.with_leaf("right", rounded(m, "right", bits=4), None)
    assert again.spec.right.bits == 4 and m.spec.right.bits == 8


def test_held_copies_of_rounded_factors_change_nothing_and_are_not_kept():
    m = module()
    m = m.with_leaf("right", rounded(m, "right"), None)
    x = random(5, IN, seed=3)
    expected, keys = m(x), list(m.state_dict())
    m.hold(torch.float32)
    assert m.right.held is not None and m.held is None
    torch.testing.assert_close(m(x), expected)
    assert list(m.state_dict()) == keys
    assert copy.deepcopy(m).right.held is None
    assert pickle.loads(pickle.dumps(m)).right.held is None
    m.release()
    assert m.right.held is None
    m.hold(torch.float32)
    m.to(torch.bfloat16)
    assert m.right.held is None and m.left.weight.dtype == torch.bfloat16


def test_is_described_to_a_reader():
    assert "40 -> 24, rank 8" in repr(module())
    assert isinstance(module(), CompressedModule)
    assert module().spec == LowRankSpec(IN, OUT, RANK)
