"""Kill runs of the shipped model at random moments, give the same command again, compare every file.

    python scripts/bench_safe.py                  20 kills of a short run (32 calibration rows, 20 000 tokens evaluated)
    python scripts/bench_safe.py --full           20 kills of the whole demo

One run is not disturbed; its CPU time is the range from which moments are drawn, one from each of as many equal parts as
there are kills, so that they lie all over it, start and evaluation included, however busy the machine is. A third of the
runs are killed three times. SIGKILL goes to `python -m compress run` itself. All files but compress_report.json and
its page, which hold timings, must come out byte for byte, and once config.json is there, which makes a folder a model, every
other file must be whole. Exits with 1 at any difference. The code must not change meanwhile: run it in a clone of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REPORT, PAGE = "compress_report.json", "compress_report.html"
SHORT = ["calibration.samples=32", "evaluation.max_tokens=20000"]
POLL_SECONDS = 0.003
KILLS_OF_A_RUN = (1, 1, 3)  # runs in turn


@dataclass
class Killed:
    """One run: when it was killed, how far it was, and what came of it."""

    seconds: list[float] = field(default_factory=list)
    states: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def command(out: Path, full: bool) -> list[str]:
    overrides = [] if full else [word for override in SHORT for word in ("--set", override)]
    return [sys.executable, "-m", "compress", "run", "--recipe", "demo", *overrides, "--out", str(out), "--quiet"]


def start(out: Path, full: bool, log: Path) -> subprocess.Popen[bytes]:
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(ROOT)}
    with log.open("ab") as stream:
        return subprocess.Popen(command(out, full), stdout=stream, stderr=stream, env=environment, cwd=ROOT)


def to_its_end(out: Path, full: bool, log: Path) -> float:
    """Run undisturbed. Returns: CPU seconds."""
    _, status, usage = os.wait4(start(out, full, log).pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code != 0:
        raise SystemExit(f"{' '.join(command(out, full))}: exit code {code}\n{log.read_text()[-2000:]}")
    return usage.ru_utime + usage.ru_stime


def cpu_seconds(pid: int) -> float:
    """What a process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def killed_after(seconds: float, out: Path, full: bool, log: Path) -> bool:
    """Whether it was still running after `seconds` of CPU time, and is dead now."""
    process = start(out, full, log)
    while process.poll() is None and cpu_seconds(process.pid) < seconds:
        time.sleep(POLL_SECONDS)
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def checksums(folder: Path) -> dict[str, str]:
    files = [f for f in folder.rglob("*") if f.is_file() and f.name not in (REPORT, PAGE)]
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(files)}


def state(out: Path) -> str:
    """How far a run was, from what it left."""
    journal = out / ".compress" / "journal.jsonl"
    if not out.exists():
        return "before the folder"
    if (out / REPORT).exists():
        return "report written"
    if (out / "config.json").exists():
        return "evaluating"
    parts = journal.read_bytes().count(b"\n") - 1 if journal.exists() else 0
    beside = " and its side files" if (out / "recipe.yaml").exists() else ""
    return f"{max(parts, 0)} parts{beside}"


def half_whole(out: Path, expected: dict[str, str]) -> list[str]:
    """What is wrong with a folder whose run was killed: it may look like a model only if it is one."""
    if not (out / "config.json").exists():
        return []
    found = checksums(out)
    return [f"{name} differs beside config.json" for name, digest in expected.items() if found.get(name) != digest]


def differences(out: Path, expected: dict[str, str]) -> list[str]:
    found = checksums(out)
    return [name for name in sorted({*found, *expected}) if found.get(name) != expected.get(name)]


def one_run(moments: list[float], out: Path, full: bool, log: Path, expected: dict[str, str]) -> Killed:
    """Kill at each of the moments, then let it end."""
    run = Killed()
    for moment in moments:
        if killed_after(moment, out, full, log):
            run.seconds.append(moment)
            run.states.append(state(out))
            run.faults += half_whole(out, expected)
    to_its_end(out, full, log)
    run.faults += differences(out, expected)
    if not (out / REPORT).exists():
        run.faults.append(f"no {REPORT}")
    return run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="how many, at least [default: 20]")
    parser.add_argument("--seed", type=int, default=0, help="of the moments [default: 0]")
    parser.add_argument("--full", action="store_true", help="the demo as it is shipped")
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory(prefix="bench-safe-") as folder:
        work, log = Path(folder), Path(folder) / "log"
        seconds = to_its_end(work / "undisturbed", arguments.full, log)
        expected = checksums(work / "undisturbed")
        print(f"undisturbed: {seconds:.1f} CPU s, {len(expected)} files; seed {arguments.seed}", flush=True)
        print(f"{'run':>3}  {'killed after, CPU s':<20}  {'it had':<52}  files", flush=True)
        n_killed, n_wrong, number = 0, 0, 0
        moments: list[float] = []
        while n_killed < arguments.kills:
            if not moments:
                moments = [(i + draw.random()) * seconds / arguments.kills for i in range(arguments.kills)]
                draw.shuffle(moments)
            wanted = min(KILLS_OF_A_RUN[number % len(KILLS_OF_A_RUN)], arguments.kills - n_killed)
            chosen, moments = moments[:wanted], moments[wanted:]
            run = one_run(chosen, work / f"run{number}", arguments.full, log, expected)
            n_killed, n_wrong, number = n_killed + len(run.seconds), n_wrong + bool(run.faults), number + 1
            times = ", ".join(f"{s:.1f}" for s in run.seconds) or "(ended before)"
            verdict = "identical" if not run.faults else "DIFFERENT: " + ", ".join(dict.fromkeys(run.faults))
            print(f"{number:>3}  {times:<20}  {', '.join(run.states):<52}  {verdict}", flush=True)
    print(f"{n_killed} kills in {number} runs: {number - n_wrong} came out byte for byte, {n_wrong} did not")
    return 1 if n_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
