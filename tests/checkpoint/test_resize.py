"""A loaded stack grown and shrunk: bit for bit a fresh load, between forward passes, reading what is new only."""

from __future__ import annotations

import copy
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import compress
from compress.checkpoint.resize import Gate
from compress.checkpoint.stack import StackTable
from compress.errors import CheckpointError, RecipeError
from scripts.random_stack import Shape, random_stack

SHAPE = Shape(hidden=64, mlp=96, blocks=2, heads=4, kv_heads=2, vocabulary=300, positions=64)
IDS = torch.arange(12)[None]
SIZES = ["3.2bits", "6bits", "8bits", "1GiB"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_stack(tmp_path_factory.mktemp("stack"), SHAPE, rank=4, blocks=4, file_bytes=10_000)


@pytest.fixture
def own(folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(folder, tmp_path / "stack"))


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


@pytest.fixture(scope="module")
def fresh(folder: Path) -> dict[str, torch.Tensor]:
    """Logits of a fresh load of each size."""
    found = {size: logits(compress.load(folder, memory_budget=size)) for size in SIZES}
    assert len({tuple(t.flatten().tolist()) for t in found.values()}) == len(SIZES)
    return found


def from_pretrained(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


@pytest.mark.parametrize("load", [compress.load, from_pretrained])
def test_a_resized_model_is_a_fresh_one_bit_for_bit(folder, fresh, load):
    model = load(folder)
    for size in ("6bits", "3.2bits", "8bits", "1GiB", "8bits", "6bits"):
        done = model.resize(size)
        assert torch.equal(logits(model), fresh[size]), size
        assert done.nbytes == model.stack.nbytes == sum(p.nbytes for p in model.parameters())
        assert done.bits == pytest.approx(model.stack.bits)
    other = compress.load(folder, memory_budget="6bits")
    assert model.state_dict().keys() == other.state_dict().keys()
    assert not model.resize("6bits").changed


def test_growing_reads_what_is_new_and_leaves_the_rest_where_it_is(folder, monkeypatch):
    model = compress.load(folder, memory_budget="6bits")
    read: list[tuple[int, int, int]] = []
    fill = StackTable._fill

    def noted(table, number, offset, buffers):
        read.append((number, offset, sum(len(b) for b in buffers)))
        fill(table, number, offset, buffers)

    monkeypatch.setattr(StackTable, "_fill", noted)
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    done = model.resize("8bits")
    entries = model.stack.table.entries[done.n_before : done.n_entries]
    assert sum(nbytes for _, _, nbytes in read) == done.nbytes - done.nbytes_before == sum(e.nbytes for e in entries)
    assert {number for number, _, _ in read} == {e.file for e in entries}
    after = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    assert {name: after[name] for name in before} == before
    read.clear()
    model.resize("6bits")
    assert not read and {n: t.data_ptr() for n, t in model.state_dict().items()} == before


def test_a_budget_below_the_minimum_names_it_and_changes_nothing(folder, fresh):
    model = compress.load(folder, memory_budget="6bits")
    with pytest.raises(CheckpointError, match=r"smallest model .* 99,968 bytes .* 2.933 bits"):
        model.resize("2bits")
    with pytest.raises(RecipeError, match="budget='lots' is no size"):
        model.resize("lots")
    assert torch.equal(logits(model), fresh["6bits"])
    assert model.resize(model.stack.table.minimum).n_entries == 0


def test_a_budget_above_the_maximum_loads_all_there_is(folder, own, fresh):
    model = compress.load(folder, memory_budget="3.2bits")
    assert model.resize("1TiB").nbytes == model.stack.table.maximum
    last = sorted(own.glob("stack-*"))[-1]
    last.unlink()
    model = compress.load(own, memory_budget="6bits")
    done = model.resize("1TiB")
    assert done.n_entries == model.stack.table.available < len(model.stack.table.entries)
    with pytest.warns(UserWarning, match="is missing: 1 of 42 stacked blocks are lost"):
        assert torch.equal(logits(model), logits(compress.load(own)))


@pytest.mark.parametrize("how", ["replaced", "gone", "damaged"])
def test_a_file_that_changed_under_a_live_model_is_not_read_and_the_model_goes_on(own, fresh, how):
    last = sorted(own.glob("stack-*"))[-1]
    if how == "damaged":
        data = bytearray(last.read_bytes())
        data[-1] ^= 1
        last.write_bytes(data)
    model = compress.load(own, memory_budget="6bits")
    if how == "replaced":
        new = last.with_suffix(".new")
        new.write_bytes(last.read_bytes())
        os.replace(new, last)
    elif how == "gone":
        last.unlink()
    message = {
        "replaced": "was replaced or changed since the model was loaded",
        "gone": "cannot be opened",
        "damaged": "checksum differs",
    }
    with pytest.raises(CheckpointError, match=message[how]):
        model.resize("1GiB")
    assert torch.equal(logits(model), fresh["6bits"])
    assert model.resize("8bits").changed and torch.equal(logits(model), fresh["8bits"])  # what is whole can be had


def test_two_processes_on_one_stack_do_not_meet(folder, fresh):
    model = compress.load(folder, memory_budget="3.2bits")
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:  # a process of its own from here on
        right = True
        for size in ("1GiB", "6bits", "8bits"):
            model.resize(size)
            right = right and torch.equal(logits(model), fresh[size])
        os.write(writes, b"1" if right else b"0")
        os._exit(0)
    for size in ("8bits", "1GiB", "6bits"):
        model.resize(size)
        assert torch.equal(logits(model), fresh[size])
    assert os.read(reads, 1) == b"1"
    os.waitpid(child, 0)


def test_passes_beside_it_see_one_size_from_end_to_end(folder, fresh):
    model = compress.load(folder, memory_budget="6bits")
    seen: list[str | None] = []
    running = threading.Event()
    running.set()

    def passes() -> None:
        while running.is_set():
            found = logits(model)
            seen.append(next((size for size, expected in fresh.items() if torch.equal(found, expected)), None))

    threads = [threading.Thread(target=passes) for _ in range(2)]
    for thread in threads:
        thread.start()
    for turn in range(24):
        model.resize(SIZES[turn * 5 % len(SIZES)])
    running.clear()
    for thread in threads:
        thread.join()
    assert seen and None not in seen


def test_a_generation_goes_on_while_its_model_changes(folder):
    model = compress.load(folder, memory_budget="3.2bits")
    sizes = iter(["8bits", "1GiB", "6bits", "3.2bits"] * 4)
    made = []

    def between(module, *_) -> None:
        made.append(model.stack.n_entries)

    model.get_submodule("model.norm").register_forward_hook(between)
    changes = threading.Thread(target=lambda: [model.resize(size) for size in sizes])
    changes.start()
    out = model.generate(IDS, max_new_tokens=30, min_new_tokens=30, do_sample=False)
    changes.join()
    assert out.shape == (1, 42) and len(made) == 30
    assert model.stack.n_entries == 1


def test_a_pass_that_fails_or_is_interrupted_does_not_keep_the_gate(folder, fresh):
    model = compress.load(folder, memory_budget="6bits")
    for error in (ValueError, KeyboardInterrupt):

        def stop(*_, error=error):
            raise error

        hook = model.get_submodule("model.norm").register_forward_hook(stop)
        for _ in range(2):
            with pytest.raises(error):
                logits(model)
        hook.remove()
        for size in ("8bits", "6bits"):
            model.resize(size)
            assert torch.equal(logits(model), fresh[size])
    thread = threading.Thread(target=model.resize, args=("8bits",))
    thread.start()
    thread.join(10)
    assert not thread.is_alive() and torch.equal(logits(model), fresh["8bits"])


def test_the_gate_waits_for_passes_under_way():
    gate, module = Gate(), torch.nn.Linear(1, 1)
    order: list[str] = []
    inside, leave = threading.Event(), threading.Event()

    def a_pass() -> None:
        gate.enter(module)
        inside.set()
        leave.wait(10)
        order.append("pass")
        gate.leave(module)

    def change() -> None:
        with gate.closed():
            order.append("change")

    threads = [threading.Thread(target=a_pass)]
    threads[0].start()
    inside.wait(10)
    threads.append(threading.Thread(target=change))
    threads[1].start()
    leave.set()
    for thread in threads:
        thread.join(10)
    assert order == ["pass", "change"]


def test_a_copy_is_resized_alone(folder, fresh):
    model = compress.load(folder, memory_budget="6bits")
    other = copy.deepcopy(model)
    other.resize("8bits")
    assert torch.equal(logits(other), fresh["8bits"]) and torch.equal(logits(model), fresh["6bits"])
    assert model.stack.n_entries < other.stack.n_entries


def test_what_is_let_go_of_goes_back_to_the_system(tmp_path):
    shape = Shape(hidden=512, mlp=1536, blocks=4, heads=8, kv_heads=8, vocabulary=300, positions=64)
    model = compress.load(random_stack(tmp_path, shape, rank=8, blocks=12))
    logits(model)

    def anonymous() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    model.resize(model.stack.table.minimum)
    small = anonymous()
    done = model.resize("1GiB")
    large = anonymous()
    freed = done.nbytes - done.nbytes_before
    assert freed > 15 * 2**20 and large - small > 0.9 * freed
    model.resize(model.stack.table.minimum)
    assert anonymous() - small < 0.1 * freed
