"""Decoding speed of a stack at several sizes, beside the dense model in bfloat16 and beside rebuilding weights for each token.

    dense            a Llama of the same shape with random weights (scripts/random_llama.py)
    N blocks         the stack (scripts/random_stack.py) at N blocks a layer, on sign_planes_linear
    N, rebuilt       the same, but weights are rebuilt, some rows at a time, by the compiled kernels, and multiplied by torch
    N, torch         the same on the references, which do all of that in torch (--torch)

All are in one process and take turns; the first round does not count. --cpu-time counts processor time of one thread, whatever
else the machine does; contention for memory stays in it. One token at a time from a cache of --context tokens.

    python scripts/bench_bitstack_decode.py --hidden 2048 --mlp 5632 --blocks 20 --heads 16 --kv-heads 16 --vocabulary 32000
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package beside this script, installed or not

import torch
from random_llama import Shape, add_shape_options, random_llama, shape_of
from random_stack import random_stack

import compress
from compress.evaluation.speed_worker import cpu_name
from compress.kernels import native, sign_planes


def decode(model: Any, context: int, n_tokens: int, clock: Callable[[], float]) -> float:
    """Seconds for a token, the cache filled before."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, model.config.vocab_size, (1, context), generator=generator)
    with torch.inference_mode():
        out = model(ids, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
        start = clock()
        for _ in range(n_tokens):
            out = model(token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1:].argmax(-1)
        return (clock() - start) / n_tokens


@contextmanager
def rebuilding() -> Iterator[None]:
    """Rows of the weight are rebuilt by the compiled kernels and multiplied by torch, for one token too."""
    before = sign_planes.TABLE_TOKENS
    sign_planes.TABLE_TOKENS = 0
    try:
        yield
    finally:
        sign_planes.TABLE_TOKENS = before


@contextmanager
def on_torch() -> Iterator[None]:
    """Without the compiled kernels."""
    before = native.library
    native.library = lambda: None  # type: ignore[assignment]
    try:
        yield
    finally:
        native.library = before


def measure(work: Path, shape: Shape, options: argparse.Namespace) -> dict[str, Any]:
    blocks = [int(number) for number in options.stack_blocks.split(",")]
    dense = compress.load(random_llama(work / "dense", shape))
    stack = compress.load(random_stack(work / "stack", shape, rank=options.rank, blocks=max(blocks)))
    table, n_layers = stack.stack.table, len(stack.stack.table.specs)
    found: dict[str, dict[str, Any]] = {}

    def at(name: str, model: Any, nbytes: int, n_tokens: int) -> None:
        clock = time.thread_time if options.cpu_time else time.perf_counter
        seconds = decode(model, options.context, n_tokens, clock)
        kept = found.setdefault(name, {"layer_bytes": nbytes, "seconds_per_token": []})
        kept["seconds_per_token"].append(seconds)

    for _ in range(options.rounds + 1):
        at("dense bfloat16", dense, 2 * table.n_weights, options.tokens)
        for number in blocks:
            entries = (number - 1) * n_layers
            stack.resize(table.nbytes(entries))
            assert stack.stack.n_entries == entries
            nbytes = int(table.bits(entries) * table.n_weights / 8)
            at(f"{number} blocks", stack, nbytes, options.tokens)
            with rebuilding():
                at(f"{number}, rebuilt", stack, nbytes, options.slow_tokens)
            if options.torch:
                with on_torch():
                    at(f"{number}, torch", stack, nbytes, options.slow_tokens)
    for kept in found.values():
        kept["seconds_per_token"] = kept["seconds_per_token"][1:]
        kept["tokens_per_second"] = 1 / median(kept["seconds_per_token"])
    return {
        "stacked_weights": table.n_weights,
        "threads": torch.get_num_threads(),
        "processor": cpu_name(),
        "kernels": native.current_isa() or "torch",
        "context": options.context,
        "clock": "processor time" if options.cpu_time else "wall",
        "models": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shape_options(parser, Shape())
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--stack-blocks", default="2,3,4", help="sizes to time  [default: 2,3,4]")
    parser.add_argument("--context", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=8, help="decoded in a round")
    parser.add_argument("--slow-tokens", type=int, default=1, help="where weights are rebuilt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--torch", action="store_true", help="the references too")
    parser.add_argument("--work", type=Path, help="where the models go, and stay; by default a temporary folder")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--cpu-time", action="store_true", help="processor time, on one thread")
    options = parser.parse_args()
    if options.cpu_time:
        torch.set_num_threads(1)
    from transformers.utils import logging

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as temporary:
        found = measure(options.work or Path(temporary), shape_of(options), options)
    if options.json:
        print(json.dumps(found, indent=2))
        return
    print(
        f"{found['stacked_weights'] / 1e6:,.0f} M weights in stacked layers, {found['processor']}, {found['threads']} threads, "
        f"kernels {found['kernels']}, {found['clock']}"
    )
    first = next(iter(found["models"].values()))["tokens_per_second"]
    for name, kept in found["models"].items():
        print(
            f"{name:16} {kept['layer_bytes'] / 2**20:8,.0f} MiB {kept['tokens_per_second']:8.2f} tokens/s "
            f"{kept['tokens_per_second'] / first:6.2f} of dense"
        )


if __name__ == "__main__":
    main()
