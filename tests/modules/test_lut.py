from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from compress.checkpoint.stream import rebuild_module
from compress.errors import CheckpointError
from compress.kernels.lut import lut_linear
from compress.linalg.lookup import Lookup
from compress.modules.lut import LUTLinear
from compress.modules.lut_spec import LUTSpec
from compress.modules.spec import spec_from_dict

OUT, IN = 12, 40
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
every_kind = pytest.mark.parametrize("group_size", [0, -1, 8])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def module(group_size: int, bits: int = 3, dtype: torch.dtype = torch.float32, bias: bool = True) -> LUTLinear:
    spec = LUTSpec(IN, OUT, bits, group_size)
    codes = torch.randint(2**bits, (OUT, IN), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    rows = () if group_size else (OUT,)
    table = random(*rows, 2**bits).sort(dim=-1).values.to(dtype)
    scale = random(OUT, spec.n_groups, seed=2).to(dtype) if group_size else None
    return LUTLinear.from_codes(codes, table, scale, spec, random(OUT, seed=3).to(dtype) if bias else None)


@every_kind
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_weight_is_what_codes_stand_for(group_size, bits, dtype):
    m = module(group_size, bits, dtype)
    codes = m.codes()
    assert int(codes.max()) == 2**bits - 1
    table, scale = m.weight_table.float(), m.weight_scale
    for row, column in ((0, 0), (3, 17), (OUT - 1, IN - 1)):
        code = int(codes[row, column])
        if scale is None:
            expected = table[row, code]
        else:
            expected = (table[code] * float(scale[row, column // (IN // scale.shape[1])])).to(dtype)
        assert m.dense()[row, column] == expected
    assert torch.equal(m.dense(torch.float32), m.dense().float())
    assert torch.equal(
        Lookup(m.weight_table, scale).decode(codes), m.dense(torch.float32)
    )  # what the method counted on


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("held", [True, False])
def test_forward_is_that_of_the_dense_weight(group_size, dtype, held):
    m = module(group_size, 4, dtype, bias=held)
    if held:
        m.hold(dtype)
    x = random(2, 5, IN, seed=4).to(dtype)
    exact = functional.linear(x.double(), m.dense(torch.float64), None if m.bias is None else m.bias.double())
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(m(x).double(), exact, rtol=2 * eps, atol=2 * eps * float(exact.abs().max()))
    assert m(x[:, :0]).shape == (2, 0, OUT)
    assert m(x[:, ::2].float()).dtype == torch.float32


@every_kind
def test_gradients_are_those_of_the_dense_weight(group_size):
    m = module(group_size)
    m.bias.requires_grad_()
    x, other = (random(3, IN, seed=4).requires_grad_() for _ in range(2))
    m(x).square().sum().backward()
    functional.linear(other, m.dense(), m.bias.detach()).square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-4, atol=1e-4)  # sums are added in another order
    torch.testing.assert_close(m.bias.grad, 2 * m(x).sum(0).detach(), rtol=1e-4, atol=1e-4)


@every_kind
def test_the_operation_keeps_its_promises_to_torch(group_size):
    m = module(group_size)
    arguments = (random(3, IN).requires_grad_(), m.weight_packed, m.weight_table, m.weight_scale, m.bias, 3, IN)
    torch.library.opcheck(torch.ops.compress.lut_linear.default, arguments)
    meta = [a.detach().to("meta") if isinstance(a, Tensor) else a for a in arguments]
    assert lut_linear(*meta).shape == (3, OUT)


@every_kind
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dtype", list(NAMES))
def test_stored_tensors_are_those_of_the_spec_and_come_back(group_size, bits, dtype):
    m = module(group_size, bits, dtype)
    described = m.spec.tensors(NAMES[dtype])
    stored = m.stored()
    assert set(stored) == {*described, "bias"}
    assert all(tuple(stored[suffix].shape) == shape for suffix, (_, shape) in described.items())
    assert m.nbytes == m.spec.nbytes(NAMES[dtype])
    again = rebuild_module("m", m.spec, stored, dtype)
    for other in (again, copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert torch.equal(other.dense(), m.dense()) and torch.equal(other.bias, m.bias)
    assert m.to(torch.float64).dense().dtype == torch.float64


def test_bytes():
    """Codes of exactly 3 bits; 16 bits per scale or table value."""
    assert LUTSpec(4096, 4096, 3, 0).nbytes("BF16") * 8 == 4096 * (4096 * 3 + 8 * 16)
    assert LUTSpec(4096, 4096, 4, 64).nbytes("BF16") * 8 == 4096 * (4096 * 4 + 64 * 16) + 16 * 16
    assert LUTSpec(4096, 1024, 2, -1).nbytes("F32") * 8 == 1024 * (4096 * 2 + 32) + 4 * 32
    assert LUTSpec(40, 12, 3, 0).nbytes("BF16") == 12 * (4 * 4 + 8 * 2)  # rows of codes are whole words


@every_kind
def test_spec_goes_through_json(group_size):
    spec = LUTSpec(IN, OUT, 3, group_size)
    assert spec_from_dict(spec.to_dict(), "here") == spec


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"bits": 5}, "bits=5 is not a whole number from 2 to 4"),
        ({"bits": 1}, "bits=1 is not a whole number from 2 to 4"),
        ({"bits": "3"}, "bits='3' is not a whole number"),
        ({"group_size": 7}, "group_size=7 does not divide in_features=40"),
        ({"group_size": -2}, "group_size=-2 is not a whole number from -1 to 40"),
        ({"group_size": None}, "group_size=None"),
        ({"in_features": 0}, "in_features=0 is not a whole number"),
        ({"extra": 1}, "does not fit"),
    ],
)
def test_impossible_descriptions_are_refused(changed, said):
    with pytest.raises(CheckpointError, match=said):
        spec_from_dict({**LUTSpec(IN, OUT, 3, 8).to_dict(), **changed}, "here")
