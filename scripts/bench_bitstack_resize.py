"""Growing a loaded stack, beside a plain `pread` of the same bytes into fresh memory; and what shrinking gives back.

The model is a random stack (scripts/random_stack.py) of about a billion parameters. Each round: its files are dropped
from the page cache (posix_fadvise), the model is grown by --grow-mib and timed; they are dropped again, and the very bytes of the
growth are read by pread, 16 MiB at a time, into memory that was just mapped; the other way round every second round. Processor
time is told beside: it counts what was computed, whatever else the machine does. Then the model is shrunk, and the anonymous
resident memory of the process is held against what it was before.

    python scripts/random_stack.py out/stack --hidden 2048 --mlp 5632 --blocks 20 --heads 16 --kv-heads 16 \\
        --vocabulary 32000 --stack-blocks 4
    python scripts/bench_bitstack_resize.py out/stack
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package beside this script, installed or not

import torch

import compress
from compress.checkpoint.budget import Budget

MIB = 2**20
PIECE = 16 * MIB


def anonymous_bytes() -> int:
    """Anonymous resident memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def drop(files: list[Path]) -> None:
    """What the page cache holds of `files` goes."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def extents(table: Any, first: int, last: int) -> list[tuple[Path, int, int]]:
    """Where entries `first` to `last` lie: file, offset, bytes, neighbours in one."""
    found: list[tuple[Path, int, int]] = []
    for entry in table.entries[first:last]:
        file = table.folder / table.files[entry.file].name
        if found and found[-1][0] == file and found[-1][1] + found[-1][2] == entry.offset:
            found[-1] = (file, found[-1][1], found[-1][2] + entry.nbytes)
        else:
            found.append((file, entry.offset, entry.nbytes))
    return found


def plain_read(parts: list[tuple[Path, int, int]]) -> tuple[float, float]:
    """Seconds, and seconds of processor time, to read `parts` by pread into memory that was not touched before."""
    start, used = time.perf_counter(), time.process_time()
    memory = mmap.mmap(-1, sum(nbytes for _, _, nbytes in parts))
    view, done = memoryview(memory), 0
    for file, offset, nbytes in parts:
        descriptor = os.open(file, os.O_RDONLY)
        end = offset + nbytes
        while offset < end:
            n = os.preadv(descriptor, [view[done : done + min(PIECE, end - offset)]], offset)
            offset, done = offset + n, done + n
        os.close(descriptor)
    seconds = time.perf_counter() - start, time.process_time() - used
    view.release()
    memory.close()
    return seconds


def measure(folder: Path, grow_bytes: int, rounds: int, cold: bool) -> dict[str, Any]:
    model = compress.load(folder)
    table = model.stack.table
    files = [folder / file.name for file in table.files]
    start = table.maximum - grow_bytes - MIB
    if start < table.minimum:
        raise SystemExit(f"{folder}: the stack has {table.maximum - table.minimum:,} bytes; give --grow-mib less")
    with torch.inference_mode():
        model(torch.arange(8)[None])  # what a first pass allocates is there before memory is compared
    model.resize(start)
    small, first = anonymous_bytes(), model.stack.n_entries
    goal = model.stack.nbytes + grow_bytes
    parts = extents(table, first, model.stack.table.prefix_for(Budget(str(goal), nbytes=goal)))
    names = ("grow", "grow_cpu", "pread", "pread_cpu", "shrink", "large", "given_back")
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):  # the first one warms up

        def grown() -> None:
            if cold:
                drop(files)
            begin, used = time.perf_counter(), time.process_time()
            done = model.resize(goal)
            found["grow"].append(time.perf_counter() - begin)
            found["grow_cpu"].append(time.process_time() - used)
            assert done.nbytes - done.nbytes_before == sum(nbytes for _, _, nbytes in parts)

        def read() -> None:
            if cold:
                drop(files)
            seconds, used = plain_read(parts)
            found["pread"].append(seconds)
            found["pread_cpu"].append(used)

        for step in (grown, read) if number % 2 else (read, grown):
            step()
        large = anonymous_bytes()
        begin = time.perf_counter()
        model.resize(start)
        found["shrink"].append(time.perf_counter() - begin)
        found["large"].append(large - small)
        found["given_back"].append(large - anonymous_bytes())
    kept = {name: values[1:] for name, values in found.items()}
    nbytes = sum(nbytes for _, _, nbytes in parts)
    return {
        "model_parameters": table.n_weights,
        "model_bytes": table.nbytes(first),
        "grown_by_bytes": nbytes,
        "files_touched": len({part[0] for part in parts}),
        "cold": cold,
        "grow_seconds": kept["grow"],
        "pread_seconds": kept["pread"],
        "ratio": median(a / b for a, b in zip(kept["grow"], kept["pread"], strict=True)),
        "grow_cpu_seconds": kept["grow_cpu"],
        "pread_cpu_seconds": kept["pread_cpu"],
        "cpu_ratio": median(a / b for a, b in zip(kept["grow_cpu"], kept["pread_cpu"], strict=True)),
        "grow_bytes_per_second": nbytes / median(kept["grow"]),
        "shrink_seconds": kept["shrink"],
        "anonymous_bytes_grown": kept["large"],
        "anonymous_bytes_given_back": kept["given_back"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of scripts/random_stack.py, or any stack")
    parser.add_argument("--grow-mib", type=float, default=100)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warm", action="store_true", help="leave the files in the page cache")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    from transformers.utils import logging

    logging.disable_progress_bar()
    found = measure(options.folder, int(options.grow_mib * MIB), options.rounds, not options.warm)
    if options.json:
        print(json.dumps(found, indent=2))
        return
    nbytes = found["grown_by_bytes"]
    print(
        f"{found['model_parameters'] / 1e6:,.0f} M stacked weights, {found['model_bytes'] / MIB:,.0f} MiB, grown by "
        f"{nbytes / MIB:.1f} MiB, {'cold' if found['cold'] else 'warm'} cache, medians of {options.rounds}"
    )
    for name in ("grow", "pread", "shrink"):
        seconds = found[f"{name}_seconds"]
        spread = f"[{min(seconds) * 1e3:.1f}–{max(seconds) * 1e3:.1f}]"
        used = found.get(f"{name}_cpu_seconds")
        cpu = "" if used is None else f", {median(used) * 1e3:.1f} ms of processor time"
        print(f"{name:7} {median(seconds) * 1e3:8.1f} ms {spread}  {nbytes / median(seconds) / 1e9:.2f} GB/s{cpu}")
    print(f"grow / pread: {found['ratio']:.2f}, of processor time {found['cpu_ratio']:.2f} (medians of the rounds)")
    back = [a / b for a, b in zip(found["anonymous_bytes_given_back"], found["anonymous_bytes_grown"], strict=True)]
    print(
        f"anonymous memory: +{median(found['anonymous_bytes_grown']) / MIB:.1f} MiB grown, "
        f"{100 * median(back):.1f} % of it given back by shrinking"
    )


if __name__ == "__main__":
    main()
