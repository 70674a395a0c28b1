"""Whether this is one of several processes, as accelerate or torchrun started them. Imports nothing slow."""

from __future__ import annotations

import os


def processes() -> int:
    return int(os.environ.get("WORLD_SIZE") or 1)


def is_main_process() -> bool:
    """The one that shows and writes."""
    return int(os.environ.get("RANK") or 0) == 0
