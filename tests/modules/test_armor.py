from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from compress.checkpoint.reader import SAFETENSORS_DTYPES
from compress.checkpoint.stream import rebuild_module
from compress.errors import CheckpointError
from compress.linalg.block_diagonal import block_dense
from compress.methods.base import Layer, SiteTask
from compress.methods.rtn import RTN, RTNConfig
from compress.modules.armor import ArmorLinear
from compress.modules.armor_spec import ArmorSpec
from compress.modules.quantized_spec import QuantizedSpec
from compress.modules.sparse import SparseLinear
from compress.modules.spec import spec_from_dict

OUT, IN, A, B = 24, 64, 6, 8
SPEC = ArmorSpec.of_sizes(IN, OUT, A, B)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def module(dtype: torch.dtype = torch.float32, bias: bool = True) -> ArmorLinear:
    weight = random(OUT, IN).to(dtype)
    core = SparseLinear.from_weight(weight, torch.tensor([True, False, False, True]).repeat(OUT, IN // 4), 2, 4)
    left, right = random(OUT // A, A, A, seed=1) / A**0.5, random(IN // B, B, B, seed=2) / B**0.5
    return ArmorLinear.from_parts(
        left.to(dtype), core, right.to(dtype), random(OUT, seed=3).to(dtype) if bias else None
    )


def rounded(m: ArmorLinear, second_moment: Tensor | None = None, bits: int = 4) -> ArmorLinear:
    """Its core rounded to nearest, as a later step does it."""
    task = Layer("core", m.leaves()["core"].weight, None, RTNConfig(bits=bits, group_size=16), torch.float32)
    done = RTN.compress(SiteTask("site", (task,)), None, torch.Generator())["core"].module
    return m.with_leaf("core", done, second_moment)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("held", [True, False])
def test_forward_is_that_of_the_dense_weight(dtype, bias, held):
    m = module(dtype, bias)
    if held:
        m.hold(dtype)
    x = random(2, 5, IN, seed=4).to(dtype)
    found = m(x)
    assert found.dtype == dtype and found.shape == (2, 5, OUT)
    expected = functional.linear(x.float(), m.dense(torch.float32), None if m.bias is None else m.bias.float())
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def test_identity_wrappers_are_the_core_alone():
    m = module()
    eyes = (torch.eye(size).repeat(n // size, 1, 1) for n, size in ((OUT, A), (IN, B)))
    plain = ArmorLinear.from_parts(next(eyes), m.core, next(eyes))
    x = random(3, IN, seed=4)
    assert torch.equal(plain.dense(), m.core.dense()) and torch.equal(plain(x), m.core(x))


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_tensors_are_those_of_the_spec_and_come_back(quantized, dtype):
    m = module(dtype)
    if quantized:
        m = rounded(m).to(dtype)
    name = (
        SAFETENSORS_DTYPES[dtype]
        if dtype in SAFETENSORS_DTYPES
        else {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]
    )
    stored = m.stored()
    described = m.spec.tensors(name)
    assert set(stored) == {*described, "bias"}
    assert all(tuple(stored[suffix].shape) == shape for suffix, (_, shape) in described.items())
    assert m.nbytes == m.spec.nbytes(name)
    again = rebuild_module("m", m.spec, stored, dtype)
    assert torch.equal(again.dense(), m.dense())
    for other in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert torch.equal(other.dense(), m.dense())


def test_bytes_are_nine_bits_per_weight_and_the_wrappers():
    spec = ArmorSpec.of_sizes(4096, 4096, 128, 128)
    assert spec.nbytes("BF16") * 8 == 4096 * 4096 * 9 + 2 * 4096 * 128 * 16
    four = spec.with_leaf("core", QuantizedSpec(4096, 4096, 4, 128))
    assert four.nbytes("BF16") * 8 == 4096 * 4096 * 3 + 4096 * 32 * 16 + 2 * 4096 * 128 * 16
    assert four.masked_leaves() == {"core"} and four.leaf_shapes() == {"core": (4096, 4096)}


def test_the_leaf_meets_what_the_input_wrapper_gives_and_keeps_its_zeros():
    m = module()
    leaf = m.leaves()["core"]
    assert torch.equal(leaf.input_map, block_dense(m.input_wrapper)) and torch.equal(leaf.mask, m.core.mask())
    changed = rounded(m)
    assert changed.spec == m.spec.with_leaf("core", QuantizedSpec(IN, OUT, 4, 16))
    assert torch.equal(changed.core.mask(), m.core.mask())
    assert not changed.core.dense()[~m.core.mask()].any()


def test_a_rounded_core_refits_the_output_wrapper():
    m, x = module(), random(400, IN, seed=5) @ (random(IN, IN, seed=6) / 8 + torch.eye(IN))
    changed = rounded(m, x.T @ x, bits=2)
    assert torch.equal(changed.input_wrapper, m.input_wrapper)
    kept = ArmorLinear.from_parts(m.output_wrapper, changed.core, m.input_wrapper, m.bias)
    refitted, plain = ((other(x) - m(x)).square().mean() for other in (changed, kept))
    assert refitted < 0.9 * plain


def test_spec_goes_through_json():
    for spec in (SPEC, SPEC.with_leaf("core", QuantizedSpec(IN, OUT, 4, 16))):
        assert spec_from_dict(spec.to_dict(), "here") == spec
    assert SPEC.to_dict()["core"]["representation"] == "sparse"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"input_size": 7}, "input_size=7 does not divide in_features=64"),
        ({"output_size": 0}, "output_size=0 is not a whole number from 1 to 24"),
        ({"core": None}, "is not how the core can be stored"),
        ({"core": {"representation": "armor"}}, "core='armor' is not how the core can be stored"),
        ({"core": 3}, "core='int' is not how the core can be stored"),
        ({"core": {**SPEC.core.to_dict(), "out_features": 12, "kept": 384}}, "core is described as"),
        ({"core": {**SPEC.core.to_dict(), "kept": 1}}, "kept=1, and 2:4 keeps 768 weights"),
        ({"extra": 1}, "does not fit"),
    ],
)
def test_impossible_descriptions_are_refused(changed, said):
    with pytest.raises(CheckpointError, match=said):
        spec_from_dict({**SPEC.to_dict(), **changed}, "here")


def test_damaged_places_are_refused():
    m = module()
    stored = {**m.stored(), "core.weight_positions": torch.zeros_like(m.core.weight_positions)}
    with pytest.raises(CheckpointError, match=r"m\.core\.weight_positions: group 0 of row 0"):
        rebuild_module("m", m.spec, stored, torch.float32)
