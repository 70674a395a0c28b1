"""How much memory a run takes: the same for any number of blocks, and little enough for a large checkpoint.

    python scripts/bench_memory.py --depth     random Llamas of equal width with 8, 32 and 96 blocks: their peaks
    python scripts/bench_memory.py --limit     a checkpoint of over 6 GB, sharded and as one file, through rtn and gptq
                                               with 2 GiB of address space

Every run is the command `compress run` in a process of its own. Its anonymous memory is sampled from outside and by
itself. A limit of the address space counts everything that is mapped, used or not: libraries, stacks, reserved heaps.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from measure import Measurement, commit, machine, measure, threads_environment
from random_llama import Shape

HERE = Path(__file__).resolve().parent
TOLERANCE = 0.05  # by which peaks may differ between depths
WIDE = Shape(hidden=512, mlp=1408, heads=8, kv_heads=4, vocabulary=4096)
LARGE = Shape(
    hidden=2048, mlp=5632, heads=32, kv_heads=4, vocabulary=32000, blocks=70
)  # 1.1 B Llamas have 22 such blocks
STEPS = {
    "rtn": {"rtn": {"bits": 4, "group_size": 128}},
    "gptq": {"gptq": {"bits": 4, "group_size": 128}},
    "slicegpt": {"slicegpt": {"sparsity": 0.25}},
    "rotate": {"rotate": {"online": ["mlp"]}},
    "rotate_orthogonal": {"rotate": {"r1": "orthogonal"}},
    "drop_blocks": {"drop_blocks": {"n_drop": 1}},
    "drop_blocks_taylor": {"drop_blocks": {"n_drop": 1, "score": "taylor"}},
}


@dataclass(frozen=True)
class Run:
    """A measured run and what its own report says."""

    name: str
    measured: Measurement
    report: dict[str, Any]

    def row(self) -> str:
        own = self.report.get("peak_bytes", 0)
        return (
            f"| {self.name} | {self.measured.peak_anonymous_bytes / 1e6:.1f} | {own / 1e6:.1f} "
            f"| {self.measured.peak_resident_bytes / 1e6:.1f} | {self.measured.cpu_s:.0f} | {self.measured.wall_s:.0f} |"
        )


HEADER = "| run | peak anonymous MB | by its report | peak RSS MB | CPU s | wall s |\n|--|--:|--:|--:|--:|--:|"


def make_model(folder: Path, shape: Shape, shard_mb: int | None, threads: int) -> None:
    """The random model, written by a process of its own."""
    options = {
        "hidden": shape.hidden, "mlp": shape.mlp, "blocks": shape.blocks, "heads": shape.heads,
        "kv-heads": shape.kv_heads, "vocabulary": shape.vocabulary,
    }  # fmt: skip
    command: list[str | Path] = [sys.executable, HERE / "random_llama.py", folder]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    if shard_mb:
        command += ["--shard-mb", str(shard_mb)]
    measure(command, folder.parent / "model.log", threads_environment(threads))


def compress(
    name: str, model: Path, method: str, tokens: tuple[int, int], work: Path, threads: int, limit: int | None = None
) -> Run:
    """One `compress run`; `tokens` are rows and their length, `limit` the bytes of address space that it gets.

    Raises: RuntimeError with the end of its output if it fails.
    """
    samples, length = tokens
    recipe: dict[str, Any] = {"model": str(model), "steps": [STEPS[method]]}
    if method != "rtn":
        recipe["calibration"] = {"data": "shipped", "samples": samples, "length": length}
    (work / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    command: list[str | Path] = [sys.executable, HERE / "peers/compress_cli.py", "run", "--quiet"]
    command += ["--recipe", work / "recipe.yaml", "--out", out]
    measured = measure(command, work / "run.log", threads_environment(threads), before=_limiter(limit))
    report = json.loads((out / "compress_report.json").read_text())
    shutil.rmtree(out)
    return Run(name, measured, report)


def _limiter(limit: int | None) -> Callable[[], None] | None:
    if limit is None:
        return None
    nbytes = limit
    return lambda: resource.setrlimit(resource.RLIMIT_AS, (nbytes, nbytes))


def depth(options: argparse.Namespace, work: Path) -> tuple[list[Run], bool]:
    """Equal width, different depths. Returns the runs and whether their peaks agree."""
    runs = []
    for blocks in options.depths:
        model = work / "model"
        shape = replace(WIDE, hidden=options.hidden, mlp=options.mlp, blocks=blocks)
        make_model(model, shape, None, options.threads)
        name = f"{options.method}, {blocks} blocks"
        runs.append(compress(name, model, options.method, (options.samples, options.length), work, options.threads))
        shutil.rmtree(model)
        print(runs[-1].row(), file=sys.stderr, flush=True)
    peaks = [run.measured.peak_anonymous_bytes for run in runs]
    spread = max(peaks) / min(peaks) - 1
    print(f"{HEADER}\n" + "\n".join(run.row() for run in runs))
    print(f"peaks differ by {spread:.1%} (allowed: {TOLERANCE:.0%})")
    return runs, spread < TOLERANCE


def limit(options: argparse.Namespace, work: Path) -> tuple[list[Run], bool]:
    """A large checkpoint under a limit. Returns the runs and whether all went through."""
    runs, failures = [], []
    shape = replace(LARGE, blocks=options.blocks)
    nbytes = 2 * sum(prod(size) for size in shape.tensors().values())
    for kind, shard_mb in (("sharded", 1000), ("one file", None)):
        model = work / "model"
        make_model(model, shape, shard_mb, options.threads)
        for method in options.methods:
            name = f"{method}, {nbytes / 1e9:.2f} GB {kind}"
            allowed = int(options.gib * 2**30)
            try:
                runs.append(compress(name, model, method, (2, 256), work, options.threads, allowed))
                print(runs[-1].row(), file=sys.stderr, flush=True)
            except RuntimeError as error:
                failures.append(f"{name}: FAILED: {error}")
                print(failures[-1], file=sys.stderr, flush=True)
        shutil.rmtree(model)
    print(f"{HEADER}\n" + "\n".join([*(run.row() for run in runs), *failures]))
    return runs, not failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", action="store_true", help="measure depths (the default if nothing is chosen)")
    parser.add_argument("--limit", action="store_true", help="measure under a limit; needs 10 GB of disk, takes long")
    parser.add_argument("--depths", type=int, nargs="+", default=[8, 32, 96], help="[default: 8 32 96]")
    parser.add_argument("--method", choices=sorted(STEPS), default="gptq", help="of --depth [default: gptq]")
    parser.add_argument("--hidden", type=int, default=WIDE.hidden, help=f"of --depth [default: {WIDE.hidden}]")
    parser.add_argument("--mlp", type=int, default=WIDE.mlp, help=f"of --depth [default: {WIDE.mlp}]")
    parser.add_argument("--samples", type=int, default=8, help="calibration rows of --depth [default: 8]")
    parser.add_argument("--length", type=int, default=256, help="tokens in a row of --depth [default: 256]")
    parser.add_argument("--blocks", type=int, default=LARGE.blocks, help=f"of --limit [default: {LARGE.blocks}]")
    parser.add_argument("--gib", type=float, default=2.0, help="address space of --limit [default: 2]")
    parser.add_argument("--methods", nargs="+", choices=sorted(STEPS), default=["rtn", "gptq"], help="of --limit")
    parser.add_argument("--threads", type=int, default=2, help="[default: 2]")
    parser.add_argument("--work", type=Path, help="folder for models and results; by default a temporary one")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-memory-", dir=options.work) as temporary:
        print(f"commit {commit()}; {machine()}")
        done: dict[str, list[Run]] = {}
        good = True
        if options.depth or not options.limit:
            done["depth"], good = depth(options, Path(temporary))
        if options.limit:
            done["limit"], passed = limit(options, Path(temporary))
            good = good and passed
    if options.json:
        content = {
            k: [{"name": r.name, **vars(r.measured), "own": r.report["peak_bytes"]} for r in v] for k, v in done.items()
        }
        options.json.write_text(
            json.dumps({"commit": commit(), "machine": machine(), **content}, indent=2, default=str)
        )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
