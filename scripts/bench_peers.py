"""Our kernels for packed weights beside those of other libraries: one linear layer at a time, in turns, in one process.

    python scripts/bench_peers.py [--ggml LIBPEER] [--ik LIBPEER] [--shapes 4096x4096 …] [--tokens 1 16 …] [--threads 1 2]

Weights are in as many copies as take --megabytes together and are used in turn, so that they come from memory. Time includes
what a library does to the activations. Each round runs every contender, in the order of the round before reversed; a round's
figure is the median over its calls, the result the median over rounds. us: wall time; cpu: of the calling thread, at one thread.
`times ours`: median over rounds of the time divided by ours of the same kind (above 1: ours is quicker).

torch is timed always; onnxruntime (with onnx) and openvino if they can be imported; ggml and ik_llama.cpp if their drivers are
given (scripts/peers/CMakeLists.txt says how they are built). What is not found is named.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import commit, machine

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package beside this script, installed or not

import contenders
from contenders import Case, Contender, Data

SHAPES = ("4096x4096", "14336x4096", "4096x14336")
TOKENS = (1, 4, 16, 64, 128, 512)
SETTLE = 0.02  # seconds before a turn: threads of the contender before it stop to spin
LEAST, MOST = 5, 40  # calls of a turn
TURN = 0.05  # seconds of a turn, as far as LEAST and MOST admit
WRONG = 0.5  # relative error of the output (2-norm) beyond which a contender does something else; 2 bits lose 0.3


@dataclass
class Result:
    """Figures of a contender in a case; rates are of the median time. `round_us`: its median in each round."""

    name: str
    out: int
    in_features: int
    tokens: int
    threads: int
    activations: int
    bits_per_weight: float
    us: float
    us_min: float
    us_max: float
    cpu_us: float
    gb_per_s: float
    gflop_per_s: float
    error: float
    round_us: list[float]
    beside: str
    times_ours: float | None = None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ggml", type=Path, help="libpeer_ggml.so")
    parser.add_argument("--ik", type=Path, help="libpeer_ik.so")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="OUTxIN")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="names of peers: 'torch*' '*q4_0*'")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=256, help="of copies of each weight")
    parser.add_argument("--json", type=Path, help="where the figures go")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")  # its quantized tensors are deprecated
    families, missing = found_families(arguments)
    print(f"{machine()}, commit {commit()}, torch {torch.__version__}")
    for line in missing:
        print(line)
    print("\n| shape | threads | tokens | who | bits | us | [min–max] | cpu us | GB/s | GF/s | error | times ours |")
    print("|--|--:|--:|--|--:|--:|--|--:|--:|--:|--:|--:|", flush=True)
    results: list[Result] = []
    for shape in arguments.shapes:
        out, in_features = (int(part) for part in shape.split("x"))
        for threads in arguments.threads:
            for tokens in arguments.tokens:
                case = Case(out, in_features, tokens, threads)
                for family in families:
                    results += timed(case, family, arguments)
                    if arguments.json:
                        about = {
                            "machine": machine(),
                            "commit": commit(),
                            "torch": torch.__version__,
                            "not_found": missing,
                        }
                        arguments.json.write_text(
                            json.dumps({**about, "results": [asdict(r) for r in results]}, indent=1)
                        )
    return 0


Family = Callable[[Data], Iterator[Contender]]


def found_families(arguments: argparse.Namespace) -> tuple[list[Family], list[str]]:
    """Peers that can be run, and a line about each that can not."""
    families: list[Family] = [contenders.torch_peers]
    missing = []
    for peer in ("ggml", "ik"):
        library = getattr(arguments, peer)
        if library is None:
            missing.append(f"not run: {peer}: no --{peer} given (scripts/peers/CMakeLists.txt says how to build it)")
        elif not library.is_file():
            raise SystemExit(f"--{peer} {library}: no such file; scripts/peers/CMakeLists.txt says how to build it")
        else:
            families.append(lambda data, peer=peer, library=library: contenders.native_peers(data, peer, library))  # type: ignore[misc]
    for name, modules, family in (
        ("onnxruntime", ("onnxruntime", "onnx"), contenders.onnxruntime_peers),
        ("openvino", ("openvino",), contenders.openvino_peers),
    ):
        try:
            for module in modules:
                __import__(module)
            families.append(family)
        except ImportError as error:
            missing.append(f"not run: {name}: {error} (pip install {' '.join(modules)})")
    return families, missing


def timed(case: Case, family: Family, arguments: argparse.Namespace) -> list[Result]:
    """Time a family's contenders in turns with ours of the same kinds."""
    torch.set_num_threads(case.threads)
    data = Data(case, arguments.megabytes << 20, arguments.only)
    with torch.inference_mode():
        peers = [peer for peer in family(data) if data.wanted(peer.name)]
        if not peers:
            return []
        kinds = {peer.beside for peer in peers}
        everyone = [*contenders.ours(data, kinds), *peers]
        expected = data.x @ data.weight.T
        errors = {one.name: float((one.output(1) - expected).norm() / expected.norm()) for one in everyone}
        for name, error in errors.items():
            if not error < WRONG:
                raise SystemExit(f"{name} at {case}: relative error {error:.3f}; it does not compute this product")
        rounds: dict[str, list[list[tuple[float, float]]]] = {one.name: [] for one in everyone}
        for number in range(arguments.rounds):
            for one in everyone if number % 2 else reversed(everyone):
                rounds[one.name].append(turn(one))
    results = [result(one, case, rounds[one.name], errors[one.name]) for one in everyone]
    ours = {found.name: found for found in results if found.name.startswith("compress")}
    for found in results:
        twin = ours.get(found.beside)
        if twin is not None and found is not twin:
            found.times_ours = median(a / b for a, b in zip(found.round_us, twin.round_us, strict=True))
        print(row(found), flush=True)
    for one in everyone:
        one.close()
    del everyone, peers
    gc.collect()
    return results


def turn(one: Contender) -> list[tuple[float, float]]:
    """Wall and CPU seconds of each call of a turn."""
    time.sleep(SETTLE)
    start = time.perf_counter()
    one.run(0)  # wakes its threads up
    calls = min(max(int(TURN / max(time.perf_counter() - start, 1e-6)), LEAST), MOST)
    taken = []
    for call in range(calls):
        cpu, wall = time.thread_time(), time.perf_counter()
        one.run((call + 1) % one.copies)
        taken.append((time.perf_counter() - wall, time.thread_time() - cpu))
    return taken


def result(one: Contender, case: Case, rounds: list[list[tuple[float, float]]], error: float) -> Result:
    each = [1e6 * median(wall for wall, _ in calls) for calls in rounds]
    cpu = 1e6 * median(cpu for calls in rounds for _, cpu in calls)
    us = median(each)
    return Result(
        one.name, case.out, case.in_features, case.tokens, case.threads, one.activations,
        8 * one.nbytes / (case.out * case.in_features), us, min(each), max(each), cpu,
        one.nbytes / us / 1e3, 2 * case.tokens * case.out * case.in_features / us / 1e3, error, each, one.beside,
    )  # fmt: skip


def row(one: Result) -> str:
    cells: list[Any] = [
        f"{one.out}x{one.in_features}", one.threads, one.tokens, one.name, f"{one.bits_per_weight:.2f}", f"{one.us:.0f}",
        f"{one.us_min:.0f}–{one.us_max:.0f}", f"{one.cpu_us:.0f}" if one.threads == 1 else "", f"{one.gb_per_s:.1f}",
        f"{one.gflop_per_s:.0f}", f"{one.error:.4f}", "" if one.times_ours is None else f"{one.times_ours:.2f}",
    ]  # fmt: skip
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


if __name__ == "__main__":
    raise SystemExit(main())
