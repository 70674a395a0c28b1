"""Sites as the pipeline hands them to a method."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.calibration.statistics import CrossMoment, SecondMoment, SiteStatistics
from compress.methods.base import Layer, MethodConfig, SiteTask


def layer(name: str, weight: Tensor, config: MethodConfig, **fields) -> Layer:
    return Layer(name, weight, fields.pop("bias", None), config, fields.pop("scale_dtype", torch.bfloat16), **fields)


def inputs(n_tokens: int, n: int, seed: int = 0) -> Tensor:
    """Correlated inputs [n_tokens, n] of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=generator) / n**0.5 + torch.eye(n)
    return torch.randn(n_tokens, n, generator=generator) @ mix * (torch.rand(n, generator=generator) * 2 + 0.1)


def statistics(x: Tensor, original: Tensor | None = None) -> SiteStatistics:
    values = {SecondMoment(): x.T @ x}
    if original is not None:
        values[CrossMoment()] = (original - x).T @ x
    return SiteStatistics(x.shape[0], values)


def compress(method, layers: list[Layer], stats: SiteStatistics | None):
    return method.compress(SiteTask("site", tuple(layers)), stats, torch.Generator())


def weight(n_rows: int, n: int, seed: int = 1) -> Tensor:
    return torch.randn(n_rows, n, generator=torch.Generator().manual_seed(seed)) * 0.05
