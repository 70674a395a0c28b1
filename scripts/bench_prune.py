"""`prune` beside the public SparseGPT and Wanda code: what is lost of the outputs, linear by linear.

Weights of the model that ships (`--model` for another Llama), inputs of its calibration text, the same for both:
tr((W - W') H (W - W')^T) / tr(W H W^T), H = sum_t x_t x_t^T. Fails if ours is above theirs by more than 0.5 % on any linear.

    git clone https://github.com/IST-DASLab/sparsegpt && git clone https://github.com/locuslab/wanda
    python scripts/bench_prune.py --sparsegpt sparsegpt --wanda wanda
    python scripts/bench_prune.py --time             # ours alone: one large linear, seconds and memory (Linux)
"""

from __future__ import annotations

import argparse
import importlib
import io
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from statistics import mean
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from measure import commit, machine
from torch import Tensor, nn

from compress import load, shipped
from compress.calibration.data import load_tokenizer
from compress.calibration.statistics import Request, SecondMoment, SiteStatistics, SquareSum
from compress.linalg.quadratic import energy
from compress.methods.base import Layer, LayerShape, SiteTask
from compress.methods.prune import Prune, PruneConfig
from compress.shipped import calibration_text_path

WORST = 1.005  # ours may lose so much more than theirs on any linear
ROWS, LENGTH = 32, 256  # calibration rows, tokens of each
PATTERNS = ((2, 4), (4, 8), (0, 0))  # 0:0 is half of all weights, anywhere
SCORES = ("magnitude", "wanda", "nowag", "sparsegpt")
SIZE = 4096  # of the linear that is timed

Inputs = dict[str, tuple[Tensor, Tensor]]  # name -> weight [out, in], inputs [rows, length, in]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsegpt", type=Path, help="a checkout of IST-DASLab/sparsegpt")
    parser.add_argument("--wanda", type=Path, help="a checkout of locuslab/wanda")
    parser.add_argument("--model", type=Path, default=shipped.model_path(), help="[default: the one that ships]")
    parser.add_argument("--blocks", type=int, default=None, help="the first so many [default: all]")
    parser.add_argument("--time", action="store_true", help="time one large linear, by every score")
    parser.add_argument("--scores", nargs="+", default=SCORES, choices=SCORES, help="--time: only these")
    asked = parser.parse_args()
    print(f"{machine()}, torch {torch.__version__}, commit {commit()}")
    if asked.time:
        timed(asked.scores)
        return
    linears = linears_and_inputs(asked.model, asked.blocks)
    print(f"{len(linears)} linears, {ROWS * LENGTH} tokens; loss as a fraction of the outputs' energy, in float32\n")
    print("| | theirs | ours | ours / theirs: mean | worst | seconds, theirs | ours |\n|---|---|---|---|---|---|---|")
    worst = 0.0
    for heading, settings, theirs in ways(asked.sparsegpt, asked.wanda, linears):
        worst = max(worst, row(heading, settings, theirs, linears))
    if worst > WORST:
        raise SystemExit(f"ours is worse than theirs, {worst:.4f} times")


def row(heading: str, settings: dict[str, Any], theirs: Any, linears: Inputs) -> float:
    """Print what both lose on average; the largest ratio of ours to theirs."""
    start = time.process_time()
    found = theirs()
    between = time.process_time()
    own = {name: pruned(weight, x, settings) for name, (weight, x) in linears.items()}
    end = time.process_time()
    losses, ratios = [], []
    for name, (weight, x) in linears.items():
        flat = x.flatten(0, 1).double()
        hessian = flat.T @ flat
        whole = energy(weight.double(), hessian)
        pair = [energy(weight.double() - w.double(), hessian) / whole for w in (found[name], own[name])]
        losses.append(pair)
        ratios.append(pair[1] / pair[0])
    columns = (
        *(f"{mean(values):.5f}" for values in zip(*losses, strict=True)),
        f"{mean(ratios):.4f}",
        f"{max(ratios):.4f}",
        f"{between - start:.1f}",
        f"{end - between:.1f}",
    )
    print(f"| {heading} | {' | '.join(columns)} |", flush=True)
    return max(ratios)


def pruned(weight: Tensor, x: Tensor, settings: dict[str, Any]) -> Tensor:
    """The weight that our method leaves, stored in float32."""
    flat = x.flatten(0, 1)
    config = PruneConfig(**settings)
    by_moment = config.score == "sparsegpt"
    values: dict[Request, Tensor] = (
        {SecondMoment(): flat.T @ flat} if by_moment else {SquareSum(): flat.square().sum(0)}
    )
    task = SiteTask("site", (Layer("layer", weight, None, config, torch.float32),))
    outcome = Prune.compress(task, SiteStatistics(len(flat), values), torch.Generator())
    return outcome["layer"].module.dense(torch.float32)


def ways(sparsegpt: Path | None, wanda: Path | None, linears: Inputs) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """Heading, our settings, and a call that gives their weights by name."""
    for n, m in PATTERNS:
        heading = f"{n}:{m}" if m else "50 %, anywhere"
        settings: dict[str, Any] = {"pattern": f"{n}:{m}"} if m else {"sparsity": 0.5}
        if wanda is not None:
            for score in ("magnitude", "wanda"):
                yield (
                    f"{score} {heading}",
                    {"score": score, **settings},
                    lambda score=score, n=n, m=m: by_wanda(wanda, score, linears, n, m),
                )
        if sparsegpt is None:
            continue
        yield f"SparseGPT {heading}", settings, lambda n=n, m=m: by_sparsegpt(sparsegpt, linears, n, m)
        for bits, clip in ((4, "none"), (3, "mse")) if (n, m) != (4, 8) else ():
            yield (
                f"SparseGPT {heading}, {bits} bits per row, clip {clip}",
                {**settings, "bits": bits, "group_size": -1, "clip": clip},
                lambda n=n, m=m, bits=bits, clip=clip: by_sparsegpt(sparsegpt, linears, n, m, bits, clip == "mse"),
            )


def by_sparsegpt(
    folder: Path, linears: Inputs, n: int, m: int, bits: int | None = None, mse: bool = False
) -> dict[str, Tensor]:
    """What their class makes of each linear. Their n counts the weights that are pruned."""
    found = {}
    with checkout(folder, "sparsegpt", "quant") as (code, quant):
        for name, (weight, x) in linears.items():
            linear = linear_of(weight)
            work = code.SparseGPT(linear)
            if bits is not None:
                work.quantizer = quant.Quantizer()
                work.quantizer.configure(bits, perchannel=True, sym=True, mse=mse)
            for one in x:
                work.add_batch(one, None)
            work.fasterprune(0.5, prunen=m - n, prunem=m)
            found[name] = linear.weight.detach()
    return found


def by_wanda(folder: Path, score: str, linears: Inputs, n: int, m: int) -> dict[str, Tensor]:
    """What their function for a whole model makes of a model of one block, which gives every linear its inputs."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linears = nn.ModuleList(linear_of(weight) for weight, _ in linears.values())

        def forward(self, index: Tensor, **unused: Any) -> tuple[Tensor]:
            for linear, (_, x) in zip(self.linears, linears.values(), strict=True):
                linear(x[int(index)])
            return (index[0],)

    block = Block()
    model = SimpleNamespace(
        model=SimpleNamespace(layers=[block]), config=SimpleNamespace(use_cache=False), hf_device_map={}, seqlen=LENGTH
    )
    asked = SimpleNamespace(nsamples=ROWS, seed=0, sparsity_ratio=0.5, use_variant=False)
    with checkout(folder, "lib.prune") as (code,):
        indices = torch.arange(ROWS).unsqueeze(1)
        code.prepare_calibration_input = lambda *_: (indices, indices.clone(), None, None)  # type: ignore[attr-defined]
        work: Any = code.prune_wanda if score == "wanda" else code.prune_magnitude
        with torch.no_grad():
            work(asked, model, None, torch.device("cpu"), m - n, m)
    return {name: linear.get_parameter("weight").detach() for name, linear in zip(linears, block.linears, strict=True)}


@contextmanager
def checkout(folder: Path, *names: str) -> Iterator[tuple[ModuleType, ...]]:
    """Modules of a checkout, silent, without their data loaders, on a machine that may lack CUDA."""
    data: Any = ModuleType("lib.data")
    data.get_loaders = lambda *_, **__: (None, None)
    before, synchronize, cuda = dict(sys.modules), torch.cuda.synchronize, Tensor.cuda
    sys.path.insert(0, str(folder))
    try:
        sys.modules["lib.data"] = data
        torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
        Tensor.cuda = lambda self, *_: self  # type: ignore[assignment, method-assign]
        with redirect_stdout(io.StringIO()):
            yield tuple(importlib.import_module(name) for name in names)
    finally:
        sys.path.remove(str(folder))
        torch.cuda.synchronize, Tensor.cuda = synchronize, cuda  # type: ignore[method-assign]
        for name in set(sys.modules) - set(before):
            if name.partition(".")[0] in ("lib", "sparsegpt", "quant"):
                del sys.modules[name]


def linear_of(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return linear


def linears_and_inputs(folder: Path, n_blocks: int | None) -> Inputs:
    """The linears of the blocks, and what the calibration text gives them."""
    model = load(folder, dtype=torch.float32)
    ids = load_tokenizer(folder)(calibration_text_path().read_text(), return_tensors="pt").input_ids[0]
    seen: dict[str, Tensor] = {}
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n}
    if n_blocks is not None:
        linears = {n: m for n, m in linears.items() if int(n.split(".layers.")[1].split(".")[0]) < n_blocks}
    for name, linear in linears.items():
        linear.register_forward_pre_hook(lambda _, arguments, name=name: seen.update({name: arguments[0].detach()}))
    with torch.no_grad():
        model(ids[: ROWS * LENGTH].unflatten(0, (ROWS, LENGTH)), use_cache=False)
    return {name: (without_ties(linear.weight.detach()), seen[name]) for name, linear in linears.items()}


def without_ties(weight: Tensor) -> Tensor:
    """Moved by about 1e-4 of itself: 16-bit weights are often equal, and which of them goes first is nobody's merit."""
    return weight * (1 + 1e-4 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))


def timed(scores: Sequence[str]) -> None:
    """Print seconds of CPU for one linear of SIZE x SIZE, and what it takes of memory beside its weight and statistics."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SIZE, SIZE, generator=generator) * 0.02
    x = torch.randn(SIZE, SIZE, generator=generator) * (torch.rand(SIZE, generator=generator) * 3 + 0.1)
    flat, shape = x, LayerShape("layer", SIZE, SIZE)
    squares, moment = SiteStatistics(SIZE, {SquareSum(): flat.square().sum(0)}), flat.T @ flat
    del x, flat
    print("| settings | CPU seconds | peak, MiB | planned, MiB |\n|---|---|---|---|")
    for score in scores:
        for settings in ({"pattern": "2:4"}, {"sparsity": 0.5}):
            config = PruneConfig(**{"score": score, **settings})
            known = squares if score != "sparsegpt" else SiteStatistics(SIZE, {SecondMoment(): moment})
            task = SiteTask("site", (Layer("layer", weight, None, config, torch.float32),))
            before = resident_anew()
            start = time.process_time()
            Prune.compress(task, known, torch.Generator())
            took, peak = time.process_time() - start, (memory("VmHWM") - before) / 2**20
            planned = Prune.workspace((shape,), config) / 2**20
            print(f"| {score}, {settings} | {took:.1f} | {peak:,.0f} | {planned:,.0f} |", flush=True)


def resident_anew() -> int:
    """Bytes resident now, from which the peak is counted on (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def memory(field: str) -> int:
    """Bytes in a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    main()
