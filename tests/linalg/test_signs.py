"""Signs packed and unpacked."""

from __future__ import annotations

import pytest
import torch

from compress.linalg.signs import pack_signs, sign_bytes, unpack_signs


@pytest.mark.parametrize("n", [1, 7, 8, 9, 15, 16, 17, 64, 100])
def test_packed_signs_come_back(n):
    positive = torch.rand(5, n, generator=torch.Generator().manual_seed(n)) < 0.5
    packed = pack_signs(positive)
    assert packed.dtype == torch.uint8 and packed.shape == (5, sign_bytes(n)) == (5, -(-n // 8))
    assert torch.equal(unpack_signs(packed, n) > 0, positive)
    assert set(unpack_signs(packed, n).unique().tolist()) <= {-1.0, 1.0}
    assert torch.equal(pack_signs(unpack_signs(packed, 8 * sign_bytes(n))[:, :n] > 0), packed)  # bits behind are 0


def test_the_order_of_bits_is_that_of_columns():
    assert pack_signs(torch.tensor([[True, False, False, False, False, False, False, False, True]])).tolist() == [
        [1, 1]
    ]
