"""Results as files, named and laid out as lm-eval does it."""

from __future__ import annotations

import errno
import json
import os
from datetime import datetime
from pathlib import Path
from typing import Any

from compress.errors import CheckpointError


def check_writable(place: Path, option: str) -> None:
    """Before the work, that there is a folder for what comes of it. Raises: CheckpointError naming `option`."""
    folder = place.parent if place.suffix == ".json" else place
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise CheckpointError(f"{option} {place}: cannot be written ({error.strerror}); name another place") from None


def save_results(results: dict[str, Any], output: Path, log_samples: bool = False) -> Path:
    """Write results as the harness does: `output`/MODEL/results_DATE.json, and with `log_samples` the questions of each
    task as samples_TASK_DATE.jsonl. An `output` that ends in .json is the very file, the questions beside it.

    Returns: the file of results.

    Raises: CheckpointError if it cannot be written.
    """
    from lm_eval.utils import hash_string, sanitize_list

    date = datetime.now().isoformat().replace(":", "-")
    samples = results.get("samples", {})
    hashes = {
        task: hash_string("".join(s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in answered))
        for task, answered in samples.items()
    }
    plain = {**{k: v for k, v in results.items() if k != "samples"}, "task_hashes": hashes if log_samples else {}}
    is_file = output.suffix == ".json"
    folder = output.parent if is_file else output / str(results["model_name_sanitized"])
    file = output if is_file else folder / f"results_{date}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(plain, indent=2, ensure_ascii=False), encoding="utf-8")
        for task, answered in samples.items() if log_samples else ():
            lines = []
            for sample in answered:
                arguments = {
                    f"gen_args_{i}": {f"arg_{j}": part for j, part in enumerate(given)}
                    for i, given in enumerate(sample["arguments"])
                }
                said = {key: sanitize_list(sample[key]) for key in ("resps", "filtered_resps")}
                line = {**sample, **said, "arguments": arguments, "target": str(sample["target"])}
                lines.append(json.dumps(line, ensure_ascii=False) + "\n")
            name = f"{output.stem}_samples_{task}.jsonl" if is_file else f"samples_{task}_{date}.jsonl"
            (folder / name).write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"--output {output}: cannot be written ({error.strerror}); name another place") from None
    return file
