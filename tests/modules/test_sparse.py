"""Pruned linears: what they weigh, how they load, what is refused, what a later step sees of them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from compress.checkpoint.stream import rebuild_module
from compress.errors import CheckpointError
from compress.linalg.sparsity import highest, highest_of_groups
from compress.modules.low_rank import LowRankLinear
from compress.modules.low_rank_spec import LowRankSpec
from compress.modules.quantized import QuantizedLinear
from compress.modules.quantized_spec import QuantizedSpec
from compress.modules.sparse import SparseLinear
from compress.modules.sparse_spec import SparseSpec
from compress.modules.spec import spec_from_dict


def sparse(n: int = 2, m: int = 4, out: int = 16, width: int = 64, dtype=torch.bfloat16) -> SparseLinear:
    weight = torch.randn(out, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    scores = weight.abs().float()
    mask = highest_of_groups(scores, n, m) if m else highest(scores, out * width // 2)
    return SparseLinear.from_weight(weight, mask, n, m)


def codes_for(module: SparseLinear, bits: int = 4, group_size: int = 16) -> QuantizedLinear:
    spec = QuantizedSpec(module.in_features, module.out_features, bits, group_size)
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 2**bits, (spec.out_features, spec.in_features), generator=generator)
    codes[~module.mask()] = 2 ** (bits - 1)
    scale = torch.rand(spec.out_features, spec.n_groups, generator=generator).to(torch.bfloat16)
    made = QuantizedLinear.from_codes(codes, scale, None, spec)
    assert isinstance(made, QuantizedLinear)
    return made


def test_two_of_four_take_nine_sixteenths_and_with_four_bits_three_bits_per_weight_and_scales():
    spec = SparseSpec.of_pattern(4096, 1024, 2, 4)
    assert spec.nbytes("BF16") * 16 == 9 * 4096 * 1024 * 2
    four = spec.with_leaf("", QuantizedSpec(4096, 1024, 4, 128))
    assert four.nbytes("BF16") == 4096 * 1024 * 3 // 8 + 1024 * 32 * 2
    half = SparseSpec(4096, 1024, 4096 * 512)
    assert half.nbytes("BF16") == spec.nbytes("BF16")


@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 8), (0, 0)])
@pytest.mark.parametrize("bits", [0, 3])
def test_an_empty_one_is_filled_by_a_loader(n, m, bits):
    module = sparse(n, m)
    if bits:
        module = module.with_leaf("", codes_for(module, bits), None)
    stored = module.stored()
    assert {k: (list(t.shape), t.is_floating_point()) for k, t in stored.items()} == {
        k: (list(shape), kind == "BF16") for k, (kind, shape) in module.spec.tensors("BF16").items()
    }
    assert module.nbytes == module.spec.nbytes("BF16")
    spec = spec_from_dict(module.spec.to_dict(), "here")
    assert spec == module.spec
    again = rebuild_module("layer", spec, stored, torch.bfloat16)
    torch.testing.assert_close(again.dense(), module.dense(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"n": 4}, "n=4 is not a whole number from 1 to 3"),
        ({"n": 0}, "n=0 is not a whole number from 1 to 3"),
        ({"m": 128}, "m=128 is not a whole number from 0 to 64"),
        ({"m": 3}, "m=3 does not divide in_features=64"),
        ({"kept": 511}, "kept=511, and 2:4 keeps 512 weights"),
        ({"kept": 0}, "kept=0 is not a whole number from 1 to 1024"),
        ({"n": 0, "m": 0, "kept": 1025}, "kept=1025 is not a whole number from 1 to 1024"),
        ({"bits": 9}, "bits=9"),
        ({"bits": True}, "bits=True"),
        ({"bits": 4, "group_size": 48}, "group_size=48 does not divide in_features=64"),
        ({"group_size": 16}, "group_size=16 without bits describes nothing"),
        ({"out_features": 2**31}, "out_features=2147483648"),
        ({"extra": 1}, "does not fit"),
    ],
)
def test_impossible_descriptions_are_refused(fields, said):
    described = {**sparse().spec.to_dict(), **fields}
    with pytest.raises(CheckpointError) as error:
        spec_from_dict(described, "config.json: modules[0]")
    assert said in str(error.value) and "config.json: modules[0]" in str(error.value)


def test_contents_that_cannot_be_are_refused_by_the_tensor_s_name():
    module = sparse()
    stored = {name: tensor.clone() for name, tensor in module.stored().items()}
    stored["weight_positions"][3, 0] = 0
    with pytest.raises(CheckpointError, match=r"layers\.0\.q\.weight_positions: group 0 of row 3"):
        rebuild_module("layers.0.q", module.spec, stored, torch.bfloat16)
    anywhere = sparse(0, 0)
    stored = {name: tensor.clone() for name, tensor in anywhere.stored().items()}
    stored["weight_positions"][0, 0] = -1
    with pytest.raises(CheckpointError, match=r"q\.weight_positions: .* weights are marked as kept, .* values for 512"):
        rebuild_module("q", anywhere.spec, stored, torch.bfloat16)


def test_a_damaged_factor_is_named_with_its_place_in_the_module():
    right = sparse(2, 4, out=8)
    spec = LowRankSpec(64, 16, 8, right=right.spec)
    left = torch.zeros(16, 8, dtype=torch.bfloat16)
    stored = {"left.weight": left, **{f"right.{name}": t.clone() for name, t in right.stored().items()}}
    rebuild_module("q", spec, stored, torch.bfloat16)
    stored["right.weight_positions"][0, 0] = 0
    with pytest.raises(CheckpointError, match=r"q\.right\.weight_positions"):
        rebuild_module("q", spec, stored, torch.bfloat16)


def test_its_leaf_has_a_mask_and_codes_of_the_leaf_stay_under_it():
    module = sparse()
    leaf = module.leaves()[""]
    assert leaf.mask is not None and leaf.mask.sum() == module.spec.kept
    assert (leaf.weight[~leaf.mask] == 0).all() and leaf.weight.dtype == torch.float32
    codes = codes_for(module)
    quantized = module.with_leaf("", codes, None)
    torch.testing.assert_close(quantized.dense(), codes.dense(), rtol=0, atol=0)
    assert quantized.spec == module.spec.with_leaf("", codes.spec)
    again = quantized.with_leaf("", codes_for(module, bits=3), None)
    assert again.spec.bits == 3 and torch.equal(again.mask(), module.mask())


def test_a_pruned_factor_keeps_its_mask_in_the_product():
    generator = torch.Generator().manual_seed(2)
    left, right = torch.randn(24, 16, generator=generator), torch.randn(16, 64, generator=generator)
    product = LowRankLinear.from_factors(left.bfloat16(), right.bfloat16())
    pruned = product.with_leaf("right", sparse(), None)
    assert pruned.spec.masked_leaves() == {"right"}
    leaves = pruned.leaves()
    assert torch.equal(leaves["right"].mask, sparse().mask()) and leaves["left"].mask is None
    rounded = pruned.with_leaf("right", codes_for(sparse()), None)
    assert isinstance(rounded.right, SparseLinear) and rounded.right.spec.bits == 4
    assert rounded.spec == pruned.spec.with_leaf("right", codes_for(sparse()).spec)
    assert torch.equal(rounded.leaves()["right"].mask, sparse().mask())
    assert spec_from_dict(rounded.spec.to_dict(), "here") == rounded.spec


def test_the_spec_needs_no_torch():
    code = "import sys, compress.modules.sparse_spec; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
