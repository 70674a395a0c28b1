"""How long factorizing the linears of one block takes, beside the LAPACK calls that it cannot do without; and how fast the
factors run.

    python scripts/bench_svd.py                  # a block of Llama 3 8B: 4096, 14336, 1024
    python scripts/bench_svd.py --scale 4        # a fourth of each: a minute
    python scripts/bench_svd.py --papers         # beside Cholesky, inverse and singular value decomposition, too
    python scripts/bench_svd.py --decode         # one token through 4096 x 4096 at half the numbers, one thread
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measure import commit, machine
from torch import Tensor, nn

from compress.linalg.low_rank import decompose, factors
from compress.linalg.ranks import uniform_rank
from compress.modules.low_rank import LowRankLinear

HIDDEN, INNER, GROUPED = 4096, 14336, 1024  # of Llama 3 8B
LINEARS = {  # name -> (out, in)
    "q": (HIDDEN, HIDDEN), "k": (GROUPED, HIDDEN), "v": (GROUPED, HIDDEN), "o": (HIDDEN, HIDDEN),
    "gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER),
}  # fmt: skip
KEEP_RATIO = 0.8
DECODE_SECONDS = 3.0  # of each of the two, in turns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=int, default=1, help="divide all widths by it")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--papers", action="store_true", help="time the papers' route, too")
    parser.add_argument("--decode", action="store_true", help="time one token through the factors instead")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    print(f"{machine()}, {asked.threads} threads, torch {torch.__version__}, commit {commit()}")
    if asked.decode:
        decode()
    else:
        factorize(asked.scale, asked.papers)


def factorize(scale: int, papers: bool) -> None:
    """Print a row for each linear: seconds, and how much loss differs from what LAPACK's singular values say."""
    print("| linear | eigh, qr | and products | ours | ours / all needed | papers | loss, ours / papers |")
    print("|---|---|---|---|---|---|---|")
    totals = [0.0] * 4
    for name, (out, n) in LINEARS.items():
        weight, moment = problem(out // scale, n // scale)
        rank = rank_of(weight)
        lapack, products = bare(weight, moment)
        ours, found = timed(partial(truncated, weight, moment, rank))
        theirs, ratio = 0.0, "–"
        if papers:
            theirs, loss = timed(partial(reference_loss, weight, moment, rank))
            ratio = f"{found / loss:.9f}"
        row = (lapack, lapack + products, ours, theirs)
        totals = [total + seconds for total, seconds in zip(totals, row, strict=True)]
        print_row(f"{name} {out // scale} x {n // scale}", row, ratio)
    print_row("all", tuple(totals), "")


def print_row(name: str, row: tuple[float, ...], ratio: str) -> None:
    lapack, needed, ours, theirs = row
    print(
        f"| {name} | {lapack:.2f} s | {needed:.2f} s | {ours:.2f} s | {ours / needed:.2f} | "
        f"{f'{theirs:.2f} s' if theirs else '–'} | {ratio} |",
        flush=True,
    )


def problem(out: int, n: int) -> tuple[Tensor, Tensor]:
    """A weight, and a second moment of inputs of unequal size that share directions."""
    generator = torch.Generator().manual_seed(out + n)
    shared = torch.randn(n, 64, generator=generator)
    size = torch.rand(n, generator=generator) * 3 + 0.1
    moment = (shared @ shared.T + 20 * torch.eye(n)) * size * size[:, None]
    return torch.randn(out, n, generator=generator) * 0.02, moment


def rank_of(weight: Tensor) -> int:
    out, n = weight.shape
    return uniform_rank(out, n, KEEP_RATIO)


def truncated(weight: Tensor, moment: Tensor, rank: int) -> float:
    found = decompose(weight, rank, moment)
    left, right = factors(weight, found.basis)
    left.to(torch.bfloat16), right.to(torch.bfloat16)
    return found.loss


def bare(weight: Tensor, moment: Tensor) -> tuple[float, float]:
    """Seconds of LAPACK's calls on the smaller side, and of the products that make G and the right factor."""
    lapack = products = 0.0
    core, moment64 = weight.double(), moment.double()
    outer = None
    if weight.shape[0] > weight.shape[1]:
        lapack, (outer, core) = timed(lambda: torch.linalg.qr(weight.double()))
    seconds, gram = timed(lambda: core @ moment64 @ core.T)
    products += seconds
    seconds, (_, vectors) = timed(lambda: torch.linalg.eigh(gram))
    lapack += seconds
    basis = vectors[:, -rank_of(weight) :]
    if outer is not None:
        seconds, basis = timed(lambda: outer @ basis)
        products += seconds
    seconds, _ = timed(lambda: basis.T @ weight.double())
    return lapack, products + seconds


def reference_loss(weight: Tensor, moment: Tensor, rank: int) -> float:
    """The public code's way, in float64: Cholesky, singular values of W S, and an inverse."""
    factor = torch.linalg.cholesky(moment.double())
    u, s, vt = torch.linalg.svd(weight.double() @ factor, full_matrices=False)
    (u[:, :rank] * s[:rank].sqrt()), s[:rank].sqrt()[:, None] * vt[:rank] @ torch.linalg.inv(factor)
    return float(s[rank:].square().sum())


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    done = work()
    return time.perf_counter() - start, done


def decode() -> None:
    """Print how long one token takes through a dense linear and through its factors, the best of many, in turns."""
    dense = nn.Linear(HIDDEN, HIDDEN, bias=False)
    rank = HIDDEN // 4
    low_rank = LowRankLinear.from_factors(torch.randn(HIDDEN, rank), torch.randn(rank, HIDDEN))
    x = torch.randn(1, HIDDEN)
    best = {"dense": float("inf"), "factors": float("inf")}
    until = time.perf_counter() + 2 * DECODE_SECONDS
    with torch.no_grad():
        while time.perf_counter() < until:
            for name, module in (("dense", dense), ("factors", low_rank)):
                seconds, _ = timed(partial(module, x))
                best[name] = min(best[name], seconds)
    print(
        f"one token, {HIDDEN} x {HIDDEN}, float32: dense {1e3 * best['dense']:.3f} ms, rank {rank} "
        f"{1e3 * best['factors']:.3f} ms, {best['dense'] / best['factors']:.2f} times as fast"
    )


if __name__ == "__main__":
    main()
