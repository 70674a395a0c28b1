"""Checks and times the CUDA kernels on the GPU at hand; `scripts/gpu_check.sh` builds them first and calls this.

    --checks      correctness only
    --sanitize    small shapes only, no timing: what compute-sanitizer runs
    --json FILE   everything that was found
    --failed TOOL …   sanitizers that found something: the check has not passed

Exit code 0 only if every operation equals its reference. No GPU: one line, and not 0.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

try:
    import torch
except ImportError:
    sys.exit(f"gpu_check: {sys.executable} has no torch: name another interpreter in PYTHON; nothing was checked")
from torch.nn import functional

from compress.kernels.cuda import gpus, native
from compress.kernels.cuda.check import Outcome, cases, run_case
from compress.kernels.cuda.layout import pack_weight
from compress.kernels.cuda.linear import linear
from compress.kernels.cuda.timing import (
    SHAPES,
    TOKENS,
    WAVES,
    Time,
    copy_bandwidth,
    measure,
    n_copies,
    quickest_waves,
    shortfalls,
    suggested,
    table,
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checks", action="store_true")
    parser.add_argument("--sanitize", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--failed", nargs="+", default=[], metavar="TOOL")
    parser.add_argument("--seed", type=int, help="of the data; by default another one each time")
    parser.add_argument("--architecture", action="store_true", help="say what nvcc calls this GPU, and stop")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        built = (
            "it is built without CUDA" if torch.version.cuda is None else f"it is built for CUDA {torch.version.cuda}"
        )
        print(f"gpu_check: torch sees no NVIDIA GPU ({built}): nothing was checked", file=sys.stderr)
        return 2
    if given.architecture:
        name = "".join(map(str, torch.cuda.get_device_capability()))
        print("90a" if name == "90" else name)
        return 0
    library = native.library()
    if library is None:
        print(f"gpu_check: {native.absent()}", file=sys.stderr)
        return 2
    seed = torch.seed() % 2**31 if given.seed is None else given.seed
    device = torch.device("cuda", torch.cuda.current_device())
    outcomes = checked(library, device, seed, given.sanitize)
    passed = all(outcome.passed for outcome in outcomes) and not given.failed
    if given.failed:
        print(f"FAILED under compute-sanitizer: {', '.join(given.failed)}")
    properties = torch.cuda.get_device_properties(device)
    report: dict[str, Any] = {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "architectures": library.cc_architectures().decode(),
        "sources": library.cc_source_digest().decode(),
        "commit": _commit(),
        "date": date.today().isoformat(),
        "seed": seed,
        "passed": passed,
        "sanitizers_failed": given.failed,
        "checks": [outcome.to_dict() for outcome in outcomes],
    }
    if not given.sanitize and not given.checks:
        copy = copy_bandwidth()
        choice = swept(library, device, properties.L2_cache_size)
        times = timed(library, device, properties.L2_cache_size, choice)
        report |= {"copy_gb_s": copy, "times": [asdict(t) for t in times], "shortfalls": shortfalls(times, copy)}
        print(table(times, copy))
        print(f"\ncopy: {copy:.0f} GB/s, read and written")
        print("\n".join(f"missed: {line}" for line in report["shortfalls"]) or "all goals are met")
        print(f"\nfor compress/kernels/cuda/gpus.py:\n    CHOICES[{properties.name!r}] = {suggested(times, choice)}")
        if passed:
            print(f"    VERIFIED[{properties.name!r}] = ({report['date']!r}, {report['commit']!r})")
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(given.json)
    return 0 if passed else 1


def checked(library: Any, device: torch.device, seed: int, small: bool) -> list[Outcome]:
    """All cases, then what holds for calls whatever they compute: graphs, streams, torch.compile."""
    generator = torch.Generator().manual_seed(seed)
    outcomes = [run_case(library, case, device, generator) for case in cases(small)]
    if not small:
        outcomes += [
            _graph(library, device, generator),
            _side_stream(library, device, generator),
            _compiled(device, generator),
        ]
    failed = [outcome for outcome in outcomes if not outcome.passed]
    for outcome in failed:
        why = outcome.raised or f"error {outcome.error:.2e}, bound {outcome.bound:.2e}, repeats: {outcome.repeats}"
        print(f"FAILED {outcome.case}: {why}")
    print(f"{len(outcomes) - len(failed)} of {len(outcomes)} checks passed (seed {seed})")
    return outcomes


def _weight(
    device: torch.device,
    generator: torch.Generator,
    n_out: int = 1024,
    n_in: int = 2048,
    bits: int = 4,
    group: int = 128,
) -> Any:
    codes = torch.randint(0, 2**bits, (n_out, n_in), generator=generator, dtype=torch.uint8).to(device)
    scale = (torch.rand(n_out, n_in // group, generator=generator) * 0.02 + 0.01).bfloat16().to(device)
    return pack_weight(codes, scale, None, bits, group)


def _graph(library: Any, device: torch.device, generator: torch.Generator) -> Outcome:
    """A captured call, replayed on other inputs, gives what a call gives."""
    buffer, layout = _weight(device, generator)
    x = torch.randn(8, 2048, generator=generator).bfloat16().to(device)
    linear(library, x, buffer, layout)
    torch.cuda.synchronize()
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = linear(library, x, buffer, layout)
        x.copy_(torch.randn(8, 2048, generator=generator).bfloat16())
        graph.replay()
        torch.cuda.synchronize()
        return Outcome("CUDA graph", 0.0, 0.0, torch.equal(out, linear(library, x, buffer, layout)))
    except Exception as raised:
        return Outcome("CUDA graph", float("nan"), 0.0, False, str(raised))


def _side_stream(library: Any, device: torch.device, generator: torch.Generator) -> Outcome:
    """A call on another stream waits for what that stream has to do before, and for nothing else."""
    buffer, layout = _weight(device, generator)
    x = torch.randn(8, 2048, generator=generator).bfloat16().to(device)
    wanted = linear(library, x * 2, buffer, layout)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # type: ignore[no-untyped-call]  # tens of milliseconds: a kernel on the wrong stream is far ahead
        doubled = x * 2
        out = linear(library, doubled, buffer, layout)
    stream.synchronize()
    return Outcome("side stream", 0.0, 0.0, torch.equal(out, wanted))


def _compiled(device: torch.device, generator: torch.Generator) -> Outcome:
    """torch.compile goes through the operation without a graph break."""
    from compress.kernels.packed import packed_linear, prepare
    from compress.kernels.packing import pack

    codes = torch.randint(0, 16, (256, 512), generator=generator, dtype=torch.uint8).to(device)
    scale = (torch.rand(256, 4, generator=generator) * 0.02 + 0.01).bfloat16().to(device)
    weight = prepare(pack(codes, 4), scale, None, 4, 128, 512)
    x = torch.randn(4, 512, generator=generator).bfloat16().to(device)
    try:
        run = torch.compile(lambda x: functional.silu(packed_linear(x, weight)) + 1, fullgraph=True)
        error = float((run(x).float() - (functional.silu(packed_linear(x, weight)) + 1).float()).abs().max())
        return Outcome("torch.compile", error, 0.1, True)
    except Exception as raised:
        return Outcome("torch.compile", float("nan"), 0.1, False, str(raised))


def swept(library: Any, device: torch.device, l2_bytes: int) -> gpus.Choice:
    """How many thread blocks should come on each multiprocessor, by trial; the thresholds as for an unknown GPU."""
    generator, found = torch.Generator().manual_seed(0), {}
    tried: dict[gpus.Path, tuple[int, int]] = {"decode": (1, 8), "tensor": (32, 64)}
    for path, counts in tried.items():
        times: dict[Any, float] = {}
        for n_out, n_in in SHAPES:
            for bits in (4, 2):
                buffers, layout = _copies(device, generator, n_out, n_in, bits, l2_bytes)
                for tokens in counts:
                    x = torch.randn(tokens, n_in, generator=generator).bfloat16().to(device)
                    for waves in WAVES[path]:
                        splits = _splits(layout, path, gpus.Choice(decode_waves=waves, tensor_waves=waves), device)
                        calls = [partial(linear, library, x, b, layout, path=path, splits=splits) for b in buffers]
                        times[(n_out, n_in, bits, tokens), waves] = measure(calls)[0]
                del buffers
                torch.cuda.empty_cache()
        found[f"{path}_waves"] = quickest_waves(times)
    return gpus.Choice(**found)


def _copies(
    device: torch.device, generator: torch.Generator, n_out: int, n_in: int, bits: int, l2_bytes: int
) -> tuple[list[torch.Tensor], Any]:
    """A weight as often as it takes to be read from memory each time, and its layout."""
    buffer, layout = _weight(device, generator, n_out, n_in, bits)
    return [buffer.clone() for _ in range(n_copies(layout.n_bytes, l2_bytes))], layout


def _splits(layout: Any, path: gpus.Path, choice: gpus.Choice, device: torch.device) -> int:
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return gpus.splits(layout.row_blocks, layout.input_blocks, multiprocessors, path, choice)


def timed(library: Any, device: torch.device, l2_bytes: int, choice: gpus.Choice) -> list[Time]:
    """bf16, then every width in groups of 128 by every path that takes so many tokens."""
    times = []
    generator = torch.Generator().manual_seed(0)
    for n_out, n_in in SHAPES:
        inputs = {tokens: torch.randn(tokens, n_in, generator=generator).bfloat16().to(device) for tokens in TOKENS}
        dense = [
            torch.randn(n_out, n_in, device=device).bfloat16() for _ in range(n_copies(2 * n_out * n_in, l2_bytes))
        ]
        for tokens, x in inputs.items():
            found = measure([partial(functional.linear, x, w) for w in dense])
            times.append(Time(n_out, n_in, 16, 0, tokens, "library", *found, 2 * n_out * n_in))
        del dense
        for bits in (4, 3, 2, 8):
            buffers, layout = _copies(device, generator, n_out, n_in, bits, l2_bytes)
            for tokens, x in inputs.items():
                paths: tuple[gpus.Path, ...] = ("decode", "tensor", "dequantize")
                for path in paths:
                    if (path == "decode" and tokens > 16) or (path == "tensor" and tokens > 256):
                        continue
                    splits = 1 if path == "dequantize" else _splits(layout, path, choice, device)
                    calls = [partial(linear, library, x, b, layout, path=path, splits=splits) for b in buffers]
                    times.append(Time(n_out, n_in, bits, 128, tokens, path, *measure(calls), layout.n_bytes))
            del buffers
            torch.cuda.empty_cache()
    return times


def _commit() -> str:
    done = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    raise SystemExit(main())
