"""`compress run`: what it prints, how it goes on, and where it stops."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from compress.cli.run import resume_command
from tests.runs import fingerprints

ENDING_ITSELF = """
import os, sys
from compress.pipeline import journal
noted = journal.Journal.add
def note_and_die(self, entry):
    noted(self, entry)
    if entry.block == 1:
        os.kill(os.getpid(), {number})
journal.Journal.add = note_and_die
from compress.cli.main import main
sys.exit(main())
"""


def test_it_ends_with_a_table_of_everything_that_was_measured(recipe, tmp_path, compress):
    folder = tmp_path / "result"
    answer = compress("run", "--recipe", recipe, "--out", folder)
    assert answer.code == 0
    for word in (
        "21 replaced layers", "bits per weight", "all files", "perplexity per token", "tokens of shipped in", "no BOS",
        "KL to the original", "99th percentile", "top-1 agreement", "compress ", "evaluate ", "gptq ", "peak memory",
        "(predicted ", "compress_report.json", f"compress generate {folder} --prompt",
    ):  # fmt: skip
        assert word in answer.out
    for word in ("one pass over the blocks: gptq on 21 layers", "compressed-tensors: every", "compress: 3 blocks"):
        assert word in answer.err
    assert "\x1b" not in answer.out + answer.err
    counted = sum(file.stat().st_size for file in folder.iterdir() if not file.name.startswith("compress_report."))
    assert json.loads((folder / "compress_report.json").read_text())["bytes_on_disk_all"] == counted


def test_a_finished_folder_gives_its_report_again(recipe, finished, compress):
    before = fingerprints(finished)
    answer = compress("run", "--recipe", recipe, "--out", finished)
    assert answer.code == 0
    assert "was complete already" in answer.out
    assert "perplexity per token" in answer.out
    assert fingerprints(finished) == before
    report = json.loads(compress("run", "--recipe", recipe, "--out", finished, "--json", "--quiet").out)
    assert report["already_finished"]


def test_json_is_the_only_thing_on_stdout_and_quiet_is_quiet(recipe, tmp_path, compress):
    answer = compress("run", "--recipe", recipe, "--out", tmp_path / "result", "--json", "--quiet")
    assert answer.code == 0
    assert answer.err == ""
    report = json.loads(answer.out)
    assert not report["already_finished"]
    assert report["evaluation"]["fidelity"]["kl_mean"] >= 0
    assert report["notes"] == []


def test_another_recipe_is_refused_and_overwrite_begins_again(recipe, tmp_path, compress):
    line = ["run", "--recipe", recipe, "--out", tmp_path / "result", "--quiet", "--set", "evaluation=false"]
    assert compress(*line).code == 0
    other = [*line, "--set", "steps.0.gptq.bits=3"]
    refused = compress(*other)
    assert "--overwrite" in refused.error
    answer = compress(*other, "--overwrite", "--json")
    assert json.loads(answer.out)["layers"][0]["spec"]["bits"] == 3


def test_the_model_on_the_command_line_wins_over_the_recipes(recipe, finished, tmp_path, compress):
    """It may be our own output, too."""
    steps = ["--set", "steps.0.gptq.bits=3", "--set", "evaluation=false", "--quiet", "--json"]
    answer = compress("run", "--recipe", recipe, finished, "--out", tmp_path / "again", *steps)
    assert json.loads(answer.out)["model"] == str(finished)


def test_without_out_the_result_is_named_after_the_recipe(recipe, tmp_path, compress, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = compress("run", "--recipe", recipe, "--quiet", "--json", "--set", "evaluation=false")
    assert answer.code == 0
    assert (tmp_path / "out" / "quick" / "config.json").is_file()


def test_what_the_plan_warns_of_stands_at_the_end_too(recipe, tmp_path, compress):
    asymmetric = ["--set", "steps.0.gptq.symmetric=false", "--set", "evaluation=false", "--quiet"]
    answer = compress("run", "--recipe", recipe, "--out", tmp_path / "result", *asymmetric)
    assert answer.err.startswith("warning: asymmetric grids")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--recipe", "no-such"], "no shipped recipe of that name"),
        (["--recipe", "demo", "/no/such/model"], "/no/such/model: no such model folder"),
        (["--recipe", "demo", "--set", "steps.0.gptq.bit=3"], "did you mean 'bits'?"),
        (["--recipe", "demo", "--set", "seed"], "--set seed: expected KEY=VALUE"),
        (["--recipe", "demo", "--set", "steps.0.gptq.group_size=48"], "does not divide"),
        (["--recipe", "demo", "--set", "calibration.length=512"], "--set calibration.length=256"),
        (["--recipe", "demo", "--set", "calibration.data=nowhere.txt"], "no file 'nowhere.txt'"),
        (["--recipe", "demo", "--activation-memory", "lots"], "--activation-memory lots: not a size"),
        (["--recipe", "demo", "--device", "gpu"], "--device gpu"),
        (["--recipe", "demo", "--device", "meta"], "--device meta"),
    ],
)
def test_each_wrong_input_is_one_line_and_leaves_nothing(options, words, tmp_path, compress):
    out = tmp_path / "result"
    answer = compress("run", "--out", out, *options)
    assert words in answer.error
    assert answer.code in (1, 2)
    assert not out.exists()


@pytest.mark.parametrize(("number", "name"), [(2, "interrupted"), (15, "ended by SIGTERM")])
def test_an_interrupted_run_says_how_to_go_on_and_does(number, name, recipe, finished, tmp_path, compress):
    folder = tmp_path / "a result"
    line = ["run", "--recipe", str(recipe), "--out", str(folder), "--quiet", "--overwrite"]
    program = ENDING_ITSELF.format(number=number)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    ended = subprocess.run([sys.executable, "-c", program, *line], capture_output=True, text=True, env=environment)
    assert ended.returncode == 128 + number
    assert ended.stdout == ""
    told, last = ended.stderr.splitlines()
    assert last == name
    assert told.endswith(f"to go on:  compress run --recipe {recipe} --out '{folder}' --quiet")  # and no --overwrite
    assert "what is finished is kept" in told
    assert "an unfinished run" in compress("inspect", folder).error
    assert "an unfinished run" in compress("generate", folder, "--prompt", "x").error
    assert "an unfinished run" in compress("eval", "shipped", "--reference", folder).error

    answer = compress(*line[:-1])
    assert answer.code == 0
    assert "2 of 3 blocks were finished before" in answer.out
    assert fingerprints(folder) == fingerprints(finished)


def test_the_command_to_go_on_is_quoted_for_the_shell(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/compress"])
    line = ["run", "--recipe", "my recipe.yaml", "--overwrite", "--set", "calibration.data=[a, b]"]
    assert resume_command(line) == "compress run --recipe 'my recipe.yaml' --set 'calibration.data=[a, b]'"
    monkeypatch.setattr(sys, "argv", ["/usr/lib/compress/__main__.py"])
    assert resume_command(["run"]) == "python -m compress run"
