"""Compressed checkpoints in the formats that servers and other libraries read; one file per format.

`compress.export(folder, "gptq")` calls this package itself: the folder and the function of the public API share a name.
Nothing heavy is imported before that.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.checkpoint.budget import Budget
    from compress.pipeline.progress import Progress


class _Export(ModuleType):
    def __call__(
        self,
        folder: str | Path,
        format: str,
        out: str | Path | None = None,
        *,
        overwrite: bool = False,
        revision: str | None = None,
        progress: Progress | None = None,
        memory_budget: Budget | str | int | None = None,
    ) -> dict[str, Any]:
        """Write a compressed checkpoint in another format, read it back, and say what was written.

        Args:
            folder: a compressed checkpoint: a folder, or a Hub id.
            format: "compressed-tensors", "gptq", "awq" or "dense".
            out: a new folder; by default FOLDER-FORMAT.
            overwrite: discard an earlier export that `out` holds.
            revision: a branch, tag or commit on the Hub.
            progress: told what is going on.
            memory_budget: of a stack, export what fits: as `compress.load` has it.

        Returns: what the command line prints with --json.
        Raises: RecipeError where the format cannot hold a layer, naming it and the formats that can, or `out` is taken;
            CheckpointError if files are damaged, cannot be written, or do not read back as what was written.
        """
        from compress.export.run import export

        return export(
            folder, format, out, overwrite=overwrite, revision=revision, progress=progress, memory_budget=memory_budget
        )  # fmt: skip


sys.modules[__name__].__class__ = _Export
