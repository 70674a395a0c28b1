from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.errors import CheckpointError
from compress.linalg.absolute_value import decompose
from compress.modules.bitstack import BitStackLinear
from compress.modules.bitstack_spec import BitStackSpec
from compress.modules.registry import module_class
from compress.modules.spec import spec_from_dict

OUT, IN, RANK = 24, 44, 3  # the width is no multiple of 8


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parts(blocks: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    found = decompose(random(OUT, IN), RANK, blocks, generator=torch.Generator().manual_seed(0))
    return [(b.signs, b.left, b.right) for b in found]


def module(blocks: int = 3, scaled: bool = False, bias: bool = False, dtype: torch.dtype = torch.float32):
    scale = (random(IN, seed=2).abs() + 0.5).half() if scaled else None
    spec = BitStackSpec(IN, OUT, RANK, blocks, scaled)
    return BitStackLinear(spec, parts(blocks), scale, random(OUT, seed=3).to(dtype) if bias else None, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("held", [True, False])
def test_forward_is_that_of_the_dense_weight(dtype, scaled, held):
    m = module(scaled=scaled, bias=True, dtype=dtype)
    if held:
        m.hold(dtype)
    x = random(2, 5, IN, seed=4).to(dtype)
    found = m(x)
    assert found.dtype == dtype and found.shape == (2, 5, OUT) and m.dense().dtype == dtype
    expected = functional.linear(x.float(), m.dense(torch.float32), m.bias.float())
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("scaled", [True, False])
def test_stored_tensors_are_those_of_the_spec_and_come_back(scaled):
    m = module(scaled=scaled, bias=True)
    names = {torch.uint8: "U8", torch.float16: "F16"}
    stored = m.stored()
    bias = stored.pop("bias")
    assert {k: (names[t.dtype], tuple(t.shape)) for k, t in stored.items()} == m.spec.tensors("F32")
    assert m.nbytes == m.spec.nbytes("BF16") == 3 * m.spec.block_bytes + (2 * IN if scaled else 0)
    assert m.spec.block_bytes == OUT * 6 + 2 * RANK * (OUT + IN)
    spec = spec_from_dict(m.spec.to_dict(), "here")
    assert spec == m.spec
    again = module_class("bitstack").from_spec(spec, True, torch.float32)
    again.load_state_dict({**stored, "bias": bias}, assign=True)
    assert torch.equal(again.dense(), m.dense())


def test_a_prefix_grown_is_the_longer_one_bit_for_bit_and_back():
    long, short = module(4, scaled=True), module(1, scaled=True)
    x = random(3, IN, seed=4)
    at = {n: module(n, scaled=True)(x) for n in (1, 2, 3, 4)}
    for n, block in enumerate(parts(4)[1:], start=2):
        short.append_block(*block)
        assert short.n_blocks == n and torch.equal(short(x), at[n])
    assert short.state_dict().keys() == long.state_dict().keys() and short.nbytes == long.nbytes
    for n in (3, 2, 1):
        short.drop_block()
        assert short.n_blocks == short.spec.blocks == n and torch.equal(short(x), at[n])
    assert set(short.state_dict()) == {"block_0.signs", "block_0.left", "block_0.right", "scale"}
    with pytest.raises(AssertionError, match="one block at least"):
        short.drop_block()


def test_a_dense_copy_does_not_outlive_its_blocks():
    m = module(2)
    m.hold(torch.float32)
    m.append_block(*parts(3)[2])
    assert m.held is None
    m.hold(torch.float32)
    m.drop_block()
    assert m.held is None and torch.equal(m(random(1, IN)), module(2)(random(1, IN)))


def test_a_block_of_another_shape_is_not_taken():
    signs, left, right = parts(1)[0]
    for wrong in ((signs[:-1], left, right), (signs, left.float(), right), (signs, right, left)):
        with pytest.raises(AssertionError):
            module(1).append_block(*wrong)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_leaves_what_is_stored_as_it_is(dtype):
    m = module(2, scaled=True, bias=True)
    before = {name: tensor.clone() for name, tensor in m.state_dict().items()}
    nn.Sequential(m).to(dtype)
    assert m.bias.dtype == m.dense().dtype == m.weight.dtype == dtype
    for name, tensor in m.state_dict().items():
        assert name == "bias" or torch.equal(tensor, before[name]), name
    assert m(random(2, IN).to(dtype)).dtype == dtype
    assert nn.Sequential(m).to("meta")[0].block_1.left.is_meta


def test_copies_stand_alone():
    m = module(2)
    for other in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        other.drop_block()
        assert m.n_blocks == 2 and other.n_blocks == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [({"blocks": 0}, "blocks=0"), ({"rank": 25}, "rank=25"), ({"scaled": 1}, "neither true nor false")],
)
def test_descriptions_that_cannot_be_are_refused(change, message):
    fields = {**BitStackSpec(IN, OUT, RANK, 2).to_dict(), **change}
    with pytest.raises(CheckpointError, match=message):
        spec_from_dict(fields, "here")
