"""`compress eval --tasks` beside lm-eval's own command line: the same answers, and how long each takes.

    python scripts/bench_zeroshot.py                                     # the shipped model
    python scripts/bench_zeroshot.py --model ../shared/models/stories3M --rounds 5

Five tasks of scripts/tasks, 200 questions each. Every likelihood of every question must be equal bit by bit. The commands
take turns, so that whatever else the machine does meets both.
Needs the question files that scripts/tasks/benchmarks.py names.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from measure import commit, machine, measure, threads_environment

ROOT = Path(__file__).resolve().parents[1]
TASKS = ("local_arc_easy", "local_hellaswag", "local_piqa", "local_winogrande", "local_boolq")
ALLOWED = 1.10  # of lm-eval's median wall time
COMPARED = ("doc_hash", "prompt_hash", "target_hash", "filtered_resps", "acc", "acc_norm")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shipped")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    folder = ROOT / "compress" / "data" / "novels6m" if options.model == "shipped" else Path(options.model).resolve()
    with tempfile.TemporaryDirectory(prefix="bench-zeroshot-") as scratch:
        return compare(folder, options, Path(scratch))


def compare(folder: Path, options: argparse.Namespace, scratch: Path) -> int:
    commands = both(folder, options)
    environment = {**threads_environment(options.threads), "PYTHONPATH": str(ROOT), "LMEVAL_LOG_LEVEL": "ERROR"}
    walls: dict[str, list[float]] = {name: [] for name in commands}
    cpu: dict[str, list[float]] = {name: [] for name in commands}
    peaks: dict[str, int] = dict.fromkeys(commands, 0)
    answers: dict[str, dict[tuple[str, int], Any]] = {}
    for number in range(options.rounds):
        for name, command in commands.items():
            place = scratch / name
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            found = measure(command, place / "output.txt", environment)
            walls[name].append(found.wall_s)
            cpu[name].append(found.cpu_s)
            peaks[name] = max(peaks[name], found.peak_anonymous_bytes)
            answers[name] = read_answers(place / "results")
            print(f"round {number + 1}: {name} {found.wall_s:.1f} s", file=sys.stderr)
    theirs, ours = answers["lm-eval"], answers["compress"]
    different = [question for question in theirs if ours.get(question) != theirs[question]]
    ratio = median(walls["compress"]) / median(walls["lm-eval"])
    print(
        f"{folder.name}, {options.dtype}, {options.limit} questions of each of {len(TASKS)} tasks, batch size "
        f"{options.batch_size}, {options.threads} threads, {options.rounds} rounds; commit {commit()}; {machine()}\n"
    )
    print("| command | median wall s | all wall s | median CPU s | peak memory MiB |\n|--|--:|--|--:|--:|")
    for name in commands:
        rounds = ", ".join(f"{wall:.1f}" for wall in walls[name])
        print(
            f"| {name} | {median(walls[name]):.1f} | {rounds} | {median(cpu[name]):.1f} | {peaks[name] / 2**20:.0f} |"
        )
    same = len(theirs) - len(different)
    print(f"\nquestions answered alike: {same} of {len(theirs)}; compress / lm-eval: {ratio:.2f}")
    return int(bool(different) or len(ours) != len(theirs) or ratio > ALLOWED)


def both(folder: Path, options: argparse.Namespace) -> dict[str, Sequence[str]]:
    """The two command lines that ask the same."""
    tasks, size, limit = ",".join(TASKS), str(options.batch_size), str(options.limit)
    yaml = str(ROOT / "scripts" / "tasks")
    return {
        "lm-eval": [
            sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={folder},dtype={options.dtype}",
            "--tasks", tasks, "--include_path", yaml, "--limit", limit, "--batch_size", size, "--device", "cpu",
            "--output_path", "results", "--log_samples",
        ],
        "compress": [
            sys.executable, "-m", "compress", "eval", str(folder), "--dtype", options.dtype, "--tasks", tasks,
            "--include-path", yaml, "--limit", limit, "--batch-size", size, "--device", "cpu", "--output", "results",
            "--log-samples",
        ],
    }  # fmt: skip


def read_answers(folder: Path) -> dict[tuple[str, int], Any]:
    """(task, question) -> what was asked and answered, from the files that both commands write."""
    answers = {}
    for task in TASKS:
        (file,) = folder.glob(f"*/samples_{task}_*.jsonl")
        for line in file.read_text(encoding="utf-8").splitlines():
            sample = json.loads(line)
            answers[task, sample["doc_id"]] = [sample.get(key) for key in COMPARED]
    return answers


if __name__ == "__main__":
    raise SystemExit(main())
