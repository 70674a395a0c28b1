"""Stacks on disk: which prefix a budget gives, what a damaged or partial one still gives, and that nobody else misreads it."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import compress
from compress.checkpoint.budget import Budget, parse_budget
from compress.checkpoint.headers import read_base_headers, read_headers
from compress.checkpoint.reader import CheckpointReader
from compress.checkpoint.source import find_source
from compress.checkpoint.stack import STACK, StackTable, _checksum, stack_of
from compress.checkpoint.stream import StreamedModel
from compress.errors import CheckpointError, RecipeError
from scripts.random_stack import Shape, random_stack
from tests.hub_server import HubServer

SHAPE = Shape(hidden=64, mlp=96, blocks=2, heads=4, kv_heads=2, vocabulary=300, positions=64)
IDS = torch.arange(12)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_stack(tmp_path_factory.mktemp("stack"), SHAPE, rank=4, blocks=4, file_bytes=10_000)


@pytest.fixture
def own(folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(folder, tmp_path / "stack"))


@pytest.fixture(scope="module")
def table(folder: Path) -> StackTable:
    found = stack_of(folder, read_base_headers(folder))
    assert found is not None
    return found


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS, use_cache=False).logits


def test_budgets_are_read_as_they_are_written() -> None:
    assert parse_budget("4.5GiB") == Budget("4.5GiB", nbytes=int(4.5 * 2**30))
    assert parse_budget(" 900 MB ").nbytes == 900_000_000 and parse_budget(1000).nbytes == 1000
    assert parse_budget("2.5bits").bits == parse_budget("2.5 BITS").bits == 2.5
    for wrong in ("", "many", "0", "-1GiB", "0bits", "3 apples", "1e9", True):
        with pytest.raises(RecipeError, match="memory_budget=.* is no size; give bytes as 4.2GiB"):
            parse_budget(wrong)


@settings(max_examples=60, deadline=None)
@given(share=st.floats(0, 1.2))
def test_a_budget_gives_the_largest_prefix_that_fits(table: StackTable, share: float) -> None:
    room = table.minimum + int(share * (table.maximum - table.minimum))
    n = table.prefix_for(parse_budget(room))
    assert table.nbytes(n) <= room
    assert n == len(table.entries) or table.nbytes(n + 1) > room
    for bits in (table.bits(n), table.bits(n) + 1e-9):
        assert table.prefix_for(parse_budget(f"{bits:.17f}bits")) >= n
    below = table.bits(n) - 1e-4
    assert n == 0 or table.prefix_for(parse_budget(f"{below:.17f}bits")) < n
    levels = table.levels(n)
    assert sum(levels.values()) == n + len(levels) and min(levels.values()) >= 1


@pytest.mark.parametrize("budget", [None, "3.7bits", 150_000, "1TiB"])
def test_what_is_loaded_is_what_was_counted_and_what_is_streamed(folder: Path, budget) -> None:
    model = compress.load(folder, memory_budget=budget)
    assert sum(p.nbytes for p in model.parameters()) == model.stack.nbytes <= model.stack.table.maximum
    config = AutoConfig.from_pretrained(folder)
    if budget is not None:
        config.quantization_config["memory_budget"] = budget
    other = AutoModelForCausalLM.from_pretrained(folder, config=config)
    assert torch.equal(logits(model), logits(other))
    assert "memory_budget" not in other.config.to_dict()["quantization_config"]
    streamed = StreamedModel(folder, dtype=model.dtype, budget=None if budget is None else parse_budget(budget))
    hidden = streamed.embed(IDS)
    for index in range(streamed.n_blocks):
        hidden = streamed.call_block(streamed.load_block(index), index, hidden)
    torch.testing.assert_close(streamed.logits(streamed.final_norm(hidden)), logits(model), rtol=2e-2, atol=2e-2)


def test_dtype_counts_in_the_budget(folder: Path) -> None:
    model = compress.load(folder, dtype=torch.float32, memory_budget=210_000)
    assert sum(p.nbytes for p in model.parameters()) == model.stack.nbytes <= 210_000
    assert 0 < model.stack.n_entries < compress.load(folder, memory_budget=210_000).stack.n_entries


def test_the_base_model_loads_without_its_head(folder: Path) -> None:
    model = AutoModel.from_pretrained(folder)
    assert model.stack.n_entries == len(model.stack.table.entries)


def test_too_little_names_the_smallest(folder: Path, table: StackTable) -> None:
    smallest = (
        rf"the smallest model that it holds takes {table.minimum:,} bytes .*, {table.bits(0):.3f} bits per weight"
    )
    for budget in (table.minimum - 1, "1bits"):
        with pytest.raises(CheckpointError, match=smallest):
            compress.load(folder, memory_budget=budget)
    assert compress.load(folder, memory_budget=table.minimum).stack.n_entries == 0
    with pytest.raises(CheckpointError, match="is no stack, so memory_budget chooses nothing"):
        compress.load("shipped", memory_budget="1GiB")


def test_a_cut_or_missing_last_file_loses_only_itself(own: Path, table: StackTable) -> None:
    last = own / table.files[-1].name
    kept = sum(entry.file < len(table.files) - 1 for entry in table.entries)
    expected = logits(compress.load(own, memory_budget=table.nbytes(kept)))
    with last.open("r+b") as stream:
        stream.truncate(table.entries[-1].offset + 10)
    with pytest.warns(UserWarning, match=f"{last.name} is cut: 1 of {len(table.entries)} stacked blocks are lost"):
        assert compress.load(own).stack.n_entries == len(table.entries) - 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a budget that does not need what is lost says nothing of it
        assert torch.equal(logits(compress.load(own, memory_budget=table.nbytes(kept))), expected)
    last.unlink()
    with pytest.warns(UserWarning, match=f"{last.name} is missing: {len(table.entries) - kept} of"):
        assert torch.equal(logits(compress.load(own)), expected)
    assert len(read_headers(own)) == len(read_base_headers(own)) + 3 * kept
    for file in own.glob("stack-*"):
        file.unlink()
    with pytest.warns(UserWarning, match="stack-00001-.* is missing"):
        assert compress.load(own).stack.n_entries == 0


def rewritten(own: Path, change: Callable[[dict], object]) -> None:
    """Change stack.json and put its checksum right, as somebody would who means it."""
    content = json.loads((own / STACK).read_text())
    change(content)
    content["checksum"] = _checksum(content)
    (own / STACK).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c["files"][0]["entries"][0].__setitem__(1, 3), "cannot be; fetch it again"),
        (lambda c: c["files"][0]["entries"][0].__setitem__(0, 10**9), "is no entry"),
        (lambda c: c["files"][0]["entries"][0].__setitem__(3, 2**62), "cannot be; fetch it again"),
        (lambda c: c["files"][0]["entries"].append([0, 1, -5, 3, 3]), "is no entry"),
        (lambda c: c["files"][0].__setitem__("name", "../../secret"), "file 0 is described as"),
        (lambda c: c["files"][0].__setitem__("nbytes", 5), "lie behind the end of"),
        (lambda c: c["files"].pop(), "levels of .*, config.json describes|file 0 is described as"),
        (lambda c: c["modules"].__setitem__(0, "model.layers.9.mlp.up_proj"), "names other modules than config.json"),
        (lambda c: c.__setitem__("format_version", 2), "upgrade with: pip install -U compress-llm"),
        (lambda c: c["files"][0]["entries"][0].__setitem__(4, 7), "is not what was written"),
        (lambda c: c["files"].__setitem__(0, "text"), "file 0 is described as"),
    ],
)
def test_a_table_is_held_to_everything_else(own: Path, change, says: str) -> None:
    rewritten(own, change)
    with pytest.raises(CheckpointError, match=says):
        compress.load(own)


def test_a_table_that_was_edited_or_is_of_another_run_is_an_error(own: Path, folder: Path, table: StackTable) -> None:
    text = (own / STACK).read_text()
    (own / STACK).write_text(text.replace(f'"order": "{table.order}"', '"order": "mine"'))
    with pytest.raises(CheckpointError, match="its checksum does not fit its contents"):
        compress.load(own)
    (own / STACK).write_text(text)
    first, second = (own / file.name for file in table.files[:2])
    first.write_bytes(second.read_bytes())
    with pytest.raises(CheckpointError, match=f"{first.name}: .*(do not agree|it is of another run|overlaps|follow)"):
        compress.load(own)


def test_a_flipped_bit_is_found_with_its_layer(own: Path, table: StackTable) -> None:
    entry = table.entries[3]
    file = own / table.files[entry.file].name
    data = bytearray(file.read_bytes())
    data[entry.offset + 5] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"level {entry.level} of {entry.module} is not what was written"):
        compress.load(own)
    assert compress.load(own, memory_budget=table.nbytes(3)).stack.n_entries == 3


def test_levels_with_a_gap_are_refused(folder: Path) -> None:
    infos = read_headers(folder)
    name = next(name for name in infos if ".block_1." in name)
    del infos[name]
    with pytest.raises(CheckpointError, match="is stored, and not all of what comes before it"):
        StreamedModel(folder, reader=CheckpointReader(folder, infos))


def test_a_prefix_is_frozen_as_plain_weights(folder: Path, tmp_path: Path) -> None:
    compress.export(folder, "dense", tmp_path / "dense", memory_budget="3.7bits")
    packed, plain = compress.load(folder, memory_budget="3.7bits"), compress.load(tmp_path / "dense")
    assert not hasattr(plain, "stack")
    for name, module in packed.stack.modules.items():
        assert torch.equal(plain.get_submodule(name).weight, module.dense(plain.dtype)), name


def test_stock_transformers_stops(folder: Path, stock) -> None:
    for name in ("AutoModelForCausalLM", "LlamaForCausalLM"):
        (answer,) = stock({"do": "load", "folder": folder, "class": name})
        assert answer["error"] is not None and "compress-llm" in answer["error"]


def test_a_download_from_the_hub_stops_where_the_budget_does(hub: HubServer, folder: Path, table: StackTable) -> None:
    hub.add("alice/stack", folder)
    source = find_source("alice/stack", None, parse_budget("3bits"))
    assert len(source.infos) == len(read_headers(folder, parse_budget("3bits")))
    model = compress.load("alice/stack", memory_budget="3bits")
    assert torch.equal(logits(model), logits(compress.load(folder, memory_budget="3bits")))
    needed = table.files_for(model.stack.n_entries)
    cached = {path.name for path in Path(model.stack.table.folder).glob("stack-*")}
    assert cached == set(needed) and len(needed) < len(table.files)
    config = AutoConfig.from_pretrained("alice/stack")
    config.quantization_config["memory_budget"] = "4bits"
    more = AutoModelForCausalLM.from_pretrained("alice/stack", config=config)  # transformers knows of no stack
    assert more.stack.n_entries == compress.load(folder, memory_budget="4bits").stack.n_entries
    with pytest.raises(CheckpointError, match="the smallest model that it holds takes"):
        compress.load("alice/stack", memory_budget="1bits")
