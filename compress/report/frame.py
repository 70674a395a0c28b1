"""What every report begins with."""

from __future__ import annotations

import platform
from datetime import datetime, timezone
from typing import Any

from compress.report import SCHEMA


def frame(kind: str) -> dict[str, Any]:
    """Version of the schema, time, versions and machine. `kind`: "run" or "evaluation"."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from compress import __version__

    versions = {"compress-llm": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "schema": SCHEMA,
        "kind": kind,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions,
        "machine": {"platform": platform.platform(), "threads": torch.get_num_threads()},
    }
