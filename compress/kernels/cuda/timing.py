"""Times of the CUDA kernels beside copy bandwidth and the library's bf16 product: what is measured, and the table of it.

A time is the median over replays of a CUDA graph that calls the operation once on each of several copies of its weight,
together larger than the L2, so that every call reads from memory. Only `measure` and `copy_bandwidth` need a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch

from compress.kernels.cuda.gpus import Choice, Path

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (28672, 8192))  # [out, in]
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
WAVES: dict[Path, tuple[int, ...]] = {"decode": (1, 2, 3, 4, 6, 8), "tensor": (1, 2, 3, 4)}  # that are tried
REPLAYS = 30
ROTATION = 4  # times the L2 that the copies of a weight take together
MOST_COPIES = 64


@dataclass(frozen=True)
class Time:
    """One operation at one size. `spread`: (90th - 10th percentile) / median. Bytes: of weights, scales, zero points."""

    n_out: int
    n_in: int
    bits: int  # 16: the library's bf16
    group: int
    tokens: int
    path: str
    microseconds: float
    spread: float
    n_bytes: int

    @property
    def gb_s(self) -> float:
        return self.n_bytes / self.microseconds / 1e3


def n_copies(n_bytes: int, l2_bytes: int) -> int:
    """Copies of a weight that do not fit the L2 together."""
    return max(2, min(MOST_COPIES, -(-ROTATION * l2_bytes // n_bytes)))


def summary(microseconds: Sequence[float]) -> tuple[float, float]:
    """Median, and spread."""
    ordered = sorted(microseconds)
    middle = median(ordered)
    low, high = ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]
    return middle, (high - low) / middle


def measure(calls: Sequence[Callable[[], object]]) -> tuple[float, float]:
    """Microseconds of one call, median and spread, when `calls` run one after the other in a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # once outside: modules are loaded, workspaces exist
        for call in calls:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    times = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return summary(times)


def copy_bandwidth(n_bytes: int = 1 << 30) -> float:
    """GB/s of a device-to-device copy, bytes read and written both counted."""
    source = torch.randint(0, 255, (n_bytes,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    microseconds, _ = measure([lambda: target.copy_(source)])
    return 2 * n_bytes / microseconds / 1e3


def dense_time(times: Sequence[Time], like: Time) -> Time | None:
    """The library's bf16 at the same size."""
    return next(
        (t for t in times if t.bits == 16 and (t.n_out, t.n_in, t.tokens) == (like.n_out, like.n_in, like.tokens)), None
    )


def best(times: Sequence[Time]) -> list[Time]:
    """Of each weight and number of tokens the quickest path, in order."""
    found: dict[tuple[int, int, int, int, int], Time] = {}
    for t in times:
        key = (t.n_out, t.n_in, t.bits, t.group, t.tokens)
        if key not in found or t.microseconds < found[key].microseconds:
            found[key] = t
    return list(found.values())


def quickest_waves(times: Mapping[tuple[Hashable, int], float]) -> int:
    """Of (case, waves) -> time: the waves with the least time, summed over all cases in units of the quickest of each."""
    cases, waves = {case for case, _ in times}, {number for _, number in times}
    least = {case: min(times[case, number] for number in waves) for case in cases}
    return min(sorted(waves), key=lambda number: sum(times[case, number] / least[case] for case in cases))


def suggested(times: Sequence[Time], waves: Choice) -> Choice:
    """The thresholds with the least time, summed over all shapes and widths in units of the quickest path of each.

    `waves`: with which the times were taken.
    """
    quickest = {(t.n_out, t.n_in, t.bits, t.group, t.tokens): t.microseconds for t in best(times)}
    measured = {(t.n_out, t.n_in, t.bits, t.group, t.tokens, t.path): t.microseconds for t in times if t.bits < 16}

    def cost(choice: Choice) -> float:
        total = 0.0
        for key, least in quickest.items():
            path: Path = choice.path(key[4])
            if key[2] < 16:
                total += measured.get((*key, path), float("inf")) / least
        return total

    options = [
        replace(waves, decode=decode, tensor=tensor)
        for decode in (0, 1, 2, 4, 8, 16)
        for tensor in (0, 16, 32, 64, 128, 256)
        if tensor >= decode
    ]
    return min(options, key=cost)


def table(times: Sequence[Time], copy_gb_s: float) -> str:
    """One line per weight and number of tokens: the quickest path, its part of the copy's bandwidth, and bf16 beside it."""
    head = ("weight", 13), ("bits", 4), ("group", 5), ("tokens", 6), ("path", 10), ("us", 9), ("spread", 6), ("GB/s", 7)
    lines = [" ".join(f"{name:>{width}}" for name, width in (*head, ("of copy", 7), ("x bf16", 6)))]
    for t in best(times):
        dense = dense_time(times, t)
        faster = f"{dense.microseconds / t.microseconds:6.2f}" if dense else "     -"
        lines.append(
            f"{f'{t.n_out}x{t.n_in}':>13} {t.bits:4} {t.group:5} {t.tokens:6} {t.path:>10} {t.microseconds:9.2f} "
            f"{t.spread:6.1%} {t.gb_s:7.0f} {t.gb_s / copy_gb_s:7.2f} {faster}"
        )
    return "\n".join(lines)


def shortfalls(times: Sequence[Time], copy_gb_s: float) -> list[str]:
    """Where the goals are missed: 0.85 of the copy and 3.6 x bf16 for 4 bits in groups of 128 to 16 tokens on large weights,
    2 and 3 bits in proportion to their bytes within 15 %, and never slower than bf16."""
    found = []
    quickest = best(times)
    for t in quickest:
        dense = dense_time(times, t)
        if t.bits == 16 or dense is None:
            continue
        name = f"{t.n_out}x{t.n_in} w{t.bits} g{t.group} {t.tokens} tokens"
        faster = dense.microseconds / t.microseconds
        if faster < 1:
            found.append(f"{name}: {faster:.2f} x bf16, slower")
        if t.tokens > 16 or t.n_out * t.n_in < 2**25:
            continue
        if t.bits == 4 and t.group == 128:
            if t.gb_s < 0.85 * copy_gb_s:
                found.append(f"{name}: {t.gb_s / copy_gb_s:.2f} of the copy, 0.85 wanted")
            if faster < 3.6:
                found.append(f"{name}: {faster:.2f} x bf16, 3.6 wanted")
        if t.bits < 4:
            four = next(
                (
                    f
                    for f in quickest
                    if (f.n_out, f.n_in, f.bits, f.group, f.tokens) == (t.n_out, t.n_in, 4, t.group, t.tokens)
                ),
                None,
            )
            if four and t.microseconds > 1.15 * four.microseconds * t.n_bytes / four.n_bytes:
                took, holds = t.microseconds / four.microseconds, t.n_bytes / four.n_bytes
                found.append(f"{name}: {took:.2f} of the time of 4 bits, {holds:.2f} of its bytes")
    return found
