"""What an online Hadamard transform of a down projection's input costs beside the product that it precedes, in float32.

    python scripts/bench_hadamard.py [--threads 1 2] [--tokens 1 16 512] [--device cpu]

Each figure is the median over repeats that alternate between the two, so that what else the machine does falls on both.
Weights are taken in turn from several matrices, so that they come from memory, as in a model, and not from a cache.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from measure import commit, machine
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package beside this script, installed or not

from compress.kernels.ops import hadamard_transform
from compress.linalg.hadamard_orders import factors, largest_block

SHAPES = {  # MLP width -> hidden size
    "Llama 3 8B": (14336, 4096),
    "Llama 2 7B": (11008, 4096),
    "Llama 3.2 1B": (8192, 2048),
    "Qwen 2.5 7B": (18944, 3584),
    "Qwen 3 32B": (25600, 5120),
    "Gemma 3 4B": (10240, 2560),
    "Phi 4": (17920, 5120),
}
N_WEIGHTS = 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1])
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    print(f"{machine()}, commit {commit()}, torch {torch.__version__}, {arguments.device}\n")
    print("| down projection | H | threads | tokens | transform ms | product ms | % |\n|---|---|--:|--:|--:|--:|--:|")
    worst = 0.0
    for name, (wide, hidden) in SHAPES.items():
        orders = " x ".join(str(k) for k in factors(largest_block(wide)) or ())
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            for tokens in arguments.tokens:
                transform, product = times(wide, hidden, tokens, arguments.repeats, arguments.device)
                share = 100 * transform / product
                if tokens == 1:
                    worst = max(worst, share)
                label = f"{name}: {wide} -> {hidden} | {orders} | {threads} | {tokens}"
                print(f"| {label} | {transform * 1e3:.3f} | {product * 1e3:.2f} | {share:.2f} |", flush=True)
    return int(worst >= 5)


def times(wide: int, hidden: int, tokens: int, repeats: int, device: str) -> tuple[float, float]:
    """Median seconds of the transform and of the product."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, wide, generator=generator).to(device)
    weights = [torch.randn(hidden, wide, generator=generator).to(device) for _ in range(N_WEIGHTS)]
    block = largest_block(wide)
    taken: tuple[list[float], list[float]] = ([], [])
    with torch.inference_mode():
        for repeat in range(repeats + 2):
            weight = weights[repeat % N_WEIGHTS]
            product = seconds(lambda w=weight: torch.nn.functional.linear(x, w), device)  # type: ignore[misc]
            transform = seconds(lambda: hadamard_transform(x, block), device)
            if repeat >= 2:  # the first ones build the small matrices and warm up
                taken[0].append(transform)
                taken[1].append(product)
    return median(taken[0]), median(taken[1])


def seconds(run: Callable[[], Tensor], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    raise SystemExit(main())
