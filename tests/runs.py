"""Small real runs, for tests that need one."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from compress.recipe import Recipe


def recipe_for(folder: Path, steps: list[dict[str, Any]], text: Path, **fields: Any) -> Recipe:
    return Recipe.from_dict(
        {
            "model": str(folder),
            "calibration": {"data": str(text), "samples": 6, "length": 48, "batch_size": 2},
            "steps": steps,
            "evaluation": {"data": str(text), "length": 48, "max_tokens": 480},
            **fields,
        }
    )


def fingerprints(folder: Path) -> dict[str, str]:
    """Checksums of all files but the report and its page, which hold timings."""
    return {
        f.name: hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(folder.iterdir())
        if f.is_file() and f.name not in ("compress_report.json", "compress_report.html")
    }
