"""Runs that die by SIGKILL at a chosen moment of their work: a file being written, renamed, noted, or nothing at all.

A run is started in a process of its own (forked from a server that has torch loaded) in which the calls that reach the disk
are watched. Nothing in the package knows of it.
"""

from __future__ import annotations

import fnmatch
import json
import multiprocessing
import os
import signal
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "transformers", "compress.pipeline.run", "compress.evaluation.evaluate"])


@dataclass(frozen=True)
class Moment:
    """When to die: at the `nth` call of `call` (os.fsync, os.replace, advance, rmtree) whose file or phase matches `at`.

    `how`: before the call, after it, or "torn": with the file that is being written cut off in its middle.
    """

    call: str
    at: str = "*"
    how: str = "before"
    nth: int = 1

    def __str__(self) -> str:
        return f"{self.how} {self.call} {self.nth} of {self.at}"


def run_until(moment: Moment | None, recipe: dict[str, Any], out: Path, n_threads: int) -> int:
    """Run `recipe` in a process that dies at `moment`. Returns: its exit code, -9 if it was killed."""
    process = CONTEXT.Process(target=_run, args=(json.dumps(moment and asdict(moment)), recipe, str(out), n_threads))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _run(moment: str, recipe: dict[str, Any], out: str, n_threads: int) -> None:
    import shutil

    import torch

    from compress.pipeline.progress import Silent
    from compress.pipeline.run import run
    from compress.recipe import Recipe

    torch.set_num_threads(n_threads)
    fields = json.loads(moment)
    watch = _Watch(Moment(**fields)) if fields else None

    class Watched(Silent):
        phase = ""

        def begin(self, phase: str, total: int, unit: str) -> None:
            self.phase = phase

        def advance(self, steps: int = 1, detail: str = "") -> None:
            if watch is not None:
                watch.seen("advance", self.phase)

    if watch is not None:
        os.fsync = watch.around("os.fsync", os.fsync, lambda fd: os.readlink(f"/proc/self/fd/{fd}"))
        os.replace = watch.around("os.replace", os.replace, lambda _, path: str(path))
        shutil.rmtree = watch.around("rmtree", shutil.rmtree, lambda path, **_: str(path))
    run(Recipe.from_dict(recipe), out, progress=Watched())


class _Watch:
    def __init__(self, moment: Moment):
        self.moment, self.count = moment, 0

    def seen(self, call: str, at: str) -> bool:
        """Count a call; die, or say that this is the one, after which to die."""
        if call != self.moment.call or not fnmatch.fnmatch(at, self.moment.at):
            return False
        self.count += 1
        if self.count != self.moment.nth:
            return False
        if self.moment.how == "before":
            die()
        return True

    def around(self, call: str, function: Any, place: Any) -> Any:
        def watched(*args: Any, **kwargs: Any) -> Any:
            chosen = self.seen(call, place(*args, **kwargs))
            if chosen and self.moment.how == "torn":
                os.ftruncate(args[0], os.fstat(args[0]).st_size - 40)
                die()
            result = function(*args, **kwargs)
            if chosen:
                die()
            return result

        return watched


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
