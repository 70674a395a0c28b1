"""`compress generate` on a stack: at a budget, and following free memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compress.runtime import follow_memory
from scripts.random_stack import Shape, random_stack
from tests.tiny_models import save_tiny

SHAPE = Shape(hidden=64, mlp=96, blocks=2, heads=4, kv_heads=2, vocabulary=300, positions=64)
LINE = ["--prompt", "It was", "-n", 6, "--greedy"]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_stack(tmp_path_factory.mktemp("stack"), SHAPE, rank=4, blocks=4, file_bytes=10_000)


def test_a_budget_is_what_is_loaded_and_said(stack, compress):
    answer = compress("generate", stack, *LINE, "--memory-budget", "6bits")
    assert answer.code == 0
    assert (
        "119.62 KiB of 163.62 KiB, 5.87 bits per weight of the stacked layers; the smallest is 97.62 KiB" in answer.err
    )
    found = json.loads(compress("generate", stack, *LINE, "--memory-budget", "6bits", "--json", "--quiet").out)
    assert found["model_bytes"] == 122_496 and "changes" not in found


def test_following_memory_loads_what_leaves_enough_and_shows_its_changes(stack, compress, monkeypatch):
    found = json.loads(compress("generate", stack, *LINE, "--follow-memory", "4000GiB", "--json", "--quiet").out)
    assert found["model_bytes"] == 99_968 and found["changes"] == []
    free = iter([10**9])  # when it is loaded; afterwards there is less than shall be kept
    monkeypatch.setattr(follow_memory, "free_memory", lambda device: next(free, 0))
    monkeypatch.setattr(follow_memory.FollowMemory.__init__, "__kwdefaults__", {
        **follow_memory.FollowMemory.__init__.__kwdefaults__, "every": 0.001
    })  # fmt: skip
    answer = compress("generate", stack, *LINE[:3], 50, "--follow-memory", "1MiB", "--memory-budget", "8bits")
    assert answer.code == 0 and "0 bytes free; 135.62 KiB -> 97.62 KiB, 2.93 bits per weight]" in answer.err


def test_sizes_that_cannot_be_are_one_line(stack, compress, tmp_path):
    below = compress("generate", stack, *LINE, "--memory-budget", "1KiB").error
    assert "too little" in below and "99,968 bytes" in below
    assert "--memory-budget='much' is no size" in compress("generate", stack, *LINE, "--memory-budget", "much").error
    assert "--follow-memory" in compress("generate", stack, *LINE, "--follow-memory", "some").error
    plain = save_tiny("llama", tmp_path)
    for option in ("--memory-budget", "--follow-memory"):
        assert "is no stack" in compress("generate", plain, *LINE, option, "1GiB").error
