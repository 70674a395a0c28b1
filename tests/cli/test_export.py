"""`compress export` as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Command


def test_an_export_says_what_it_made_and_what_to_try_next(compress: Command, finished: Path, tmp_path: Path):
    answer = compress("export", finished, "--format", "gptq", "--out", tmp_path / "out")
    assert answer.code == 0
    assert "weights change by at most" in answer.out  # the tiny model is float32
    assert f"compress eval {tmp_path / 'out'}" in answer.out
    assert "export: 21 layers" in answer.err
    assert "read back: 21 layers" in answer.err
    assert "warning: scales are rounded" in answer.err
    assert compress("eval", tmp_path / "out", "--max-tokens", 200, "--length", 64, "--quiet").code == 0


def test_json_is_alone_on_stdout(compress: Command, finished: Path, tmp_path: Path):
    answer = compress("export", finished, "--format", "awq", "--out", tmp_path / "out", "--json", "--quiet")
    found = json.loads(answer.out)
    assert answer.err == ""
    assert found["format"] == "awq"
    assert found["read_back"]["layers"] == found["layers"] == 21
    assert found["warnings"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == found["files"].keys()


def test_inspect_and_generate_take_exports(compress: Command, finished: Path, tmp_path: Path):
    compress("export", finished, "--format", "gptq", "--out", tmp_path / "out", "--quiet")
    found = json.loads(compress("inspect", tmp_path / "out", "--json", "--check").out)
    assert found["format"] == "gptq"
    assert found["check"]["not_finite"] == []
    layer = next(row for row in found["layers"] if row["name"].endswith("0.mlp.up_proj"))
    assert layer["representation"] == "quantized bits=4 group_size=32"
    stored = 64 * 128 // 2 + 2 * (2 * 128 + 128 // 2) + 4 * 64  # codes; scales and zero points of two groups; g_idx
    assert layer["nbytes"] == stored
    words = ("--prompt", "It was", "--max-new-tokens", 3, "--greedy", "--quiet")
    texts = [compress("generate", folder, *words).out for folder in (tmp_path / "out", finished)]
    assert texts[0]


def test_an_export_can_be_compressed_again(compress: Command, finished: Path, recipe: Path, tmp_path: Path):
    compress("export", finished, "--format", "gptq", "--out", tmp_path / "out", "--quiet")
    words = ("--set", 'steps.0.layers=["*.down_proj"]', "--set", "steps.0.gptq.bits=3", "--quiet", "--json")
    answer = compress("run", "--recipe", recipe, tmp_path / "out", "--out", tmp_path / "again", *words)
    assert answer.code == 0, answer.err
    report = json.loads(answer.out)
    assert report["format"] == "compressed-tensors"
    assert len(report["layers"]) == 3


@pytest.mark.parametrize(
    ("words", "said", "code"),
    [
        (("--format", "gptw"), "did you mean 'gptq'?", 2),
        ((), "Missing option '--format'", 2),
        (("--format", "gptq", "--out", "{taken}"), "is not empty, and no export of ours; choose another --out", 2),
        (("--format", "awq", "--out", "{finished}"), "is the folder that is exported", 2),
    ],
)
def test_wrong_use_is_one_line(
    compress: Command, finished: Path, tmp_path: Path, words: tuple[str, ...], said: str, code: int
):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("")
    words = tuple(word.format(taken=tmp_path / "taken", finished=finished) for word in words)
    answer = compress("export", finished, *words)
    assert answer.code == code
    assert said in answer.error


def test_originals_and_missing_folders(compress: Command, model: Path, tmp_path: Path):
    assert "nothing in it is compressed" in compress("export", model, "--format", "gptq").error
    assert "no such" in compress("export", tmp_path / "nowhere", "--format", "gptq").error


def test_a_changed_byte_is_named(compress: Command, finished: Path, tmp_path: Path):
    out = tmp_path / "out"
    compress("export", finished, "--format", "gptq", "--out", out, "--quiet")
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "model.safetensors").write_bytes(bytes(data))
    for verb in (("inspect", out, "--check"), ("eval", out), ("export", out, "--format", "dense")):
        answer = compress(*verb, "--quiet")
        assert answer.code == 1
        last = answer.err.splitlines()[-1]
        assert "model.safetensors: tensor model.norm.weight was changed after the export" in last
        assert "delete compress_export.json if the change is meant" in last


def test_an_overwritten_export(compress: Command, finished: Path, tmp_path: Path):
    out = tmp_path / "out"
    assert compress("export", finished, "--format", "gptq", "--out", out, "--quiet").code == 0
    assert "replace it with --overwrite" in compress("export", finished, "--format", "awq", "--out", out).error
    assert compress("export", finished, "--format", "awq", "--out", out, "--overwrite", "--quiet").code == 0
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "awq"
