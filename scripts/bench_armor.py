"""`armor` beside the public code: loss at equal iterations on the same matrices and statistics, and time on one large matrix.

The loss is what both minimise, sum h (Wn - A S B)^2 / sum h Wn^2, of float32 values. Fails if ours is above theirs by more than
0.5 % on any linear. Theirs always runs on one thread.

    git clone https://github.com/LawrenceRLiu/ARMOR
    python scripts/bench_armor.py --reference ARMOR                            # the linears of the model that ships
    python scripts/bench_armor.py --reference ARMOR --time --size 2048         # CPU seconds of one matrix, blocks of 128
    python scripts/bench_armor.py --time --size 4096 --iterations 3000         # ours alone
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean
from typing import TypeVar

import torch
from measure import commit, machine
from public_armor import armor, code_of
from torch import Tensor, nn

from compress import load, shipped
from compress.calibration.data import load_tokenizer
from compress.linalg.armor import Step, wrap
from compress.linalg.block_diagonal import block_left, block_right
from compress.linalg.sparsity import highest_of_groups, nowag_normalised, nowag_scores
from compress.shipped import calibration_text_path

WORST = 1.005  # ours may lose so much more than theirs on any linear
ROWS, LENGTH = 32, 256  # calibration rows, tokens of each

STEPS: tuple[Step, ...] = ("adam", "sequential")
THEIRS = "theirs"

T = TypeVar("T")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, help="a checkout of LawrenceRLiu/ARMOR")
    parser.add_argument("--model", type=Path, default=shipped.model_path(), help="[default: the one that ships]")
    parser.add_argument("--blocks", type=int, default=None, help="decoder blocks, the first so many [default: all]")
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 32], help="of the wrappers' blocks")
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--time", action="store_true", help="time one matrix instead")
    parser.add_argument("--size", type=int, default=2048, help="--time: of the matrix")
    parser.add_argument("--block-size", type=int, default=128, help="--time: of the wrappers")
    parser.add_argument(
        "--ways", nargs="+", choices=(*STEPS, THEIRS), help="--time: only these, for the peak of one alone"
    )
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine()}, torch {torch.__version__}, commit {commit()}")
    if asked.time:
        timed(asked.reference, asked.size, asked.block_size, asked.iterations, asked.ways)
    else:
        beside(asked.reference, asked.model, asked.blocks, asked.sizes, asked.iterations)


def beside(reference: Path, model: Path, n_blocks: int | None, sizes: list[int], n_iters: int) -> None:
    """A row for each size and way."""
    linears = linears_and_squares(model, n_blocks)
    code_of(reference)
    print(f"{len(linears)} linears, {ROWS * LENGTH} tokens, {n_iters} iterations\n")
    print("| blocks | step | NoWag-P | theirs | ours | ours / theirs: mean | worst | CPU s, theirs | ours |")
    print("|---|---|---|---|---|---|---|---|---|")
    worst = 0.0
    for size in sizes:
        theirs, seconds = {}, 0.0
        for name, (weight, squares) in linears.items():
            took, product = timing(partial(armor, reference, weight, squares, size, n_iters))
            theirs[name], seconds = loss(weight, squares, product), seconds + took
        for step in STEPS:
            ours, start, own = {}, [], 0.0
            for name, (weight, squares) in linears.items():
                took, (product, losses) = timing(partial(fitted, weight, squares, size, n_iters, step))
                ours[name], own = loss(weight, squares, product), own + took
                start.append(losses[0])
            ratios = [ours[name] / theirs[name] for name in linears]
            worst = max(worst, *ratios)
            columns = (mean(start), mean(theirs.values()), mean(ours.values()), mean(ratios), max(ratios))
            print(
                f"| {size} | {step} | {' | '.join(f'{c:.5f}' for c in columns)} | {seconds:.0f} | {own:.0f} |",
                flush=True,
            )
    if worst > WORST:
        raise SystemExit(f"ours is worse than theirs, {worst:.4f} times")


def timed(reference: Path | None, size: int, block_size: int, n_iters: int, wanted: list[str] | None) -> None:
    """Seconds and loss of one square matrix; the start, which takes next to nothing, counts on both sides."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size, size, generator=generator) * 0.02
    squares = torch.rand(size, generator=generator) * 3 + 0.01
    print(
        f"{size} x {size}, blocks of {block_size}, {n_iters} iterations\n\n| | CPU s | loss | peak |\n|---|---|---|---|"
    )
    ways: dict[str, Callable[[], tuple[Tensor, list[float]]]] = {
        step: partial(fitted, weight, squares, block_size, n_iters, step) for step in STEPS
    }
    if reference is not None:
        code_of(reference)
        ways[THEIRS] = lambda: (armor(reference, weight, squares, block_size, n_iters), [])
    for name, way in ((n, w) for n, w in ways.items() if wanted is None or n in wanted):
        seconds, (product, _) = timing(way)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # GiB; never falls: that of all rows so far
        print(f"| {name} | {seconds:.1f} | {loss(weight, squares, product):.6f} | {peak:.2f} GiB |", flush=True)


def fitted(weight: Tensor, squares: Tensor, size: int, n_iters: int, step: Step) -> tuple[Tensor, list[float]]:
    """A S B of ours for the normalised weight, and the losses on the way."""
    mask = highest_of_groups(nowag_scores(weight, squares), 2, 4)
    normalised, _, _ = nowag_normalised(weight)
    generator = torch.Generator().manual_seed(0)
    found = wrap(normalised, mask, squares, (size, size), n_iters, step, 1e-4, 100, generator)
    return block_left(found.output_blocks, block_right(found.core, found.input_blocks)), found.losses


def loss(weight: Tensor, squares: Tensor, product: Tensor) -> float:
    normalised, _, _ = nowag_normalised(weight.double())
    whole = float((normalised.square() @ squares.double()).sum())
    return float(((normalised - product.double()).square() @ squares.double()).sum()) / whole


def timing(call: Callable[[], T]) -> tuple[float, T]:
    start = time.process_time()
    found = call()
    return time.process_time() - start, found


def linears_and_squares(folder: Path, n_blocks: int | None) -> dict[str, tuple[Tensor, Tensor]]:
    """The linears of the blocks in float32, and the mean of each input's square over the calibration text."""
    model = load(folder).float()
    ids = torch.tensor(load_tokenizer(folder)(calibration_text_path().read_text(encoding="utf-8"))["input_ids"])
    linears = {
        name: module
        for block in model.get_decoder().layers[:n_blocks]
        for name, module in ((n, m) for n, m in model.named_modules() if m in set(block.modules()))
        if isinstance(module, nn.Linear)
    }
    sums: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, x, name=name: sums.update({name: x[0].detach().flatten(0, 1)}))
        for name, module in linears.items()
    ]
    with torch.no_grad():
        model(ids[: ROWS * LENGTH].view(ROWS, LENGTH))
    for hook in hooks:
        hook.remove()
    return {name: (module.weight.detach(), sums[name].square().mean(0)) for name, module in linears.items()}


if __name__ == "__main__":
    main()
