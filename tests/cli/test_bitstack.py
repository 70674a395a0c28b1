from __future__ import annotations

import json
from pathlib import Path

from scripts.random_stack import random_stack
from tests.checkpoint.test_stack import SHAPE


def test_refusals_name_what_works(compress, make) -> None:
    recipe = make({"bitstack": {"rank": 65}})
    assert "use at most 64" in compress("plan", "--recipe", recipe).error
    mixed = make({"bitstack": {"rank": 2}, "overrides": {"*.q_proj": {"order": "levels"}}})
    assert (
        "order is" in (error := compress("plan", "--recipe", mixed).error) and "set it for all of them alike" in error
    )
    error = compress("plan", "--recipe", recipe, "--set", "steps.0.bitstack.order=best").error
    assert "order" in error and "proxy" in error


def test_the_plan_lists_the_sizes(compress, make) -> None:
    recipe = make({"bitstack": {"rank": 2, "blocks": 3}})
    shown = compress("plan", "--recipe", recipe).out
    assert "loads at any size from" in shown and "level 3:" in shown and "level 4:" not in shown
    stack = json.loads(compress("plan", "--recipe", recipe, "--json").out)["stack"]
    assert [level["level"] for level in stack["levels"]] == [1, 2, 3]
    assert stack["maximum"] - stack["minimum"] == sum(level["bytes"] for level in stack["levels"][1:])


def test_a_stack_is_looked_at_and_frozen_at_any_size(compress, tmp_path: Path) -> None:
    folder = random_stack(tmp_path / "stack", SHAPE, rank=4, blocks=3, file_bytes=10_000)
    whole = json.loads(compress("inspect", folder, "--json", "--check").out)["stack"]
    assert whole["blocks"] == whole["blocks_all"] == whole["blocks_available"] and whole["loss"] is None
    half = json.loads(compress("inspect", folder, "--json", "--memory-budget", "4bits").out)
    assert half["stack"]["bits_per_weight"] <= 4 and half["bytes_total"] == half["stack"]["bytes"] < whole["maximum"]
    error = compress("inspect", folder, "--memory-budget", "9KB", "--quiet").error
    assert f"the smallest model that it holds takes {whole['minimum']:,} bytes" in error
    assert "is too little" in compress("eval", folder, "--memory-budget", "1bits").error
    assert "--memory-budget='much' is no size" in compress("inspect", folder, "--memory-budget", "much").error
    assert "is no stack" in compress("eval", "shipped", "--memory-budget", "1GiB").error
    assert "tasks and speed take the whole model" in compress(
        "eval", folder, "--memory-budget", "4bits", "--speed", "--data", "shipped"
    ).error  # fmt: skip
    out = tmp_path / "frozen"
    done = compress("export", folder, "--format", "dense", "--memory-budget", "4bits", "--out", out, "--quiet")
    assert done.code == 0 and (out / "model.safetensors").exists()
    sorted(folder.glob("stack-*"))[-1].unlink()
    looked = compress("inspect", folder)
    assert "stacked blocks are lost" in looked.err and looked.code == 0
