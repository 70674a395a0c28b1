"""What belongs to a model beside its weights: tokenizer, chat templates, generation config, licence."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import IO

from compress.checkpoint.source import SIDE_FILES
from compress.checkpoint.writer import replace_file, writing
from compress.errors import CheckpointError

TEMPLATES = "additional_chat_templates"


def side_files(source: Path) -> list[str]:
    """Their names in the folder `source`."""
    named = [f.name for f in source.iterdir() if any(fnmatch.fnmatch(f.name, p) for p in SIDE_FILES) and f.is_file()]
    return sorted([*named, *(f"{TEMPLATES}/{f.name}" for f in (source / TEMPLATES).glob("*") if f.is_file())])


def copy_file(file: Path, copy: Path) -> None:
    """Copy durably and atomically. Raises: CheckpointError as `replace_file`, or naming `file` if it cannot be read."""

    def write(stream: IO[bytes]) -> None:
        try:
            content = file.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read: {error.strerror}; fetch the model again") from None
        stream.write(content)

    with writing(copy):
        copy.parent.mkdir(exist_ok=True)
    replace_file(copy, write)
