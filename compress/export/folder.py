"""The folder of an export: free or not, and filled so that it is a model only when everything in it has been checked.

Files are written into OUT/.compress first and read back there. Then they move up, config.json last.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from compress.checkpoint.headers import read_json
from compress.checkpoint.result import WORK_FOLDER
from compress.checkpoint.seal import SEAL
from compress.checkpoint.writer import sync_folder, writing
from compress.errors import CheckpointError, RecipeError

STAGING = "export"
CONFIG = "config.json"


def check_out(out: Path, source: Path, overwrite: bool) -> None:
    """Raises: RecipeError if `out` is the source, or holds something that is not to be replaced."""
    try:
        if not out.exists():
            return
        if not out.is_dir():
            raise RecipeError(f"{out}: is a file; choose another --out")
        if out.samefile(source):
            raise RecipeError(f"{out}: is the folder that is exported; choose another --out")
        names = {path.name for path in out.iterdir()}
    except OSError as error:
        raise RecipeError(f"{out}: cannot be used: {error.strerror}; choose another --out") from None
    if names <= {WORK_FOLDER} and not (out / WORK_FOLDER / "journal.jsonl").exists():
        return  # empty, or an export that was broken off
    if not is_export(out):
        raise RecipeError(f"{out}: is not empty, and no export of ours; choose another --out")
    if not overwrite:
        raise RecipeError(f"{out}: holds an export already; choose another --out, or replace it with --overwrite")


def is_export(folder: Path) -> bool:
    """Whether an export of ours is in `folder`, whole or broken off while its files moved in."""
    return (folder / SEAL).is_file() or (folder / WORK_FOLDER / STAGING).is_dir()


@contextmanager
def staging(out: Path) -> Iterator[Path]:
    """A folder to write into, locked and removed again. What `install` has not moved out of it is gone afterwards."""
    existed = out.is_dir()
    work = out / WORK_FOLDER
    with writing(out):
        work.mkdir(parents=True, exist_ok=True)
        lock = os.open(work / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RecipeError(
                f"{out}: another export or run is writing here; wait for it or choose another --out"
            ) from None
        shutil.rmtree(work / STAGING, ignore_errors=True)
        with writing(out):
            (work / STAGING).mkdir()
        try:
            yield work / STAGING
        finally:
            shutil.rmtree(work, ignore_errors=True)
            if not existed:
                with suppress(OSError):
                    out.rmdir()
    finally:
        os.close(lock)


def install(stage: Path, out: Path) -> None:
    """Put what was written in its place, config.json last; an earlier export goes first."""
    old = _files_of(out)
    with writing(out):
        for name in (CONFIG, *sorted(old - {CONFIG})):
            (out / name).unlink(missing_ok=True)
        for folder in {(out / name).parent for name in old} - {out}:
            with suppress(OSError):
                folder.rmdir()
        names = sorted(path.relative_to(stage).as_posix() for path in stage.rglob("*") if path.is_file())
        for name in sorted(names, key=lambda name: (name == CONFIG, name)):
            (out / name).parent.mkdir(exist_ok=True)
            os.replace(stage / name, out / name)
        sync_folder(out)


def _files_of(out: Path) -> set[str]:
    """The files of an earlier export, by its own list; nothing else is ever removed."""
    if not (out / SEAL).is_file():
        return set()
    try:
        listed = read_json(out / SEAL).get("files")
    except CheckpointError:
        listed = None
    names = list(listed) if isinstance(listed, dict) else []
    inside = [n for n in names if isinstance(n, str) and n and ".." not in Path(n).parts and not Path(n).is_absolute()]
    return {*inside, SEAL, CONFIG}
