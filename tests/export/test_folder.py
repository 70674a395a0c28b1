"""The output folder is a model only when all of it was written and checked; other people's files stay."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import compress
from compress.checkpoint import writer
from compress.errors import CheckpointError, RecipeError
from compress.export import read_back as checking
from tests.export.conftest import Made, logits
from tests.runs import fingerprints

Make = Callable[[str], Made]


def test_what_is_in_the_folder(made: Make, tmp_path: Path):
    report = compress.export(made("llama4").path, "gptq", tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == report["files"].keys()
    assert {"config.json", "quantize_config.json", "model.safetensors", "README.md", "compress_export.json"} <= names
    assert {"tokenizer.json", "tokenizer_config.json"} <= names
    assert ".compress" not in names
    assert report["read_back"] == {"layers": 21, "tensors": 21 * 4 + 9, "largest_weight_change": 0.0}
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\n")
    assert "Exported by `compress-llm` to the format gptq from `llama4` (21 compressed layers)." in card
    assert str(tmp_path) not in card


def test_the_same_source_gives_the_same_bytes(made: Make, tmp_path: Path):
    for name in ("one", "two"):
        compress.export(made("asymmetric3").path, "gptq", tmp_path / name)
    assert fingerprints(tmp_path / "one") == fingerprints(tmp_path / "two")


def test_large_models_are_split_and_indexed(made: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from compress.export import shards

    monkeypatch.setattr(shards, "MAX_SHARD_BYTES", 40_000)
    for format_ in ("gptq", "dense"):
        out = tmp_path / format_
        compress.export(made("llama4").path, format_, out)
        files = sorted(path.name for path in out.glob("*.safetensors"))
        assert len(files) > 2
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == set(files)
        assert torch.equal(logits(out), logits(made("llama4").path))


def test_an_export_is_replaced_only_when_asked_and_other_files_stay(made: Make, tmp_path: Path):
    out = tmp_path / "out"
    compress.export(made("llama4").path, "gptq", out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(RecipeError, match="holds an export already; .*--overwrite"):
        compress.export(made("llama4").path, "awq", out)
    compress.export(made("llama4").path, "awq", out, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"
    assert not (out / "quantize_config.json").exists()
    assert torch.equal(logits(out), logits(made("llama4").path))


def test_folders_of_others_are_left_alone(made: Make, tmp_path: Path):
    source = made("llama4").path
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("")
    for out, said in (("full", "is not empty, and no export of ours"), ("file", "is a file")):
        with pytest.raises(RecipeError, match=said):
            compress.export(source, "gptq", tmp_path / out, overwrite=True)
    with pytest.raises(RecipeError, match="is the folder that is exported"):
        compress.export(source, "gptq", source, overwrite=True)
    (tmp_path / "empty").mkdir()
    assert compress.export(source, "gptq", tmp_path / "empty")["layers"] == 21


def test_by_default_it_lies_beside_the_source(made: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mine").symlink_to(made("llama4").path)
    monkeypatch.chdir(tmp_path)
    assert compress.export("mine", "gptq")["folder"] == "mine-gptq"
    assert compress.export("./mine/", "awq")["folder"] == "mine-awq"


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_reads_back_otherwise_is_an_error_and_leaves_no_model(
    made: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
):
    out = tmp_path / "out"
    if overwrite:
        compress.export(made("llama8").path, "gptq", out)
    before = fingerprints(out) if overwrite else None
    write = writer.replace_file

    def disk(path: Path, content: Callable) -> None:  # type: ignore[type-arg]
        write(path, content)
        if path.name == "model.safetensors":
            data = bytearray(path.read_bytes())
            data[-100] ^= 4
            path.write_bytes(bytes(data))

    monkeypatch.setattr(writer, "replace_file", disk)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: tensor model\.norm\.weight was read back other than"
    ):
        compress.export(made("llama4").path, "gptq", out, overwrite=overwrite)
    if overwrite:
        assert fingerprints(out) == before  # the earlier export is untouched
    else:
        assert not out.exists()


@pytest.mark.parametrize("what", ["qweight", "qzeros", "scales"])
def test_a_conversion_that_is_wrong_is_found(made: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str):
    """Checksums would not see it: they are taken of what was converted."""
    from compress.export import gptq

    convert = gptq.to_gptq

    def wrong(*arguments: object, **options: object) -> dict[str, torch.Tensor]:
        tensors = convert(*arguments, **options)  # type: ignore[arg-type]
        tensors[what][0, 0] += 1 if what != "scales" else 0.25
        return tensors

    monkeypatch.setattr(gptq, "to_gptq", wrong)
    with pytest.raises(
        CheckpointError, match=r"model\.layers\.\d\.\w+\.\w+(: (codes|zero points|scales): |\.qzeros: )"
    ):
        compress.export(made("asymmetric4").path, "gptq", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing(made: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import errno

    class Full:
        free = 1000

    from compress.export import run

    monkeypatch.setattr(run.shutil, "disk_usage", lambda path: Full)
    with pytest.raises(CheckpointError, match=rf"{tmp_path / 'out'}: the export takes .* and 1,000 are free"):
        compress.export(made("llama4").path, "dense", tmp_path / "out")
    monkeypatch.undo()

    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(CheckpointError, match="the disk is full"):
        compress.export(made("llama4").path, "dense", tmp_path / "out")
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()


KILLED = """
import sys, time
sys.path.insert(0, {root!r})
from compress.export import run
from pathlib import Path
install = run.install
def slow(stage, out):
    Path({flag!r}).write_text("writing")
    time.sleep(60)
run.{step} = slow
import compress
compress.export({source!r}, "gptq", {out!r})
"""


@pytest.mark.parametrize("step", ["read_back", "install"])
def test_killed_exports_are_no_models_and_can_be_made_again(made: Make, tmp_path: Path, step: str):
    out, flag = tmp_path / "out", tmp_path / "flag"
    root = str(Path(__file__).resolve().parents[2])
    code = KILLED.format(root=root, flag=str(flag), step=step, source=str(made("llama4").path), out=str(out))
    code = code.replace("def slow(stage, out)", "def slow(*arguments)")
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        deadline = time.monotonic() + 60
        while not flag.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert flag.exists()
        with pytest.raises(RecipeError, match="another export or run is writing here"):
            compress.export(made("llama4").path, "gptq", out)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (out / "config.json").exists()
    with pytest.raises(CheckpointError):
        compress.load(out)
    assert compress.export(made("llama4").path, "gptq", out)["read_back"]["layers"] == 21
    assert not (out / ".compress").exists()


def test_read_back_is_of_the_disk(made: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every tensor of the export passes through the comparison."""
    seen: list[str] = []
    compare = checking._compare

    def noted(model, format_, name, *rest):  # type: ignore[no-untyped-def]
        seen.append(name)
        return compare(model, format_, name, *rest)

    monkeypatch.setattr(checking, "_compare", noted)
    compress.export(made("skipped").path, "awq", tmp_path / "out")
    assert sorted(seen) == sorted(made("skipped").folder.specs)
