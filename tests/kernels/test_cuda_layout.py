"""The layout of packed weights on GPUs: one function builds it, one inverts it, and both agree with its description."""

from __future__ import annotations

import pytest
import torch

from compress.errors import RecipeError
from compress.kernels.cuda import gpus
from compress.kernels.cuda.layout import CudaLayout, pack_left, pack_weight, read_left, read_weight, refused
from compress.kernels.cuda.ops import cuda_layout, packed_on_gpu, read_on_gpu
from compress.kernels.packed_layout import Layout

GROUPS = [(32, 32), (32, 96), (64, 192), (128, 256), (-1, 200), (-1, 77)]  # group, inputs


def problem(n_out, n_in, bits, group, symmetric, dtype, seed=0):
    """Codes, scale, zero points."""
    generator = torch.Generator().manual_seed(seed)
    n_groups = 1 if group == -1 else n_in // group
    codes = torch.randint(0, 2**bits, (n_out, n_in), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(n_out, n_groups, generator=generator) * 0.02 + 0.01).to(dtype)
    zeros = torch.randint(0, 2**bits, (n_out, n_groups), generator=generator, dtype=torch.uint8)
    return codes, scale, None if symmetric else zeros


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_reading_gives_back_what_was_packed(bits, symmetric):
    for group, n_in in GROUPS:
        codes, scale, zeros = problem(70, n_in, bits, group, symmetric, torch.bfloat16)
        buffer, layout = pack_weight(codes, scale, zeros, bits, group)
        found, found_scale, found_zeros = read_weight(buffer, layout)
        shift = 2 ** (layout.bits - 1) - 2 ** (bits - 1) if symmetric else 0  # the zero point is the middle code
        assert torch.equal(found - shift, codes)
        assert torch.equal(found_scale, scale)
        assert zeros is None or torch.equal(found_zeros, zeros)
        assert buffer.numel() == layout.n_bytes


@pytest.mark.parametrize(("bits", "disk_bits"), [(8, 5), (2, 1), (4, 4)])
def test_any_common_zero_point_is_moved_to_the_middle(bits, disk_bits):
    layout = Layout(bits, 64, 3, 128, 2 ** (disk_bits - 1), 1)
    codes, scale, _ = problem(3, 128, disk_bits, 64, True, torch.bfloat16)
    buffer = packed_on_gpu(codes, scale, None, layout)
    found, _, zeros = read_on_gpu(buffer, layout)
    assert torch.equal(found, codes) and zeros is None and buffer.numel() == cuda_layout(layout).n_bytes


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_code_lies_where_the_description_says(bits):
    """Written down a second time, from the comment in cuda/layout.h: every lane, step, pair and half of a block."""
    codes = torch.randint(0, 2**bits, (128, 128), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    buffer, layout = pack_weight(codes, torch.ones(128, 1).half(), None, bits, -1)
    words = buffer[: layout.code_bytes].view(torch.int32).view(2, 2, bits, 32, 4).tolist()
    for lane in range(32):
        g, t = divmod(lane, 4)
        mine = [words[1][0][v][lane][c] & 0xFFFFFFFF for v in range(bits) for c in range(4)]
        for step in range(4):
            step_words = mine[step * bits : (step + 1) * bits]
            for pair in range(16):
                m, b, hi = pair // 4, pair // 2 % 2, pair % 2
                for e in range(2):
                    if bits == 3 and pair == 15:
                        code = sum((step_words[i] >> 15 + 16 * e & 1) << i for i in range(3))
                    else:
                        per_word = 5 if bits == 3 else 16 // bits
                        code = step_words[pair // per_word] >> pair % per_word * bits + 16 * e & 2**bits - 1
                    row = 64 + 16 * m + 8 * hi + g
                    column = 32 * (step // 2) + 8 * t + 4 * (step % 2) + 2 * b + e
                    assert code == codes[row, column], (lane, step, pair, e)


@pytest.mark.parametrize(("n_out", "rank"), [(64, 64), (70, 8), (1, 130)])
def test_left_factors_come_back(n_out, rank):
    left = torch.randn(n_out, rank, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(read_left(pack_left(left), n_out, rank), left)


def test_what_has_no_kernel_is_refused_by_name():
    assert refused(4, 128, 256, torch.float16) is None
    assert "float32" in refused(4, 128, 256, torch.float32)
    assert "48" in refused(4, 48, 96, torch.float16)
    assert "divide" in refused(4, 64, 100, torch.float16)
    assert "9" in refused(9, 64, 128, torch.float16)
    with pytest.raises(RecipeError, match="group_size=16"):
        pack_weight(torch.zeros(4, 64), torch.ones(4, 4).half(), None, 4, 16)


def test_bytes_are_the_codes_and_their_scales():
    layout = CudaLayout(4, 128, 4096, 4096, True, 2)
    assert layout.n_bytes == 4096 * 4096 // 2 + 4096 * 32 * 2
    assert CudaLayout(3, 128, 4096, 4096, False, 2).n_bytes == 4096 * 4096 * 3 // 8 + 4096 * 32 * 3


def test_the_table_covers_every_number_of_tokens_and_unknown_gpus():
    choice = gpus.choice("a GPU that nobody knows")
    assert [choice.path(n) for n in (0, 1, 16, 17, 64, 65, 10**6)] == [
        "decode", "decode", "decode", "tensor", "tensor", "dequantize", "dequantize",
    ]  # fmt: skip
    assert all(entry.decode <= gpus.DECODE_TOKENS for entry in gpus.CHOICES.values())
    for rows, inputs in ((1, 1), (64, 64), (224, 64), (64, 224), (2000, 3)):
        for path in ("decode", "tensor"):
            parts = gpus.splits(rows, inputs, 132, path, choice)
            assert 1 <= parts <= min(64, max(1, inputs // 4))
            blocks, places = (rows, 4 * 132) if path == "decode" else (-(-rows // 4), 132)
            assert parts == 1 or parts * blocks <= places


def test_a_gpu_on_which_nothing_ran_is_asked_for(monkeypatch):
    monkeypatch.delenv("COMPRESS_CUDA_KERNELS", raising=False)
    assert "gpu_check" in gpus.unusable("a GPU that nobody knows", (9, 0))
    assert all(gpus.unusable(name, (8, 0)) is None for name in gpus.VERIFIED)
    monkeypatch.setenv("COMPRESS_CUDA_KERNELS", "1")
    assert gpus.unusable("a GPU that nobody knows", (9, 0)) is None
    assert "8.0" in gpus.unusable("an old one", (7, 5))
    monkeypatch.setenv("COMPRESS_CUDA_KERNELS", "0")
    assert gpus.unusable("a GPU that nobody knows", (9, 0)) is not None
