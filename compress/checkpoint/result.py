"""What a folder of ours holds beside a checkpoint."""

from __future__ import annotations

from pathlib import Path

from compress.errors import CheckpointError

WORK_FOLDER = ".compress"  # while a run lasts
REPORT = "compress_report.json"
CARD = "README.md"
RECIPE = "recipe.yaml"


def refuse_unfinished(folder: Path) -> None:
    """Raises: CheckpointError if a run on this folder was interrupted."""
    if not (folder / WORK_FOLDER).is_dir():
        return
    missing = "no whole model yet" if not (folder / "config.json").exists() else "a model without its evaluation"
    raise CheckpointError(f"{folder}: an unfinished run, {missing}; give its compress run command again to finish it")
