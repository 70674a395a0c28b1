"""Pruned weights and low-rank pairs beside torch's dense product, all in bfloat16, in turns in one process.

    python scripts/bench_pruned.py [--shape 4096x4096] [--tokens 1 4 16 …] [--threads 1] [--cpu-time]

Of the weights one half is kept, two of four or anywhere, or a quarter as two factors. Weights are in as many copies as take
--megabytes together. Shown are microseconds of torch's product, and how many times as quick ours is: medians over rounds of
ratios within a round.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import torch
from measure import commit, machine
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package beside this script, installed or not

from compress.kernels import native
from compress.kernels.low_rank import low_rank_linear
from compress.kernels.sparse import kept_entries, pack_positions, sparse_linear

TURN = 0.04  # seconds of a turn, about
GF = 1e11  # operations per second, about: how many calls a turn has
Run = Callable[[int], object]


def contenders(out: int, n: int, tokens: int, nbytes: int) -> dict[str, tuple[int, Run]]:
    """By name: how many copies there are, and a call with one of them."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out, n, generator=generator).bfloat16()
    x = torch.randn(tokens, n, generator=generator).bfloat16()

    def copies(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
        count = max(2, -(-nbytes // sum(t.nbytes for t in tensors)))
        return [tuple(t.clone() for t in tensors) for _ in range(count)]

    dense = copies(weight)
    found: dict[str, tuple[int, Run]] = {"torch": (len(dense), lambda i: functional.linear(x, dense[i][0]))}
    for name, kept, of in (("2:4", 2, 4), ("anywhere", 0, 0)):
        scores = torch.rand(out, n, generator=generator)
        mask = scores.unflatten(1, (-1, 4)).argsort(-1).argsort(-1).lt(2).flatten(1) if of else scores < 0.5
        held = copies(kept_entries(weight, mask, kept, of), pack_positions(mask, kept, of))

        def run(i: int, held: list[tuple[Tensor, ...]] = held, kept: int = kept, of: int = of) -> object:
            values, positions = held[i]
            return sparse_linear(x, values, positions, None, None, 0, kept, of, n)

        found[name] = (len(held), run)
    rank = max(1, out * n // (out + n) // 4)
    pairs = copies(weight[:, :rank].contiguous(), weight[:rank].contiguous())
    found["low rank"] = (len(pairs), lambda i: low_rank_linear(x, *pairs[i]))
    return found


def turn(run: Run, copies: int, calls: int, clock: Callable[[], float]) -> float:
    """Seconds of a call."""
    run(0)
    start = clock()
    for call in range(calls):
        run(call % copies)
    return (clock() - start) / calls


def measured(shape: Sequence[int], tokens: int, rounds: int, nbytes: int, clock: Callable[[], float]) -> list[float]:
    """Microseconds of torch, then the ratios of the others."""
    out, n = shape
    everyone = contenders(out, n, tokens, nbytes)
    calls = max(3, int(TURN * GF / (2 * tokens * out * n)))
    times: dict[str, list[float]] = {name: [] for name in everyone}
    for number in range(rounds):
        for name in list(everyone) if number % 2 else reversed(everyone):
            copies, run = everyone[name]
            times[name].append(turn(partial(run), copies, min(calls, 50), clock))
    ratios = [
        median(a / b for a, b in zip(times["torch"], times[name], strict=True)) for name in everyone if name != "torch"
    ]
    return [1e6 * median(times["torch"]), *ratios]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="4096x4096", help="OUTxIN [default: 4096x4096]")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 8, 16, 32, 64])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=128, help="of copies of each weight [default: 128]")
    parser.add_argument("--cpu-time", action="store_true", help="at one thread: for a busy machine")
    given = parser.parse_args()
    shape = [int(part) for part in given.shape.split("x")]
    print(f"{machine()}, commit {commit()}, {native.current_isa()}, {given.shape}")
    print("| threads | tokens | torch, us | 2:4 | anywhere | low rank |\n|--:|--:|--:|--:|--:|--:|", flush=True)
    for threads in given.threads:
        torch.set_num_threads(threads)
        clock = time.process_time if given.cpu_time and threads == 1 else time.perf_counter
        with torch.inference_mode():
            for tokens in given.tokens:
                us, *ratios = measured(shape, tokens, given.rounds, given.megabytes << 20, clock)
                print(
                    f"| {threads} | {tokens} | {us:.0f} | " + " | ".join(f"{r:.2f}" for r in ratios) + " |", flush=True
                )


if __name__ == "__main__":
    main()
