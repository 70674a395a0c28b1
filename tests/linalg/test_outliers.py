"""Outliers of a matrix, coarse to fine."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.linalg.outliers import WHISKER, boundary, truncated


def by_hand(weight: torch.Tensor) -> float:
    """The definition, split by split."""
    values = sorted(weight.abs().flatten().tolist())
    first, third = values[max(1, round(0.25 * len(values))) - 1], values[max(1, round(0.75 * len(values))) - 1]
    candidates = [value for value in values if value > third + WHISKER * (third - first)]
    best, found = -math.inf, math.inf
    for kept in range(1, len(candidates) + 1):
        part = torch.tensor(candidates[:kept], dtype=torch.float64)
        gap = candidates[kept] - candidates[kept - 1] if kept < len(candidates) else 0.0
        score = gap**2 - float(part.var(correction=0))
        if score > best + 1e-12:
            best, found = score, math.inf if kept == len(candidates) else candidates[kept - 1]
    return found


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), heavy=st.floats(0.5, 3.0), n=st.integers(2, 200))
def test_the_best_split_is_found(seed: int, heavy: float, n: int):
    weight = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    weight = weight.sign() * weight.abs() ** heavy
    assert boundary(weight) == pytest.approx(by_hand(weight), rel=1e-6)


def test_what_lies_far_from_the_rest_is_cut():
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    weight = weight.clamp(-2, 2)
    weight[3, 4], weight[10, 0] = 30.0, -40.0
    cut = truncated(weight)
    assert boundary(weight) <= 30.0 and float(cut.abs().max()) == boundary(weight)
    assert torch.equal(cut[weight.abs() <= 2], weight[weight.abs() <= 2])


@pytest.mark.parametrize("weight", [torch.zeros(4, 4), torch.ones(5), torch.linspace(-1, 1, 100), torch.zeros(0, 3)])
def test_without_outliers_nothing_changes(weight: torch.Tensor):
    assert boundary(weight) == math.inf and truncated(weight) is weight
