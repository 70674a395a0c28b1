"""Layers with correlated inputs, as the tests of error feedback need them."""

from __future__ import annotations

import torch
from torch import Tensor


def correlated(n_rows: int, n: int, seed: int = 0, n_tokens: int | None = None) -> tuple[Tensor, Tensor]:
    """Weight [n_rows, n] and second moment [n, n] of inputs of unequal size that share directions."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=generator) / n**0.5 + torch.eye(n)
    size = torch.rand(n, generator=generator) * 2 + 0.1
    x = torch.randn(n_tokens or 4 * n, n, generator=generator) @ mix * size
    return torch.randn(n_rows, n, generator=generator) * 0.05, x.T @ x
