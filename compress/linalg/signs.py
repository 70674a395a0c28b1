"""Matrices of +1 and -1, eight signs to a byte.

Row by row; column j is bit j % 8 of byte j // 8, and 1 stands for +1. The bits behind the last column are 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sign_bytes(n_columns: int) -> int:
    """Bytes of a packed row."""
    return -(-n_columns // 8)


def pack_signs(positive: Tensor) -> Tensor:
    """positive bool [rows, n], True where the sign is +1 -> uint8 [rows, ceil(n / 8)]."""
    n_rows, n = positive.shape
    bits = torch.nn.functional.pad(positive.view(torch.uint8), (0, -n % 8)).view(n_rows, sign_bytes(n), 8)
    packed = torch.zeros(n_rows, sign_bytes(n), dtype=torch.uint8, device=positive.device)
    for place in range(8):
        packed |= bits[..., place] << place
    return packed


def unpack_signs(packed: Tensor, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The inverse of `pack_signs`: +1 and -1 in `dtype`, [rows, n]."""
    signs = torch.empty(*packed.shape, 8, dtype=dtype, device=packed.device)
    for place in range(8):
        signs[..., place] = (packed >> place) & 1
    return signs.flatten(1)[:, :n].mul_(2).sub_(1)
