"""`bitstack`'s decomposition beside the public code: what is left of the same matrices after each block.

The matrices are the linears of a model, columns weighted by the size of their inputs on calibration text. Both sides are taken
from what is stored, signs and float16 factors, summed in float32. Fails if ours leaves more than theirs by WORST, with full
decompositions, or by the accuracy that the default states.

    git clone https://github.com/xinghaow99/BitStack
    python scripts/bench_bitstack.py --reference BitStack
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import sys
import time
from pathlib import Path
from statistics import mean
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch
from measure import commit, machine
from torch import Tensor, nn

from compress import load, shipped
from compress.calibration.data import load_tokenizer
from compress.linalg.absolute_value import ACCURACY, decompose
from compress.linalg.signs import unpack_signs
from compress.methods.bitstack import input_scale
from compress.shipped import calibration_text_path

WORST = 1 + 1e-4  # ours may leave so much more than theirs, in the norm, with full decompositions
ROWS, LENGTH = 16, 256
WAYS = ("theirs", "ours, full", "ours")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, required=True, help="a checkout of xinghaow99/BitStack")
    parser.add_argument("--model", type=Path, default=shipped.model_path(), help="[default: the one that ships]")
    parser.add_argument("--decoder-blocks", type=int, default=2, help="the first so many [default: 2]")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--blocks", type=int, default=6)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine()}, torch {torch.__version__}, commit {commit()}")
    matrices = scaled_linears(asked.model, asked.decoder_blocks)
    theirs = public_linear(asked.reference)
    for rank in asked.ranks:
        compare(theirs, matrices, rank, asked.blocks)


def compare(theirs: Any, matrices: dict[str, Tensor], rank: int, blocks: int) -> None:
    """A table of what is left after each block, mean over the matrices; fails where ours is worse."""
    left: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    seconds = dict.fromkeys(WAYS, 0.0)
    for name, matrix in matrices.items():
        for way in WAYS:
            start = time.process_time()
            terms = (
                their_terms(theirs, matrix, rank, blocks) if way == "theirs" else our_terms(matrix, rank, blocks, way)
            )
            seconds[way] += time.process_time() - start
            left[way].append(residuals(matrix, terms))
        for way, allowed in (("ours, full", WORST), ("ours", 1 + ACCURACY)):
            worst = max(o / t for o, t in zip(left[way][-1], left["theirs"][-1], strict=True))
            if worst > allowed:
                sys.exit(f"{name}, rank {rank}: {way} leaves {worst:.5f} of what theirs does, {allowed} is allowed")
    print(f"\nrank {rank}, {len(matrices)} linears: mean of ||R|| / ||W s||; worst ratio to theirs; CPU seconds")
    print("| | " + " | ".join(f"{n}" for n in range(1, blocks + 1)) + " | worst ratio | seconds |")
    print("|---" * (blocks + 3) + "|")
    for way in WAYS:
        means = [mean(row[n] for row in left[way]) for n in range(blocks)]
        ratios = [
            o / t for ours, base in zip(left[way], left["theirs"], strict=True) for o, t in zip(ours, base, strict=True)
        ]
        cells = " | ".join(f"{value:.4f}" for value in means)
        print(f"| {way} | {cells} | {max(ratios):.5f} | {seconds[way]:.1f} |", flush=True)


def our_terms(matrix: Tensor, rank: int, blocks: int, way: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = decompose(matrix, rank, blocks, exact=way == "ours, full", generator=generator)
    return [unpack_signs(b.signs, matrix.shape[1]).float() * (b.left.float() @ b.right.float().T) for b in found]


def their_terms(linear: Any, matrix: Tensor, rank: int, blocks: int) -> list[Tensor]:
    plain = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
    plain.weight.data = matrix.clone()
    with contextlib.redirect_stdout(io.StringIO()):
        made = linear.from_linear(plain, w_bit=blocks, k=rank, bias=False)
    unpack = sys.modules["bitstack.utils.pack_utils"].unpack_sign
    return [
        unpack(getattr(made, f"qweight_{i}"), matrix.shape).float()
        * (getattr(made, f"u_{i}").float() @ getattr(made, f"vt_{i}").float())
        for i in range(blocks)
    ]


def residuals(matrix: Tensor, terms: list[Tensor]) -> list[float]:
    """||W - sum of the first terms|| / ||W||, after each."""
    left, rest = [], matrix.double()
    for term in terms:
        rest = rest - term.double()
        left.append(float(rest.norm() / matrix.double().norm()))
    return left


def public_linear(folder: Path) -> Any:
    """Their `BitStackLinear`. Triton, which its forward needs and its decomposition does not, is replaced where it is missing."""
    sys.path.insert(0, str(folder))
    if importlib.util.find_spec("triton") is None:
        sys.modules |= {"triton": MagicMock(), "triton.language": MagicMock()}
    sys.modules["bitstack.utils.inference_utils"] = MagicMock()
    for name in (
        "bitstack",
        "bitstack.utils",
        "bitstack.modules",
    ):  # their __init__ files import the whole command line
        package = ModuleType(name)
        package.__path__ = [str(folder / name.replace(".", "/"))]
        sys.modules[name] = package
    return importlib.import_module("bitstack.modules.BitStackLinear").BitStackLinear


def scaled_linears(folder: Path, n_blocks: int) -> dict[str, Tensor]:
    """The linears of the first decoder blocks, [out, in] float32, columns weighted as `bitstack` does."""
    model = load(folder, dtype=torch.float32)
    ids = load_tokenizer(folder)(calibration_text_path().read_text(encoding="utf-8")[:100_000])["input_ids"]
    ids = torch.tensor(ids[: ROWS * LENGTH]).view(ROWS, LENGTH)
    squares: dict[str, Tensor] = {}

    def gather(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            squares[name] = squares.get(name, 0) + args[0].flatten(0, -2).double().square().sum(0)

        return hook

    inside = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(f".layers.{block}." in name for block in range(n_blocks))
    }
    for name, module in inside.items():
        module.register_forward_pre_hook(gather(name))
    with torch.no_grad():
        model(ids, use_cache=False)
    return {name: (module.weight.detach() * input_scale(squares[name])).float() for name, module in inside.items()}


if __name__ == "__main__":
    main()
