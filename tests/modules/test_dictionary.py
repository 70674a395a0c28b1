from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.checkpoint.description import modules_of, own_config
from compress.checkpoint.stream import rebuild_module
from compress.errors import CheckpointError
from compress.methods.base import Layer, SiteTask
from compress.methods.rtn import RTN, RTNConfig
from compress.models.structure import Structure
from compress.modules.dictionary import DictionaryLinear
from compress.modules.dictionary_spec import DictionarySpec
from compress.modules.quantized_spec import QuantizedSpec
from compress.modules.spec import spec_from_dict

OUT, IN, ATOMS, KEPT = 24, 32, 16, 5
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def module(dtype: torch.dtype = torch.float32, bias: bool = True, kept: int = KEPT) -> DictionaryLinear:
    codes = random(OUT, ATOMS)
    mask = torch.zeros(OUT, ATOMS, dtype=torch.bool).scatter_(1, codes.abs().topk(kept, dim=1).indices, True)
    return DictionaryLinear.from_parts(
        (random(ATOMS, IN, seed=1) / IN**0.5).to(dtype),
        codes.to(dtype),
        None if kept == ATOMS else mask,
        random(OUT, seed=2).to(dtype) if bias else None,
    )


def borrower(lender: DictionaryLinear, dtype: torch.dtype = torch.float32) -> DictionaryLinear:
    codes = random(OUT, ATOMS, seed=7)
    mask = torch.zeros(OUT, ATOMS, dtype=torch.bool).scatter_(1, codes.abs().topk(KEPT, dim=1).indices, True)
    return DictionaryLinear.from_parts(lender.atoms, codes.to(dtype), mask, shared="block.0.q")


def rounded(m: DictionaryLinear, leaf: str, second_moment: Tensor | None = None, bits: int = 4) -> DictionaryLinear:
    """One of its leaves rounded to nearest, as a later step does it."""
    found = m.leaves()[leaf]
    task = Layer(leaf, found.weight, None, RTNConfig(bits=bits, group_size=16), torch.float32, mask=found.mask)
    done = RTN.compress(SiteTask("site", (task,)), None, torch.Generator())[leaf].module
    return m.with_leaf(leaf, done, second_moment)


@pytest.mark.parametrize("dtype", list(NAMES))
@pytest.mark.parametrize(("bias", "held", "kept"), [(True, False, KEPT), (False, True, KEPT), (True, False, ATOMS)])
def test_forward_is_that_of_the_dense_weight(dtype, bias, held, kept):
    m = module(dtype, bias, kept)
    if held:
        m.hold(dtype)
    x = random(2, 5, IN, seed=4).to(dtype)
    found = m(x)
    assert found.dtype == dtype and found.shape == (2, 5, OUT)
    expected = functional.linear(x.float(), m.dense(torch.float32), None if m.bias is None else m.bias.float())
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("leaves", [(), ("dictionary",), ("dictionary", "codes")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [KEPT, ATOMS])
def test_stored_tensors_are_those_of_the_spec_and_come_back(leaves, dtype, kept):
    m = module(dtype, kept=kept)
    for leaf in leaves:
        m = rounded(m, leaf)
    m = m.to(dtype)
    stored, described = m.stored(), m.spec.tensors(NAMES[dtype])
    assert set(stored) == {*described, "bias"}
    assert all(tuple(stored[suffix].shape) == shape for suffix, (_, shape) in described.items())
    assert m.nbytes == m.spec.nbytes(NAMES[dtype])
    assert spec_from_dict(m.spec.to_dict(), "here") == m.spec
    for other in (rebuild_module("m", m.spec, stored, dtype), copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert torch.equal(other.dense(), m.dense())


def test_bytes_are_those_of_the_paper():
    assert DictionarySpec.of_sizes(4096, 12288, 3657, 1828).nbytes("BF16") == pytest.approx(
        2 * (4096 * 3657 + 1828 * 12288) + 3657 * 12288 / 8, rel=1e-3
    )
    assert DictionarySpec.of_sizes(64, 64, 10, 10).nbytes("BF16") == 2 * 10 * 128
    assert "codes.weight_positions" in DictionarySpec.of_sizes(64, 64, 10, 5).tensors("BF16")


def test_leaves_are_dictionary_and_codes_and_codes_keep_their_places():
    m = module()
    leaves = m.leaves()
    assert list(leaves) == ["dictionary", "codes"] and leaves["dictionary"].input_map is None
    assert torch.equal(leaves["codes"].input_map, m.atoms.weight)
    changed = rounded(rounded(m, "dictionary"), "codes")
    assert torch.equal(changed.codes.mask(), m.codes.mask())
    assert not changed.codes.dense()[~m.codes.mask()].any()
    assert changed.spec == m.spec.with_leaf("dictionary", QuantizedSpec(IN, ATOMS, 4, 16)).with_leaf(
        "codes", QuantizedSpec(ATOMS, OUT, 4, 16)
    )


@pytest.mark.parametrize("kept", [KEPT, ATOMS])
def test_a_rounded_dictionary_refits_the_coefficients_where_they_are(kept):
    m, x = module(kept=kept), random(400, IN, seed=5) @ (random(IN, IN, seed=6) / 8 + torch.eye(IN))
    changed = rounded(m, "dictionary", x.T @ x, bits=3)
    values, mask = changed.leaves()["codes"].weight, m.leaves()["codes"].weight != 0
    assert not values[~mask].any()
    kept_codes = m.leaves()["codes"].weight @ changed.leaves()["dictionary"].weight
    refitted = (changed(x) - m(x)).square().mean()
    plain = (x @ kept_codes.T + m.bias - m(x)).square().mean()
    assert refitted < 0.95 * plain
    atoms, wanted = x @ changed.leaves()["dictionary"].weight.T, m(x) - m.bias
    for i in range(0, OUT, 7):
        exact = torch.linalg.lstsq(atoms[:, mask[i]].double(), wanted[:, i].double()).solution
        torch.testing.assert_close(values[i, mask[i]].double(), exact, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("quantized", [False, True])
def test_a_borrower_stores_its_codes_alone_and_uses_the_very_dictionary(quantized):
    lender = rounded(module(), "dictionary") if quantized else module()
    m = borrower(lender)
    assert m.atoms is lender.atoms and not any(name.startswith("dictionary") for name in m.state_dict())
    assert m.spec.lender() == "block.0.q" and m.spec == m.spec.borrowing(lender.spec)
    assert list(m.leaves()) == ["codes"] == list(m.spec.leaf_shapes())
    assert (
        m.nbytes == m.spec.nbytes("F32") == DictionarySpec.of_sizes(IN, OUT, ATOMS, KEPT).nbytes("F32") - 4 * ATOMS * IN
    )
    assert set(m.spec.borrowed("F32")) == {name for name in lender.stored() if name.startswith("dictionary.")}
    assert spec_from_dict(m.spec.to_dict(), "here") == m.spec
    stand_in = DictionaryLinear.part_to_lend(m.spec, torch.float32)
    assert set(stand_in.state_dict()) == set(m.spec.borrowed("F32"))
    x = random(3, IN, seed=4)
    torch.testing.assert_close(m(x), x @ m.dense().T, rtol=1e-5, atol=1e-5)
    again = rebuild_module("m", m.spec, m.stored(), torch.float32)
    again.lend(lender)
    assert torch.equal(again(x), m(x))
    codes = rounded(m, "codes")
    assert codes.atoms is lender.atoms and codes.spec.lender() == "block.0.q"
    both = nn.ModuleList([lender, m])
    twin = copy.deepcopy(both).to(torch.bfloat16)
    assert twin[1].atoms is twin[0].atoms and twin[1](x.bfloat16()).dtype == torch.bfloat16
    assert sum(p.numel() for p in both.parameters()) == sum(t.numel() for t in both.state_dict().values())


def test_another_dictionary_is_lent_with_a_refit():
    lender = module()
    m, x = borrower(lender), random(400, IN, seed=5)
    changed = m.with_lent(rounded(lender, "dictionary", bits=3), x.T @ x)
    assert changed.spec.dictionary is not None and torch.equal(changed.codes.mask(), m.codes.mask())
    plain = m.leaves()["codes"].weight @ changed.atoms.dense()
    assert (changed(x) - m(x)).square().mean() < 0.95 * (x @ plain.T - m(x)).square().mean()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rank": 33}, "rank=33 is not a whole number from 1 to 32"),
        ({"shared": ""}, "shared='' is no name"),
        ({"shared": 3}, "shared=3 is no name"),
        ({"codes": {"representation": "low_rank"}}, "codes='low_rank' is not how a factor can be stored"),
        ({"rank": 12}, "is described as"),
        ({"lender": "x"}, "does not fit"),
    ],
)
def test_descriptions_that_cannot_be_are_refused(change, said):
    with pytest.raises(CheckpointError, match=said):
        spec_from_dict({**module().spec.to_dict(), **change}, "here")


def test_only_a_dictionary_of_the_right_size_can_be_borrowed():
    spec = borrower(module()).spec
    for other in (DictionarySpec.of_sizes(IN, OUT, 12, 4), DictionarySpec.of_sizes(IN, OUT, ATOMS, 4, "x")):
        with pytest.raises(CheckpointError, match="shares the dictionary of block.0.q, which"):
            spec.borrowing(other)


def test_a_description_of_borrowers_is_held_to_their_lender():
    lender = rounded(module(), "dictionary")
    specs = {"block.0.q": lender.spec, "block.1.q": borrower(lender).spec, "block.2.q": borrower(lender).spec}
    described = {"quantization_config": own_config(specs, Structure())}
    assert modules_of(described) == specs
    for change, said in (
        ({"shared": "block.7.q"}, "uses parts of 'block.7.q', which is not described"),
        ({"shared": "block.1.q"}, "shares the dictionary of block.1.q, which stores none"),
        ({"dictionary": None}, "is described with other parts than block.0.q stores"),
    ):
        wrong = copy.deepcopy(described)
        entry = next(entry for entry in wrong["quantization_config"]["modules"] if "shared" in entry)
        entry.update(change)
        with pytest.raises(CheckpointError, match=said):
            modules_of(wrong)
