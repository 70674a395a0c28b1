"""Questions of public benchmarks from plain files, for the tasks in this folder: no network is needed.

The files lie in data/benchmarks of the folder that COMPRESS_SHARED names, by default `shared` beside the checkout.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import datasets

SHARED = Path(os.environ.get("COMPRESS_SHARED") or Path(__file__).resolve().parents[3] / "shared")
HELLASWAG_LINES = 6  # of an item: context, index of the right ending, four endings


def questions(benchmark: str, **_: Any) -> dict[str, datasets.Dataset]:
    """The test split of `benchmark`, the name of a file."""
    folder = SHARED / "data" / "benchmarks"
    if benchmark == "hellaswag":
        lines = (folder / "hellaswag_val.txt").read_text(encoding="utf-8").splitlines()
        items = [lines[i : i + HELLASWAG_LINES] for i in range(0, len(lines), HELLASWAG_LINES)]
        rows = [{"query": item[0], "gold": int(item[1]), "choices": item[2:]} for item in items]
    else:
        rows = [json.loads(line) for line in (folder / f"{benchmark}.jsonl").read_text(encoding="utf-8").splitlines()]
    return {"test": datasets.Dataset.from_list(rows)}
