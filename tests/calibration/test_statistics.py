"""What is gathered batch by batch is what the whole would give."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.calibration import statistics
from compress.calibration.statistics import AbsMax, AbsMean, CrossMoment, Request, Sample, SecondMoment, gather
from compress.errors import NumericsError


def inputs(n: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    width=st.integers(1, 40),
    tile=st.sampled_from([1, 7, 16, 64]),
    seed=st.integers(0, 99),
)
def test_sums_over_batches_are_the_whole(lengths: list[int], width: int, tile: int, seed: int) -> None:
    whole, original = inputs(sum(lengths), width, seed), inputs(sum(lengths), width, seed + 1)
    requests = (SecondMoment(), CrossMoment(), AbsMean(), AbsMax())
    before, statistics.MOMENT_TILE = statistics.MOMENT_TILE, tile
    try:
        gatherer = gather(requests, width, sum(lengths), torch.Generator().manual_seed(0))
        for x, o in zip(whole.split(lengths), original.split(lengths), strict=True):
            gatherer.add(x, o)
        found = gatherer.result("site")
    finally:
        statistics.MOMENT_TILE = before
    assert found.n_tokens == sum(lengths)
    x, o = whole.double(), original.double()
    torch.testing.assert_close(found[SecondMoment()].double(), x.T @ x, rtol=1e-5, atol=1e-5)
    assert torch.equal(found[SecondMoment()], found[SecondMoment()].T)
    torch.testing.assert_close(found[CrossMoment()].double(), (o - x).T @ x, rtol=1e-5, atol=1e-5)
    if len(whole):
        torch.testing.assert_close(found[AbsMean()].double(), x.abs().mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[AbsMax()].double(), x.abs().amax(0), rtol=0, atol=0)


@pytest.mark.parametrize("split", [[100], [1] * 100, [30, 0, 70]])
def test_a_sample_does_not_depend_on_the_batches(split: list[int]) -> None:
    whole = inputs(100, 5, 3)
    gatherer = gather((Sample(10),), 5, 100, torch.Generator().manual_seed(7))
    for x in whole.split(split):
        gatherer.add(x)
    found = gatherer.result("site")[Sample(10)]
    reference = gather((Sample(10),), 5, 100, torch.Generator().manual_seed(7))
    reference.add(whole)
    assert torch.equal(found, reference.result("site")[Sample(10)])
    rows = {tuple(row.tolist()) for row in whole}
    assert len({tuple(row.tolist()) for row in found}) == 10 and all(tuple(row.tolist()) in rows for row in found)


def test_every_row_is_as_likely_to_be_sampled() -> None:
    counts = torch.zeros(20)
    whole = torch.arange(20.0)[:, None]
    for seed in range(400):
        gatherer = gather((Sample(5),), 1, 20, torch.Generator().manual_seed(seed))
        for x in whole.split([3, 17]):
            gatherer.add(x)
        counts[gatherer.result("site")[Sample(5)][:, 0].long()] += 1
    assert counts.min() > 60 and counts.max() < 145  # 100 expected, standard deviation 8.7


def test_many_tokens_are_summed_in_float64() -> None:
    gatherer = gather((SecondMoment(),), 2, statistics.FLOAT64_TOKENS + 1, torch.Generator())
    gatherer.add(torch.tensor([[1e4, 1e-3]]))
    gatherer.add(torch.tensor([[1e-3, 1e-3]]))
    assert gatherer.result("site")[SecondMoment()].dtype == torch.float64


def test_values_that_are_not_finite_name_the_site() -> None:
    gatherer = gather((SecondMoment(),), 3, 2, torch.Generator())
    gatherer.add(torch.tensor([[1.0, float("inf"), 0.0]]))
    with pytest.raises(NumericsError, match="layers.3.mlp_in"):
        gatherer.result("model.layers.3.mlp_in")


@pytest.mark.parametrize("request_", [SecondMoment(), CrossMoment(), AbsMax(), Sample(4)])
def test_bytes_announced_are_bytes_held(request_: statistics.Request) -> None:
    gatherer = gather((request_,), 16, 10, torch.Generator().manual_seed(0))
    gatherer.add(inputs(10, 16, 0), inputs(10, 16, 1))
    assert gatherer.result("site")[request_].nbytes == request_.nbytes(16)


@pytest.mark.parametrize("request_", [SecondMoment(), CrossMoment(), Sample(8)], ids=lambda r: type(r).__name__)
def test_statistics_of_a_linear_map_of_the_input_follow(request_: Request):
    generator = torch.Generator().manual_seed(0)
    x, original = (torch.randn(40, 6, generator=generator) for _ in range(2))
    input_map = torch.randn(4, 6, generator=generator)

    def gathered(*streams: torch.Tensor):
        gatherer = gather((request_,), streams[0].shape[1], 40, torch.Generator().manual_seed(1))
        gatherer.add(*streams)
        return gatherer.result("here")

    found = gathered(x, original)
    assert found.mapped(None) is found
    expected = gathered(x @ input_map.T, original @ input_map.T)
    assert found.mapped(input_map).n_tokens == expected.n_tokens
    torch.testing.assert_close(found.mapped(input_map)[request_], expected[request_], rtol=1e-5, atol=1e-5)
