"""The benchmarks of stacks work, at sizes that say nothing about speed, and count what they say they count."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.random_stack import Shape, random_stack

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
SHAPE = Shape(hidden=128, mlp=256, blocks=2, heads=4, kv_heads=2, vocabulary=300, positions=64)


def answer(name: str, arguments: list[object], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments), "--json"])
    monkeypatch.syspath_prepend(SCRIPTS)
    runpy.run_path(str(SCRIPTS / name), run_name="__main__")
    return json.loads(capsys.readouterr().out)


@pytest.mark.skipif(
    sys.platform != "linux", reason="anonymous memory is read from /proc, caches are dropped by fadvise"
)
def test_growing_is_timed_beside_reading_the_same_bytes(tmp_path, monkeypatch, capsys):
    shape = Shape(**{**SHAPE.__dict__, "mlp": 2048})
    random_stack(tmp_path, shape, blocks=6, file_bytes=200_000)
    found = answer("bench_bitstack_resize.py", [tmp_path, "--grow-mib", 0.5, "--rounds", 2], monkeypatch, capsys)
    assert 0.4 * 2**20 < found["grown_by_bytes"] <= 0.5 * 2**20 and found["files_touched"] > 1
    assert len(found["grow_seconds"]) == len(found["pread_seconds"]) == 2 and found["ratio"] > 0


def test_decoding_is_timed_at_each_size(tmp_path, monkeypatch, capsys):
    sizes = ["--hidden", 128, "--mlp", 256, "--blocks", 1, "--heads", 4, "--kv-heads", 2, "--vocabulary", 300]
    options = ["--stack-blocks", "1,3", "--tokens", 2, "--rounds", 1, "--context", 4, "--torch", "--work", tmp_path]
    found = answer("bench_bitstack_decode.py", [*sizes, *options], monkeypatch, capsys)["models"]
    assert list(found) == [
        "dense bfloat16", "1 blocks", "1, rebuilt", "1, torch", "3 blocks", "3, rebuilt", "3, torch"
    ]  # fmt: skip
    assert found["3 blocks"]["layer_bytes"] == 3 * found["1 blocks"]["layer_bytes"]
    assert all(kept["tokens_per_second"] > 0 for kept in found.values())
