"""What a method may ask to know about the inputs of a site.

A *request* says what is wanted and what it costs, and is known in the plan. An *accumulator* gathers it while the
calibration tokens stream by, batch by batch, in constant memory. Sums and maxima merge over processes by addition
and maximum. Everything is float32: a float32 sum of 1M terms keeps about 4 digits, enough for a curvature matrix whose
own sampling error is larger; second moments of more tokens than that are summed in float64.

    SecondMoment   sum_t x_t x_t^T                       [in, in]
    CrossMoment    sum_t (x~_t - x_t) x_t^T              [in, in]    x~: the input that the original model has there
    SquareSum      sum_t x_t^2, the diagonal of SecondMoment                    [in]
    AbsMean        mean_t |x_t|                          [in]
    AbsMax         max_t |x_t|                           [in]
    Sample(n)      n of the inputs, chosen by a seeded draw over all tokens      [n, in]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compress.errors import NumericsError
from compress.linalg.finite import all_finite

FLOAT64_TOKENS = 1_000_000  # above this many tokens a float32 sum loses more digits than damping forgives
MOMENT_TILE = 256  # columns of a tile of X^T X: as fast as wide ones from here on, and skips most of the mirrored half


@dataclass(frozen=True)
class Request:
    """One statistic of a site's input. Subclasses say what it costs; `needs_original` adds the original model's stream.

    `what`: its name in messages. `linear`: what it is of T x follows from what it is of x (`mapped`); others cannot be had for
    a leaf inside a module.
    """

    what: ClassVar[str] = "a statistic"
    needs_original: ClassVar[bool] = False
    linear: ClassVar[bool] = False

    def mapped(self, value: Tensor, input_map: Tensor) -> Tensor:
        """This statistic of T x, T = `input_map` [n, in_features], from its `value` for x."""
        raise NotImplementedError

    def nbytes(self, in_features: int) -> int:
        """Bytes held while the site is being calibrated."""
        raise NotImplementedError

    def flops(self, in_features: int) -> int:
        """Floating-point operations per token."""
        return 2 * in_features

    def start(self, in_features: int, n_tokens: int, generator: torch.Generator) -> Accumulator:
        """An empty accumulator. `n_tokens` is the number of tokens expected, at most."""
        raise NotImplementedError


class Accumulator:
    """Gathers one statistic. `add` takes inputs [tokens, in_features] (and the original's, where requested)."""

    def add(self, x: Tensor, original: Tensor | None = None) -> None:
        raise NotImplementedError

    def result(self) -> Tensor:
        raise NotImplementedError


def _congruent(moment: Tensor, input_map: Tensor) -> Tensor:
    """T M T^T."""
    return input_map.to(moment.dtype) @ moment @ input_map.to(moment.dtype).T


@dataclass(frozen=True)
class SecondMoment(Request):
    what: ClassVar[str] = "the second moment"
    linear: ClassVar[bool] = True

    def mapped(self, value: Tensor, input_map: Tensor) -> Tensor:
        return _congruent(value, input_map)

    def nbytes(self, in_features: int) -> int:
        return 4 * in_features * in_features

    def flops(self, in_features: int) -> int:
        return in_features * in_features + in_features * min(in_features, MOMENT_TILE)  # upper tiles only

    def start(self, in_features: int, n_tokens: int, generator: torch.Generator) -> Accumulator:
        return _SecondMoment(in_features, n_tokens)


@dataclass(frozen=True)
class CrossMoment(Request):
    what: ClassVar[str] = "the cross moment"
    needs_original: ClassVar[bool] = True
    linear: ClassVar[bool] = True

    def mapped(self, value: Tensor, input_map: Tensor) -> Tensor:
        return _congruent(value, input_map)

    def nbytes(self, in_features: int) -> int:
        return 4 * in_features * in_features

    def flops(self, in_features: int) -> int:
        return 2 * in_features * in_features

    def start(self, in_features: int, n_tokens: int, generator: torch.Generator) -> Accumulator:
        return _CrossMoment(in_features, n_tokens)


@dataclass(frozen=True)
class SquareSum(Request):
    what: ClassVar[str] = "the sum of squares"

    def nbytes(self, in_features: int) -> int:
        return 8 * in_features

    def start(self, in_features: int, n_tokens: int, generator: torch.Generator) -> Accumulator:
        return _SquareSum(in_features)


@dataclass(frozen=True)
class AbsMean(Request):
    what: ClassVar[str] = "the mean size"

    def nbytes(self, in_features: int) -> int:
        return 8 * in_features

    def start(self, in_features: int, n_tokens: int, generator: torch.Generator) -> Accumulator:
        return _AbsMean(in_features)


@dataclass(frozen=True)
class AbsMax(Request):
    what: ClassVar[str] = "the largest size"

    def nbytes(self, in_features: int) -> int:
        return 4 * in_features

    def start(self, in_features: int, n_tokens: int, generator: torch.Generator) -> Accumulator:
        return _AbsMax(in_features)


@dataclass(frozen=True)
class Sample(Request):
    """`n` input rows drawn without replacement, uniformly over all tokens of the site (reservoir, seeded)."""

    n: int

    what: ClassVar[str] = "a sample"
    linear: ClassVar[bool] = True

    def mapped(self, value: Tensor, input_map: Tensor) -> Tensor:
        return value @ input_map.T

    def nbytes(self, in_features: int) -> int:
        return 4 * self.n * in_features

    def start(self, in_features: int, n_tokens: int, generator: torch.Generator) -> Accumulator:
        return _Sample(self.n, in_features, generator)


@dataclass
class SiteStatistics:
    """What was gathered at one site: the number of tokens seen and one tensor per request."""

    n_tokens: int
    values: dict[Request, Tensor]

    def __getitem__(self, request: Request) -> Tensor:
        return self.values[request]

    @classmethod
    def usable(cls, statistics: SiteStatistics | None, where: str) -> SiteStatistics | None:
        """`statistics`, checked; None where no token was seen. Raises: NumericsError as `require_finite`."""
        if statistics is None or not statistics.n_tokens:
            return None
        statistics.require_finite(where)
        return statistics

    def require_finite(self, where: str) -> None:
        """Raises: NumericsError naming `where` (layers and step) if any value holds NaN or infinity."""
        for request, value in self.values.items():
            if not all_finite(value):
                raise NumericsError(
                    f"{where}: {request.what} of the inputs holds NaN or infinity: activations overflow or weights hold NaN; "
                    f"try calibration.dtype=float32, or check the checkpoint with: compress inspect"
                )

    def mapped(self, input_map: Tensor | None) -> SiteStatistics:
        """Those of T x, T = `input_map` [n, in_features]; of x itself where it is None."""
        if input_map is None:
            return self
        return SiteStatistics(self.n_tokens, {r: r.mapped(value, input_map) for r, value in self.values.items()})


class _SecondMoment(Accumulator):
    def __init__(self, in_features: int, n_tokens: int):
        dtype = torch.float64 if n_tokens > FLOAT64_TOKENS else torch.float32
        self.total = torch.zeros(in_features, in_features, dtype=dtype)

    def add(self, x: Tensor, original: Tensor | None = None) -> None:
        if self.total.device != x.device:
            self.total = self.total.to(x.device)
        for start in range(0, x.shape[1], MOMENT_TILE):  # the upper tiles; `result` mirrors them
            tile = x[:, start : start + MOMENT_TILE].T
            out = self.total[start : start + MOMENT_TILE, start:]
            if self.total.dtype == x.dtype:
                out.addmm_(tile, x[:, start:])
            else:
                out.add_(tile @ x[:, start:])

    def result(self) -> Tensor:
        for start in range(0, len(self.total), MOMENT_TILE):  # in place: the matrix can be larger than its block
            stop = start + MOMENT_TILE
            square = self.total[start:stop, start:stop]
            square.copy_(square.triu() + square.triu(1).T)
            self.total[stop:, start:stop] = self.total[start:stop, stop:].T
        return self.total


class _CrossMoment(Accumulator):
    def __init__(self, in_features: int, n_tokens: int):
        dtype = torch.float64 if n_tokens > FLOAT64_TOKENS else torch.float32
        self.total = torch.zeros(in_features, in_features, dtype=dtype)

    def add(self, x: Tensor, original: Tensor | None = None) -> None:
        self.total = self.total.to(x.device)
        if original is not None:
            self.total.add_((original - x).T @ x)

    def result(self) -> Tensor:
        return self.total


class _SquareSum(Accumulator):
    def __init__(self, in_features: int):
        self.total = torch.zeros(in_features, dtype=torch.float64)

    def add(self, x: Tensor, original: Tensor | None = None) -> None:
        self.total = self.total.to(x.device) + x.square().sum(0, dtype=torch.float64)

    def result(self) -> Tensor:
        return self.total.float()


class _AbsMean(Accumulator):
    def __init__(self, in_features: int):
        self.total = torch.zeros(in_features, dtype=torch.float64)
        self.count = 0

    def add(self, x: Tensor, original: Tensor | None = None) -> None:
        self.total = self.total.to(x.device) + x.abs().sum(0, dtype=torch.float64)
        self.count += x.shape[0]

    def result(self) -> Tensor:
        return (self.total / max(self.count, 1)).float()


class _AbsMax(Accumulator):
    def __init__(self, in_features: int):
        self.largest = torch.zeros(in_features)

    def add(self, x: Tensor, original: Tensor | None = None) -> None:
        if x.shape[0]:
            self.largest = torch.maximum(self.largest.to(x.device), x.abs().amax(0))

    def result(self) -> Tensor:
        return self.largest


class _Sample(Accumulator):
    """Keeps the n rows with the smallest of seeded uniform keys, so the draw does not depend on the batch split."""

    def __init__(self, n: int, in_features: int, generator: torch.Generator):
        self.n, self.generator = n, generator
        self.rows = torch.empty(0, in_features)
        self.keys = torch.empty(0, dtype=torch.float64)

    def add(self, x: Tensor, original: Tensor | None = None) -> None:
        keys = torch.rand(x.shape[0], generator=self.generator, dtype=torch.float64)
        keys = torch.cat([self.keys, keys])
        rows = torch.cat([self.rows.to(x.device), x])
        if keys.numel() > self.n:
            kept = keys.topk(self.n, largest=False).indices.sort().values
            keys, rows = keys[kept], rows[kept.to(x.device)]
        self.keys, self.rows = keys, rows

    def result(self) -> Tensor:
        return self.rows


def gather(
    requests: tuple[Request, ...], in_features: int, n_tokens: int, generator: torch.Generator
) -> StatisticsGatherer:
    """Accumulators for `requests` at one site, started."""
    return StatisticsGatherer({r: r.start(in_features, n_tokens, generator) for r in requests})


class StatisticsGatherer:
    """Feeds one site's inputs to its accumulators and counts tokens."""

    def __init__(self, accumulators: dict[Request, Accumulator]):
        self.accumulators = accumulators
        self.n_tokens = 0

    def add(self, x: Tensor, original: Tensor | None = None) -> None:
        """x: [tokens, in_features] in any float dtype; `original` has the same tokens in the original model.

        None where nothing is compressed yet (`SiteMethod.observe`): they are x itself.
        """
        x = x.float()
        original = None if original is None else original.float()
        self.n_tokens += x.shape[0]
        for accumulator in self.accumulators.values():
            accumulator.add(x, original)

    def result(self, where: str) -> SiteStatistics:
        """Raises: NumericsError naming `where` if anything gathered is not finite."""
        values = {request: accumulator.result() for request, accumulator in self.accumulators.items()}
        statistics = SiteStatistics(self.n_tokens, values)
        statistics.require_finite(where)
        return statistics
