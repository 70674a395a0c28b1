"""Run a command and measure the whole of it: CPU seconds, wall time, peak memory. Imports nothing heavy: a child that
starts from a large parent would inherit the parent's peak.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SAMPLE_SECONDS = 0.02
TAIL_LINES = 15  # of a failed command's output, shown in the error


@dataclass(frozen=True)
class Measurement:
    """What a process and the children it waited for took.

    `peak_resident_bytes` is the kernel's own maximum, pages of files included; `peak_anonymous_bytes` is sampled every
    SAMPLE_SECONDS and leaves out what the system can drop at will.
    """

    returncode: int
    cpu_s: float
    wall_s: float
    peak_resident_bytes: int
    peak_anonymous_bytes: int
    load: float  # of the machine, when it started
    output: Path


def measure(
    command: Sequence[str | Path],
    output: Path,
    environment: Mapping[str, str] | None = None,
    check: bool = True,
    before: Callable[[], None] | None = None,
) -> Measurement:
    """Run `command` to its end, in the folder of `output`, where its stdout and stderr go.

    `before` runs in the child before the command does: limits, for instance.


    Raises: RuntimeError with the end of its output if it fails and `check` is true.
    """
    load = os.getloadavg()[0]
    start = time.perf_counter()
    with open(output, "wb") as stream:
        child = subprocess.Popen(
            [str(c) for c in command], stdout=stream, stderr=subprocess.STDOUT, cwd=output.parent,
            env={**os.environ, **(environment or {})}, preexec_fn=before,
        )  # fmt: skip
        sampler = _Sampler(child.pid)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - start
    peak = sampler.stop()
    if check and child.returncode != 0:
        tail = "\n".join(output.read_text(errors="replace").splitlines()[-TAIL_LINES:])
        raise RuntimeError(f"{' '.join(map(str, command))}: exit code {child.returncode}\n{tail}")
    unit = 1 if sys.platform == "darwin" else 1024
    cpu = usage.ru_utime + usage.ru_stime
    return Measurement(child.returncode, cpu, wall, usage.ru_maxrss * unit, peak, load, output)


class _Sampler:
    """Looks at a process's anonymous memory (Linux) until stopped."""

    def __init__(self, pid: int):
        self._status = Path(f"/proc/{pid}/status")
        self._peak = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        self._stopped.set()
        self._thread.join()
        return self._peak

    def _watch(self) -> None:
        while not self._stopped.wait(SAMPLE_SECONDS):
            try:
                text = self._status.read_text()
            except OSError:
                return
            for line in text.splitlines():
                if line.startswith("RssAnon:"):
                    self._peak = max(self._peak, int(line.split()[1]) * 1024)


def threads_environment(threads: int) -> dict[str, str]:
    """The number of threads for every library that starts some, and waiting that takes no CPU time, the same for all tools."""
    counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    passive = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
    offline = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
    }
    return {**counts, **passive, **offline}


def commit() -> str:
    """The commit of the repository, marked where the package differs from it."""
    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", "compress")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + (" with changes" if changed else "")


def machine() -> str:
    """One line about this machine."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as lines:
            model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{os.cpu_count()} x {model}, {platform.system()} {platform.release()}, Python {platform.python_version()}"
