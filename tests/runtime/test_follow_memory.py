"""A stack that follows free memory."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch

import compress
from compress.checkpoint.budget import Budget
from compress.runtime.follow_memory import GROWTH, FollowMemory, first_budget, free_memory
from scripts.random_stack import Shape, random_stack

SHAPE = Shape(hidden=64, mlp=96, blocks=2, heads=4, kv_heads=2, vocabulary=300, positions=64)
KEEP = 10_000_000
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_stack(tmp_path_factory.mktemp("stack"), SHAPE, rank=4, blocks=4, file_bytes=10_000)


class Machine:
    """One on which others leave `free` bytes beside a model of its size at the beginning."""

    def __init__(self, model, free: int):
        self.model, self.taken = model, free + model.stack.nbytes

    def __call__(self) -> int:
        return self.taken - self.model.stack.nbytes


def test_it_shrinks_when_memory_is_short_and_grows_when_there_is_some_again(folder):
    model = compress.load(folder, memory_budget="8bits")
    machine = Machine(model, KEEP)
    follow = FollowMemory(model, KEEP, free=machine)
    assert follow.look() is None  # just as much as there shall be
    machine.taken -= 20_000
    change = follow.look()
    assert change.free == KEEP - 20_000 and change.done.nbytes < change.done.nbytes_before
    assert machine() >= KEEP  # what there shall be is there again, and no entry more was let go of than that took
    table, n = model.stack.table, model.stack.n_entries
    assert machine() - (table.nbytes(n + 1) - table.nbytes(n)) < KEEP
    machine.taken += 10**9
    assert follow.look().done.nbytes == table.maximum
    machine.taken -= 10**9 + 10**6
    assert follow.look().done.n_entries == 0 and follow.look() is None  # the smallest stays, however little there is
    assert [c.done.n_entries for c in follow.changes] == [n, len(table.entries), 0]


def test_it_does_not_follow_ripples_and_keeps_below_what_it_may_have(folder):
    model = compress.load(folder, memory_budget="6bits")
    machine = Machine(model, KEEP)
    follow = FollowMemory(model, KEEP, free=machine, most=Budget("8bits", bits=8.0))
    machine.taken += int(GROWTH * model.stack.nbytes / 2)
    assert follow.look() is None
    machine.taken += 10**9
    assert follow.look().done.bits <= 8 and follow.look() is None


def test_it_follows_beside_a_generation(folder):
    model = compress.load(folder)
    machine = Machine(model, KEEP)
    seen, told = [], threading.Event()
    follow = FollowMemory(model, KEEP, free=machine, every=0.001, tell=lambda change: (seen.append(change), told.set()))

    def less(*_) -> None:
        if len(seen) == 0 and machine() > 0:
            machine.taken = 0
        elif told.wait(10):
            machine.taken = 10**9

    model.get_submodule("model.norm").register_forward_hook(less)
    with follow:
        out = model.generate(torch.arange(8)[None], max_new_tokens=20, min_new_tokens=20, do_sample=False)
    assert out.shape == (1, 28) and follow.error is None
    assert seen == follow.changes and seen[0].done.n_entries == 0


def test_what_ends_it_early_is_told_and_the_model_goes_on(folder, tmp_path):
    own = random_stack(tmp_path, SHAPE, rank=4, blocks=4, file_bytes=10_000)
    model = compress.load(own, memory_budget="6bits")
    for file in own.glob("stack-*"):
        os.utime(file, (0, 0))
    with FollowMemory(model, KEEP, free=lambda: 10**9, every=0.001) as follow:
        follow._thread.join(10)
    assert "was replaced or changed" in str(follow.error)
    assert model(torch.arange(3)[None]).logits.isfinite().all()


def test_what_is_loaded_at_first_leaves_enough_free(folder, tmp_path):
    table = compress.load(folder).stack.table
    assert first_budget(folder, 0, None, CPU).nbytes == table.maximum
    assert first_budget(folder, 2**60, None, CPU).nbytes == table.minimum
    assert first_budget(folder, 0, Budget("6bits", bits=6.0), CPU).nbytes < table.maximum
    assert 0 < free_memory(CPU) <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
