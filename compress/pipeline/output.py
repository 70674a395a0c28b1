"""The output folder: what in it is ours, and whether it is free, begun or finished.

Before the first shard is written, the names of all files to come are noted in the folder. So `--overwrite` removes what a
run of ours left there and nothing else: a file that somebody put beside the result stays.
"""

from __future__ import annotations

import json
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from compress.checkpoint.headers import read_json
from compress.checkpoint.result import REPORT as REPORT
from compress.checkpoint.result import WORK_FOLDER as WORK_FOLDER
from compress.checkpoint.stack import STACK
from compress.checkpoint.writer import PARTIAL, write_json, writing
from compress.errors import CheckpointError, RecipeError
from compress.report import PAGE as PAGE

FILES = "files.json"
OBSERVED = "observed-"  # + a step's number: what was settled before the first block
CONFIG = "config.json"
SHARD = re.compile(r"(model|compress|stack)-\d{5}-of-\d{5}\.safetensors")
INDEXES = ("model.safetensors.index.json", "compress.safetensors.index.json", STACK)


def check_output(folder: Path, model: str) -> None:
    """Raises: RecipeError if `folder` is the model's own, or holds something that no run of ours made."""
    try:
        source = Path(model).expanduser()
        if source.is_dir() and folder.is_dir() and folder.samefile(source):
            raise RecipeError(f"{folder}: is the folder of the model itself; choose another --out")
        if folder.exists() and not folder.is_dir():
            raise RecipeError(f"{folder}: is a file; choose another --out")
        if folder.is_dir() and any(folder.iterdir()) and not _is_ours(folder):
            raise RecipeError(f"{folder}: is not empty and not made by compress; choose another --out")
    except OSError as error:
        raise RecipeError(f"{folder}: cannot be used: {error.strerror}; choose another --out") from None


def _is_ours(folder: Path) -> bool:
    return (folder / WORK_FOLDER).is_dir() or (folder / REPORT).is_file()


def finished_report(folder: Path, header: dict[str, Any]) -> dict[str, Any] | None:
    """The report of a finished run of the same work in `folder`; None if there is none.

    Raises: RecipeError if the finished run was another one, CheckpointError if its files are no longer whole.
    """
    if not (folder / REPORT).exists():
        return None
    try:
        report = read_json(folder / REPORT)
    except CheckpointError as error:
        raise CheckpointError(f"{error}, or make the result again with --overwrite") from None
    if report.get("work") != header:
        raise RecipeError(
            f"{folder}: holds the result of another run (recipe, model or version differ); choose another --out or "
            f"discard it with --overwrite"
        )
    for name, nbytes in _listed(report):
        file = folder / name
        if not file.is_file() or (name.endswith(".safetensors") and file.stat().st_size != nbytes):
            raise CheckpointError(f"{file}: is missing or was changed after the run; make it again with --overwrite")
    return report


def note_files(folder: Path, names: list[str]) -> None:
    """Note the names of all files that this run will write."""
    write_json(folder / WORK_FOLDER / FILES, names)


def leave(folder: Path) -> None:
    """The run is over: only the result stays."""
    shutil.rmtree(folder / WORK_FOLDER, ignore_errors=True)


def discard(folder: Path, keep_observed: bool = False) -> None:
    """Remove what a run of ours left, and nothing else: config.json first, so that the rest is no model, the report last.

    `keep_observed`: not what was settled before the first block.
    """
    names = {file.name for file in folder.iterdir() if SHARD.fullmatch(file.name)} | {*INDEXES, CONFIG, *_noted(folder)}
    for name in (CONFIG, *sorted(names - {CONFIG}), PAGE, REPORT):
        for file in (folder / name, folder / (name + PARTIAL)):
            with writing(file):
                file.unlink(missing_ok=True)
        if "/" in name:
            _remove_empty((folder / name).parent)
    for file in (folder / WORK_FOLDER).iterdir():
        kept = file.name == "lock" or (keep_observed and file.name.startswith(OBSERVED))
        if not kept and file.is_file():
            with writing(file):
                file.unlink(missing_ok=True)


def _noted(folder: Path) -> list[str]:
    """The names in the note of a begun run or in the report of a finished one."""
    names: list[Any] = []
    for file in (folder / WORK_FOLDER / FILES, folder / REPORT):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        names += content if isinstance(content, list) else [name for name, _ in _listed(content)]
    inside = [name for name in names if isinstance(name, str) and name and ".." not in Path(name).parts]
    return [name for name in inside if not Path(name).is_absolute() and not (folder / name).is_dir()]


def _listed(report: Any) -> list[tuple[str, Any]]:
    files = report.get("files") if isinstance(report, dict) else None
    return list(files.items()) if isinstance(files, dict) else []


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()
