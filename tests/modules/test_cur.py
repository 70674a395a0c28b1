from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch.nn import functional

from compress.checkpoint.reader import SAFETENSORS_DTYPES
from compress.checkpoint.stream import rebuild_module
from compress.errors import CheckpointError
from compress.methods.base import Layer, SiteTask
from compress.methods.rtn import RTN, RTNConfig
from compress.modules.cur import CURLinear
from compress.modules.cur_spec import CURSpec
from compress.modules.low_rank_spec import LowRankSpec
from compress.modules.quantized import QuantizedLinear
from compress.modules.quantized_spec import QuantizedSpec
from compress.modules.spec import spec_from_dict

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OUT, IN, RANK = 24, 40, 8
PLAIN = CURSpec(64, 32, 16)
ROWS, LINK, COLUMNS = QuantizedSpec(64, 16, 4, 16), QuantizedSpec(16, 16, 8, -1), QuantizedSpec(16, 32, 3, -1, False)
NESTED = PLAIN.with_leaf("rows", ROWS).with_leaf("link", LINK).with_leaf("columns", COLUMNS)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def module(dtype=torch.float32, bias=True) -> CURLinear:
    return CURLinear.from_factors(
        random(OUT, RANK, dtype=dtype),
        random(RANK, RANK, seed=9, dtype=dtype) / RANK**0.5,
        random(RANK, IN, seed=1, dtype=dtype) / IN**0.5,
        random(OUT, seed=2, dtype=dtype) if bias else None,
    )


def rounded(m: CURLinear, leaf: str, bits=8, group_size=8) -> QuantizedLinear:
    """A leaf of `m` rounded to nearest, as a later step makes it."""
    task = Layer(leaf, m.leaves()[leaf].weight, None, RTNConfig(bits=bits, group_size=group_size), torch.float32)
    return RTN.compress(SiteTask("site", (task,)), None, torch.Generator())[leaf].module


# ---- what runs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_that_of_the_dense_weight(dtype, bias):
    m = module(dtype, bias)
    x = random(2, 5, IN, seed=3, dtype=dtype)
    expected = functional.linear(x.float(), m.dense(torch.float32), None if m.bias is None else m.bias.float())
    found = m(x)
    assert found.dtype == dtype and found.shape == (2, 5, OUT)
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=8 * torch.finfo(dtype).eps * expected.abs().max())
    assert m.dense().dtype == m.weight.dtype == dtype
    if bias:
        assert torch.equal(m(torch.zeros(3, IN, dtype=dtype)), m.bias.expand(3, OUT))


@pytest.mark.parametrize("dtype", DTYPES)
def test_stored_tensors_and_bytes_are_those_of_the_spec(dtype):
    m = module(dtype)
    stored = m.stored()
    assert torch.equal(stored.pop("bias"), m.bias)
    found = {n: (SAFETENSORS_DTYPES[t.dtype], tuple(t.shape)) for n, t in stored.items()}
    assert found == m.spec.tensors(SAFETENSORS_DTYPES[dtype])
    assert m.nbytes == m.spec.nbytes(SAFETENSORS_DTYPES[dtype]) == (RANK * (OUT + IN) + RANK**2) * dtype.itemsize
    assert list(found) == ["rows.weight", "link.weight", "columns.weight"]  # data order


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("quantized", [(), ("rows",), ("link",), ("columns",), CURSpec.factors])
def test_from_spec_can_be_filled(bias, quantized):
    m = module(bias=bias)
    for leaf in quantized:
        m = m.with_leaf(leaf, rounded(m, leaf), None)
    empty = CURLinear.from_spec(m.spec, bias, torch.float32)
    assert all(t.is_meta for t in empty.state_dict().values())
    again = rebuild_module("layer", m.spec, m.stored(), torch.float32)
    assert isinstance(again, CURLinear)
    assert {n: t.shape for n, t in empty.state_dict().items()} == {n: t.shape for n, t in m.stored().items()}
    x = random(5, IN, seed=3)
    assert torch.equal(again(x), m(x))
    assert m.nbytes == m.spec.nbytes("F32")
    assert not any(p.requires_grad for p in again.parameters())


def test_held_copies_of_rounded_factors_change_nothing_and_are_not_kept():
    m = module()
    for leaf in CURSpec.factors:
        m = m.with_leaf(leaf, rounded(m, leaf), None)
    x = random(5, IN, seed=3)
    expected, keys = m(x), list(m.state_dict())
    m.hold(torch.float32)
    assert all(getattr(m, leaf).held is not None for leaf in CURSpec.factors) and m.held is None
    torch.testing.assert_close(m(x), expected)
    assert list(m.state_dict()) == keys
    assert copy.deepcopy(m).link.held is None and pickle.loads(pickle.dumps(m)).link.held is None
    m.release()
    assert m.rows.held is None and m.link.held is None and m.columns.held is None
    assert "40 -> 24, rank 8" in repr(m)


# ---- leaves


def test_leaves_and_how_their_inputs_follow():
    m = module(torch.bfloat16)
    x = random(50, IN, seed=4)
    leaves = m.leaves()
    assert {name: tuple(leaf.weight.shape) for name, leaf in leaves.items()} == m.spec.leaf_shapes()
    assert list(leaves) == list(CURSpec.factors)
    assert leaves["rows"].input_map is None
    seen = {}
    for name in leaves:
        getattr(m, name).register_forward_hook(lambda mod, args, out, name=name: seen.__setitem__(name, args[0]))
    m.float()(x)
    torch.testing.assert_close(seen["rows"], x)
    for name in ("link", "columns"):
        torch.testing.assert_close(seen[name], x @ leaves[name].input_map.T, rtol=1e-4, atol=1e-5)
    assert all(leaf.weight.dtype == torch.float32 for leaf in leaves.values())


@pytest.mark.parametrize(("leaf", "refitted", "same"), [("rows", "link", "columns"), ("link", "columns", "rows")])
def test_what_comes_behind_a_changed_leaf_is_refitted(leaf, refitted, same):
    x = random(200, IN, seed=5) @ random(IN, IN, seed=6)
    m = module(bias=False)
    before = m.dense(torch.float32).clone()
    coarse = rounded(m, leaf, bits=3)
    fitted = m.with_leaf(leaf, coarse, (x.T @ x).double())
    stale = CURLinear(fitted.spec, *(coarse if name == leaf else getattr(m, name) for name in CURSpec.factors))

    def outputs(u: CURLinear) -> torch.Tensor:
        return (x @ u.dense(torch.float32).T).double()

    wanted = x.double() @ before.double().T
    error = float((outputs(fitted) - wanted).square().sum())
    assert error < 0.9 * float((outputs(stale) - wanted).square().sum())
    assert getattr(fitted, same) is getattr(m, same)
    assert torch.equal(m.dense(torch.float32), before)  # the module that it was made from is as it was
    for seed in range(5):  # nothing near it does better
        near = copy.deepcopy(fitted)
        getattr(near, refitted).weight += 1e-2 * random(*getattr(near, refitted).weight.shape, seed=seed)
        assert float((outputs(near) - wanted).square().sum()) > error


def test_factors_that_are_rounded_already_stay():
    m = module()
    m = m.with_leaf("columns", rounded(m, "columns"), None)
    m = m.with_leaf("link", rounded(m, "link"), None)
    link, columns = m.link.codes().clone(), m.columns.codes().clone()
    again = m.with_leaf("rows", rounded(m, "rows"), torch.eye(IN)).with_leaf("link", m.link, None)
    assert torch.equal(again.link.codes(), link) and torch.equal(again.columns.codes(), columns)


# ---- what is stored


@pytest.mark.parametrize("spec", [PLAIN, NESTED, PLAIN.with_leaf("link", LINK)])
def test_survives_a_dictionary(spec):
    spec.validate()
    assert spec_from_dict(spec.to_dict(), "here") == spec
    assert hash(spec_from_dict(spec.to_dict(), "here")) == hash(spec)
    assert PLAIN.to_dict() == {"representation": "cur", "in_features": 64, "out_features": 32, "rank": 16}


def test_bytes_are_those_of_the_factors():
    assert PLAIN.nbytes("BF16") == 2 * (16 * (64 + 32) + 16 * 16)
    assert NESTED.nbytes("BF16") == ROWS.nbytes("BF16") + LINK.nbytes("BF16") + COLUMNS.nbytes("BF16")


@pytest.mark.parametrize(
    "change",
    [
        {"rank": 0}, {"rank": 33}, {"rank": 16.0}, {"rank": True}, {"rank": "16"}, {"rank": None}, {"rank": 2**40},
        {"in_features": 0}, {"out_features": -1}, {"out_features": [32]}, {"extra": 1},
        {"rows": 4}, {"rows": "quantized"}, {"link": {}}, {"columns": {"representation": "no_such"}},
        {"rows": PLAIN.to_dict()}, {"columns": LowRankSpec(16, 32, 4).to_dict()}, {"link": CURSpec(16, 16, 4).to_dict()},
        {"rows": COLUMNS.to_dict()}, {"link": {**LINK.to_dict(), "bits": 99}},
        {"columns": {**COLUMNS.to_dict(), "kind": "embedding"}}, {"rows": {**ROWS.to_dict(), "out_features": 17}},
    ],
)  # fmt: skip
def test_impossible_descriptions_are_refused(change):
    with pytest.raises(CheckpointError, match=r"^here: "):
        spec_from_dict({**PLAIN.to_dict(), **change}, "here")


def test_a_deep_description_is_refused_and_does_not_recurse():
    deep = PLAIN.to_dict()
    for _ in range(2000):
        deep = {**PLAIN.to_dict(), "link": deep}
    with pytest.raises(CheckpointError, match="not how a factor can be stored"):
        spec_from_dict(deep, "here")


def test_needs_no_torch():
    code = "import sys, compress.modules.cur_spec; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
