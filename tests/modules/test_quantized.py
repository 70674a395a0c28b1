import copy
import pickle

import pytest
import torch
from torch.nn import functional

from compress.checkpoint.reader import SAFETENSORS_DTYPES
from compress.modules.quantized import QuantizedEmbedding, QuantizedLinear, QuantizedModule
from compress.modules.quantized_spec import QuantizedSpec

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def parts(bits=4, group_size=16, symmetric=True, out=24, n=48, dtype=torch.float32, kind="linear"):
    generator = torch.Generator().manual_seed(bits)
    spec = QuantizedSpec(n, out, bits, group_size, symmetric, kind)
    codes = torch.randint(0, 2**bits, (out, n), generator=generator)
    scale = torch.rand(out, spec.n_groups, generator=generator).to(dtype)
    zero = None if symmetric else torch.randint(0, 2**bits, scale.shape, generator=generator)
    return codes, scale, zero, spec


def module(**kwargs) -> QuantizedModule:
    return QuantizedModule.from_codes(*parts(**kwargs))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("group_size", [16, -1, 48])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_is_what_compressed_tensors_decodes(bits, group_size, symmetric, dtype):
    package = pytest.importorskip("compressed_tensors.compressors.pack_quantized")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    codes, scale, zero, spec = parts(bits, group_size, symmetric, dtype=dtype)
    m = QuantizedLinear.from_codes(codes, scale, zero, spec)
    args = {"strategy": "channel"} if group_size == -1 else {"strategy": "group", "group_size": group_size}
    scheme = QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(num_bits=bits, symmetric=symmetric, **args)
    )
    theirs = package.PackedQuantizationCompressor.decompress(m.stored(), scheme)["weight"]
    assert theirs.dtype == m.dense().dtype == dtype
    assert torch.equal(m.dense(), theirs)
    assert torch.equal(m.codes(), codes.to(torch.uint8))
    assert zero is None or torch.equal(m.zero_points(), zero.to(torch.uint8))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_stored_tensors_and_bytes_are_those_of_the_spec(symmetric, kind):
    for bits in (2, 3, 5, 8):
        m = module(bits=bits, symmetric=symmetric, kind=kind, dtype=torch.bfloat16, out=21)
        found = {n: (SAFETENSORS_DTYPES[t.dtype], tuple(t.shape)) for n, t in m.stored().items()}
        assert found == m.spec.tensors("BF16")
        assert m.nbytes == m.spec.nbytes("BF16")
        assert m.stored()["weight_shape"].tolist() == [21, 48]


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_from_spec_can_be_filled(kind):
    m = module(symmetric=False, kind=kind)
    empty = QuantizedModule.from_spec(m.spec, False, torch.float32, "meta")
    assert type(empty) is type(m) is (QuantizedEmbedding if kind == "embedding" else QuantizedLinear)
    empty.load_state_dict(m.stored(), assign=True)
    assert torch.equal(empty.dense(), m.dense())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_table_looks_up_rows_of_dense(dtype, symmetric):
    m = module(symmetric=symmetric, kind="embedding", dtype=dtype, bits=3, out=100)
    ids = torch.tensor([[5, 99, 0], [5, 31, 32]])
    assert torch.equal(m(ids), functional.embedding(ids, m.dense()))
    m.hold(dtype)
    assert torch.equal(m(ids), functional.embedding(ids, m.dense()))
    m.release()
    with pytest.raises(IndexError):
        m(torch.tensor([100]))


def test_table_multiplies_as_gemma_does():
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    m = module(kind="embedding", dtype=torch.bfloat16)
    original = Gemma3TextScaledWordEmbedding(24, 48, 0, embed_scale=48**0.5).to(torch.bfloat16)
    original.weight.data.copy_(m.dense())
    m.adopt(original)
    ids = torch.arange(24)
    assert torch.equal(m(ids), original(ids))


def test_held_copy_changes_nothing_and_is_not_kept():
    m = module(symmetric=False)
    x = torch.randn(4, 48)
    keys = list(m.state_dict())
    expected = m(x)
    m.hold(torch.float32)
    torch.testing.assert_close(m(x), expected)
    assert list(m.state_dict()) == keys
    assert copy.deepcopy(m).held is None
    assert pickle.loads(pickle.dumps(m)).held is None
    m.to(torch.bfloat16)
    assert m.held is None
    m.hold(torch.float32)
    m.load_state_dict(m.state_dict())
    assert m.held is None


def test_casting_moves_floats_only():
    m = module(symmetric=False).half()
    assert m.weight_scale.dtype == m.dense().dtype == m.weight.dtype == torch.float16
    assert m.weight_packed.dtype == m.weight_zero_point.dtype == torch.int32
    assert m.weight_shape.dtype == torch.int64


def test_leaf_is_the_weight_in_float32():
    m = module(dtype=torch.bfloat16)
    assert torch.equal(m.leaves()[""].weight, m.dense().float())


def test_bias_is_stored_and_added():
    codes, scale, zero, spec = parts()
    bias = torch.randn(24)
    m = QuantizedLinear.from_codes(codes, scale, zero, spec, bias)
    x = torch.randn(3, 48)
    assert torch.equal(m.stored()["bias"], bias)
    torch.testing.assert_close(m(x), functional.linear(x, m.dense(), bias))
    assert m.nbytes == spec.nbytes("F32")
