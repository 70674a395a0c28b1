"""The CUDA kernels on the CPU (cuda/emulate), built once per state of the sources and shared by all workers."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import Any

import pytest

from compress.kernels.cuda import build, native

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "cuda"  # not in git


def cached(name: str) -> Path:
    """A place for something made from the sources as they are now."""
    folder = FOLDER / build.source_digest()
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name


class Lock:
    """One process at a time builds; the others find what it built."""

    def __init__(self, name: str):
        self.path = cached(name + ".lock")

    def __enter__(self) -> None:
        self.file = self.path.open("w")
        fcntl.flock(self.file, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        self.file.close()


def emulation() -> Any:
    """The library; skips where there is no C++ compiler."""
    path = cached("emulation.so")
    with Lock("emulation"):
        if not path.is_file():
            try:
                build.build_emulation(path)
            except build.BuildError as error:
                if "no C++ compiler" in str(error):
                    pytest.skip(f"the CUDA kernels are not run on the CPU: {error}")
                raise
    return native.load(path)
