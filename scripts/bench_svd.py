"""How long factorizing the linears of one block takes (CPU seconds), beside the LAPACK calls that it cannot do without; how fast
the factors run; and what they lose beside those of the public code.

    python scripts/bench_svd.py                  # a block of Llama 3 8B: 4096, 14336, 1024
    python scripts/bench_svd.py --scale 4        # a fourth of each: a minute
    python scripts/bench_svd.py --papers         # beside Cholesky, inverse and singular value decomposition, too
    python scripts/bench_svd.py --decode         # one token through 4096 x 4096 at half the numbers, one thread

Errors of the outputs at equal rank, on the linears of the model that ships (`--model` for another Llama) and the second moments
that SVD-LLM's own code gathers. Fails if ours is above theirs by more than WORST_RATIO on any:

    git clone https://github.com/AIoT-MLSys-Lab/SVD-LLM && git clone https://github.com/hahnyuan/ASVD4LLM
    python scripts/bench_svd.py --svd-llm SVD-LLM --asvd ASVD4LLM
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from measure import commit, machine
from public_low_rank import SVDLLM, Factors, asvd
from torch import Tensor, nn

from compress import load, shipped
from compress.calibration.data import load_tokenizer
from compress.calibration.statistics import AbsMean, SecondMoment, SiteStatistics
from compress.linalg.low_rank import decompose, factors
from compress.linalg.ranks import uniform_rank
from compress.methods.base import Layer, SiteTask
from compress.methods.svd import SVD, SVDConfig, moment_of
from compress.modules.low_rank import LowRankLinear
from compress.shipped import calibration_text_path

HIDDEN, INNER, GROUPED = 4096, 14336, 1024  # of Llama 3 8B
LINEARS = {  # name -> (out, in)
    "q": (HIDDEN, HIDDEN), "k": (GROUPED, HIDDEN), "v": (GROUPED, HIDDEN), "o": (HIDDEN, HIDDEN),
    "gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER),
}  # fmt: skip
KEEP_RATIO = 0.8
DECODE_SECONDS = 3.0  # of each of the two, in turns
WORST_RATIO = 1.00001  # of our error to theirs: both sides round


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=int, default=1, help="divide all widths by it")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--papers", action="store_true", help="time the papers' route, too")
    parser.add_argument("--rounds", type=int, default=1, help="of factorizing, in turns; the fastest counts")
    parser.add_argument("--decode", action="store_true", help="time one token through the factors instead")
    parser.add_argument("--svd-llm", type=Path, help="a checkout of SVD-LLM: measure errors instead")
    parser.add_argument("--asvd", type=Path, help="a checkout of ASVD4LLM; with --svd-llm")
    parser.add_argument("--model", type=Path, default=shipped.model_path(), help="[default: the one that ships]")
    parser.add_argument("--text", type=Path, default=calibration_text_path(), help="[default: the one that ships]")
    parser.add_argument("--keep-ratio", type=float, default=KEEP_RATIO, help="of errors")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    print(f"{machine()}, {asked.threads} threads, torch {torch.__version__}, commit {commit()}")
    if asked.svd_llm:
        beside(asked.svd_llm, asked.asvd, asked.model, asked.text, asked.keep_ratio)
    elif asked.decode:
        decode()
    else:
        factorize(asked.scale, asked.rounds, asked.papers)


def factorize(scale: int, rounds: int, papers: bool) -> None:
    """Print a row for each linear: seconds, and how much loss differs from what LAPACK's singular values say."""
    print("| linear | eigh, qr | and products | ours | ours / all needed | papers | loss, ours / papers |")
    print("|---|---|---|---|---|---|---|")
    totals = [0.0] * 4
    for name, (out, n) in LINEARS.items():
        weight, moment = problem(out // scale, n // scale)
        rank = rank_of(weight)
        lapack = products = ours = float("inf")
        for _ in range(rounds):
            lapack, products = (min(pair) for pair in zip((lapack, products), bare(weight, moment), strict=True))
            seconds, found = timed(partial(truncated, weight, moment, rank))
            ours = min(ours, seconds)
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


def beside(svd_llm: Path, asvd_folder: Path | None, model: Path, text: Path, keep: float) -> None:
    """Print a row for each way of theirs: mean errors of the outputs, and the largest ratio of ours to theirs."""
    linears, roots, sizes, theirs = public(svd_llm, asvd_folder, model, text, keep)
    print(
        f"{len(linears)} linears, keep_ratio {keep:g}; relative error of the outputs; worst: largest ratio of ours to theirs"
    )
    print("| theirs | stored in | error | ours | worst | ours with their objective, by its own measure: worst |")
    print("|---|---|---|---|---|---|")
    highest = 0.0
    for (name, settings), found in theirs.items():
        for dtype in (torch.float32, torch.bfloat16):
            errors: list[tuple[float, float, float]] = []  # theirs; ours; ratio, in the objective's measure
            for layer, linear in linears.items():
                left, right = (factor.to(dtype).double() for factor in found[layer])
                weight, moment = linear.weight.detach(), roots[layer] @ roots[layer].T
                known = SiteStatistics(len(moment), {SecondMoment(): moment, AbsMean(): sizes[layer]})
                default, _ = ours(weight, known, dtype, rank=right.shape[0])
                same, measure = ours(weight, known, dtype, rank=right.shape[0], **dict(settings))
                ratio = relative(weight, same, measure) / relative(weight, left @ right, measure)
                errors.append((relative(weight, left @ right, moment), relative(weight, default, moment), ratio))
            worst = max(own / their for their, own, _ in errors)
            highest = max(highest, worst if dtype == torch.float32 else 0.0)
            print(
                f"| {name} | {str(dtype).removeprefix('torch.')} | {mean(e[0] for e in errors):.5f} | "
                f"{mean(e[1] for e in errors):.5f} | {worst:.5f} | {max(e[2] for e in errors):.5f} |",
                flush=True,
            )
    if highest > WORST_RATIO:
        raise SystemExit(f"ours is worse than theirs, {highest:.6f} times")


def ours(weight: Tensor, known: SiteStatistics, dtype: torch.dtype, **settings: Any) -> tuple[Tensor, Tensor]:
    """The weight that our factors give, stored in `dtype`; and M [in, in] of the objective."""
    config = SVDConfig(**settings)
    task = SiteTask("site", (Layer("layer", weight, None, config, dtype),))
    module = SVD.compress(task, known, torch.Generator())["layer"].module
    measure = moment_of(config, known)
    assert measure is not None
    return module.dense(torch.float64), measure if measure.ndim == 2 else measure.diag()


Ways = dict[tuple[str, tuple[tuple[str, Any], ...]], dict[str, Factors]]  # (heading, our settings) -> layer -> factors


def public(
    svd_llm: Path, asvd_folder: Path | None, folder: Path, text: Path, keep: float
) -> tuple[dict[str, nn.Linear], dict[str, Tensor], dict[str, Tensor], Ways]:
    """The linears of the model's blocks; S of each as SVD-LLM's code finds it; mean |x|; and what theirs makes of them."""
    model = load(folder, dtype=torch.float32)
    ids = load_tokenizer(folder)(text.read_text(), return_tensors="pt").input_ids[0]
    batches = list(ids[: 32 * 256].unflatten(0, (-1, 256)).split(8))
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n}
    sizes: dict[str, Tensor] = {}

    def adding(name: str) -> Callable[..., None]:
        def add(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            sizes[name] = sizes.get(name, torch.zeros(1)) + arguments[0].abs().flatten(0, -2).sum(0) / (32 * 256)

        return add

    for name, module in linears.items():
        module.register_forward_pre_hook(adding(name))
    peer = SVDLLM(svd_llm)
    profile = peer.profile(model, batches)
    roots = {f"model.layers.{i}.{name}": root for i, found in profile.items() for name, root in found.items()}
    ways: Ways = {
        ("SVD-LLM, then the left factor fitted", ()): {n: peer.updated(m, roots[n], keep) for n, m in linears.items()},
        ("SVD, then the left factor fitted", ()): {
            n: peer.updated(m, roots[n], keep, direct=True) for n, m in linears.items()
        },
    }
    if asvd_folder is not None:
        made = asvd(asvd_folder)
        for alpha in (0.5, 1.0):
            ways[f"ASVD, alpha {alpha:g}", (("objective", "scaled"), ("alpha", alpha))] = {
                n: made(m, sizes[n], keep, alpha) for n, m in linears.items()
            }
    ways = {("SVD-LLM", ()): peer.whitened(model, profile, keep), **ways}
    return linears, roots, sizes, ways


def relative(weight: Tensor, found: Tensor, moment: Tensor) -> float:
    """tr((W - W') H (W - W')^T) / tr(W H W^T), float64."""
    difference = weight.double() - found
    return float(((difference @ moment) * difference).sum() / ((weight.double() @ moment) * weight.double()).sum())


def timed(work: Callable[[], Any], clock: Callable[[], float] = time.process_time) -> tuple[float, Any]:
    """Seconds, and what came of it. CPU seconds, unless another clock is given: what else the machine does counts least then."""
    start = clock()
    done = work()
    return clock() - start, done


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
                seconds, _ = timed(partial(module, x), time.perf_counter)
                best[name] = min(best[name], seconds)
    print(
        f"one token, {HIDDEN} x {HIDDEN}, float32: dense {1e3 * best['dense']:.3f} ms, rank {rank} "
        f"{1e3 * best['factors']:.3f} ms, {best['dense'] / best['factors']:.2f} times as fast"
    )


if __name__ == "__main__":
    main()
