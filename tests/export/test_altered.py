"""Exports that were cut or altered are an error that names file and tensor, or load correctly; never silently wrong."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "alter_exports.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("alter_exports", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["alter_exports"] = module
    spec.loader.exec_module(module)
    return module


def test_a_hundred_alterations(script: ModuleType, tmp_path: Path):
    outcomes = script.alter(tmp_path, 100, seed=0)
    assert [found for found in outcomes if found.verdict == "wrong"] == []
    verdicts = Counter(found.verdict for found in outcomes)
    assert verdicts["error"] >= 90
    assert {found.alteration for found in outcomes} == script.ALTERATIONS.keys()
    # What loads was never about weights or how to read them.
    assert all("deleted" in found.where or "bit of" in found.where for found in outcomes if found.verdict == "correct")


def test_without_checksums_shapes_still_count(script: ModuleType, tmp_path: Path):
    """Where compress_export.json was deleted, what headers show is still an error."""
    import random

    from compress.errors import CheckpointError

    for format_ in ("gptq", "awq"):
        out = script.make(tmp_path, format_)
        (out / "compress_export.json").unlink()
        for name in ("tensor left out", "file cut", "tensor renamed", "bytes appended"):
            picks = random.Random(3)
            copy = tmp_path / f"{format_}-{name}"
            script.shutil.copytree(out, copy)
            where, _ = script.ALTERATIONS[name](copy, picks)
            with pytest.raises(CheckpointError):
                script.logits(copy)
                pytest.fail(f"{format_}: {where}")
