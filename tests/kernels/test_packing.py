import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.kernels.packing import pack, unpack, unpack_entries

BITS = range(1, 9)


def random_codes(n_rows: int, n: int, bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (n_rows, n), generator=generator, dtype=torch.uint8)


@given(st.integers(1, 5), st.integers(1, 130), st.sampled_from(BITS), st.integers(0, 99))
@settings(max_examples=200, deadline=None)
def test_unpack_inverts_pack(n_rows, n, bits, seed):
    codes = random_codes(n_rows, n, bits, seed)
    words = pack(codes, bits)
    assert words.shape == (n_rows, -(-n * bits // 32))
    assert torch.equal(unpack(words, bits, n), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 31), (2, 33), (7, 64), (5, 100)])
def test_words_are_those_of_compressed_tensors(bits, shape):
    package = pytest.importorskip("compressed_tensors.compressors.pack_quantized")
    codes = random_codes(*shape, bits)
    signed = (codes.int() - 2 ** (bits - 1)).to(torch.int8)
    words = package.pack_to_int32(signed, bits)
    assert torch.equal(pack(codes, bits), words)
    assert torch.equal(package.unpack_from_int32(pack(codes, bits), bits, torch.Size(shape)), signed)
    along_rows = package.pack_to_int32(signed, bits, packed_dim=0)
    assert torch.equal(pack(codes.T, bits).T, along_rows)


@pytest.mark.parametrize("bits", BITS)
def test_one_stream_per_row_low_bits_first(bits):
    codes = random_codes(3, 41, bits)
    for row, words in zip(codes.tolist(), pack(codes, bits).tolist(), strict=True):
        stream = sum(code << (i * bits) for i, code in enumerate(row))
        assert [stream >> (32 * i) & 0xFFFFFFFF for i in range(len(words))] == [word & 0xFFFFFFFF for word in words]


@pytest.mark.parametrize("bits", BITS)
def test_entries_are_read_without_unpacking_the_rest(bits):
    codes = random_codes(67, 5, bits)
    index = torch.tensor([66, 0, 31, 32, 10, 10])
    assert torch.equal(unpack_entries(pack(codes.T, bits).T, bits, index), codes[index])


def test_strides_and_chunks_change_nothing(monkeypatch):
    codes = random_codes(40, 30, 3)
    words = pack(codes, 3)
    monkeypatch.setattr("compress.kernels.packing.CHUNK", 64)
    assert torch.equal(pack(codes.T.contiguous().T, 3), words)
    assert torch.equal(unpack(words.T.contiguous().T, 3, 30), codes)
    assert unpack(words[:0], 3, 30).shape == (0, 30)
