"""What is stored in 8 bits per singular vector runs, loads, and weighs what its ratio says."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from compress.errors import CheckpointError
from compress.linalg.remap import remap
from compress.modules.remapped import RemappedLinear
from compress.modules.remapped_spec import RemappedSpec
from compress.modules.spec import spec_from_dict

SHAPES = [(96, 64), (64, 96), (64, 64)]
shapes = pytest.mark.parametrize("shape", SHAPES)


def module(shape: tuple[int, int], rank: int = 20, dtype=torch.float32, bias: bool = False) -> RemappedLinear:
    generator = torch.Generator().manual_seed(0)
    out_features, in_features = shape
    left, right = (torch.randn(s, generator=generator) for s in ((out_features, rank), (rank, in_features)))
    stored = remap(left, right, dtype)
    if bias:
        stored["bias"] = torch.randn(out_features, generator=generator).to(dtype)
    return RemappedLinear(RemappedSpec(in_features, out_features, rank), stored)


@shapes
@pytest.mark.parametrize("rank", [1, 20, 64])
def test_bytes_are_two_for_each_of_the_longer_side_and_four_for_scales(shape, rank):
    spec = RemappedSpec(shape[1], shape[0], rank)
    assert spec.nbytes("BF16") == 2 * max(shape) * rank + 4 * rank
    found = module(shape, rank, torch.bfloat16)
    assert found.nbytes == spec.nbytes("BF16")
    assert {n: (tuple(t.shape)) for n, t in found.stored().items()} == {
        n: s for n, (_, s) in spec.tensors("BF16").items()
    }
    assert ("rest" in found.stored()) == (shape[0] != shape[1])


@shapes
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rank", [20, 60])  # two thin products, or one
def test_forward_is_that_of_the_dense_weight_held_or_not(shape, bias, rank):
    linear = module(shape, rank, bias=bias)
    assert linear.spec.thin == (rank == 20)
    x = torch.randn(2, 5, shape[1], generator=torch.Generator().manual_seed(1))
    expected = torch.nn.functional.linear(x, linear.dense(), linear.bias)
    torch.testing.assert_close(linear(x), expected, rtol=1e-4, atol=1e-3)
    linear.hold(torch.float32)
    torch.testing.assert_close(linear(x), expected, rtol=1e-4, atol=1e-3)
    linear.release()
    assert linear.held is None and (linear.leaves()[""].weight == linear.dense()).all()


@shapes
def test_an_empty_one_is_filled_by_a_loader(shape):
    linear = module(shape, dtype=torch.bfloat16, bias=True)
    empty = RemappedLinear.from_spec(linear.spec, True, torch.bfloat16, "cpu")
    empty.load_state_dict(linear.state_dict())
    assert (empty.dense() == linear.dense()).all() and empty.left_code.dtype == torch.int8
    assert RemappedLinear.from_spec(linear.spec, False, torch.bfloat16).left_code.is_meta
    assert empty.to(torch.float32).left_code.dtype == torch.int8


def test_survives_a_dictionary():
    spec = RemappedSpec(64, 96, 20)
    assert spec_from_dict(spec.to_dict(), "here") == spec


@pytest.mark.parametrize(
    "change", [{"rank": 0}, {"rank": 65}, {"rank": 2.0}, {"in_features": 0}, {"out_features": 2**40}, {"bits": 8}]
)
def test_impossible_numbers_are_refused(change):
    with pytest.raises(CheckpointError, match=r"^here: "):
        spec_from_dict({**RemappedSpec(64, 96, 20).to_dict(), **change}, "here")


def test_needs_no_torch():
    code = "import sys, compress.modules.remapped_spec; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
