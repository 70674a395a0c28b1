"""The page, as a file."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.checkpoint.writer import write_text
from compress.errors import CheckpointError
from compress.report import SCHEMA


def write_page(report: Mapping[str, Any], file: Path) -> None:
    """Write the page of a report, JSON as `compress run` or `compress eval --json` makes it.

    Raises: CheckpointError if it is no such report, if matplotlib is missing, or the file cannot be written.
    """
    if report.get("schema") != SCHEMA:
        raise CheckpointError(
            f"{file}: cannot be made from a report of version {report.get('schema')!r}, this compress-llm writes version "
            f"{SCHEMA}; give the compress run command again, which measures anew"
        )
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells when it looks for fonts
    try:
        from compress.report.page import page

        made = page(report)
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise CheckpointError(
            f"{file}: the page needs matplotlib, which is not installed: pip install matplotlib"
        ) from None
    write_text(file, made)
