"""What holds for every verb: quick help, exit codes, errors in one line, output that ends early."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import compress as package
from compress.cli import main as cli
from compress.cli.signals import Ended
from compress.errors import CheckpointError, NumericsError, RecipeError
from tests.cli.conftest import process

VERBS = ["run", "plan", "eval", "tasks", "generate", "inspect", "methods", "recipes", "doctor"]
HEAVY = ["torch", "transformers", "huggingface_hub", "numpy", "yaml", "rich", "safetensors", "datasets"]


@pytest.mark.parametrize(
    ("arguments", "heavy"),
    [
        (["--help"], [*HEAVY, "pydantic"]),
        (["--version"], HEAVY),  # newer releases of typer read options with pydantic
        (["run", "--help"], HEAVY),
        (["run", "--nonsense"], HEAVY),
    ],
)
def test_help_imports_nothing_that_takes_time(arguments, heavy):
    program = (
        "import json, sys\n"
        "from compress.cli.main import main\n"
        f"main({arguments!r})\n"
        f"print(json.dumps([m for m in {heavy!r} if m in sys.modules]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_help_names_every_verb(compress):
    answer = compress("--help")
    assert answer.code == 0
    assert all(f"\n  {verb} " in answer.out for verb in VERBS)
    assert compress().out == answer.out


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_has_an_example(verb, compress):
    answer = compress(verb, "--help")
    assert answer.code == 0
    assert f"Example:  compress {verb}" in answer.out
    assert "--debug" in answer.out


def test_version(compress):
    assert compress("--version").out.strip() == package.__version__


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rnu"], "No such command 'rnu'"),
        (["run", "--recipe", "demo", "--otu", "x"], "--out"),
        (["run"], "Missing option '--recipe'; see: compress run --help"),
        (["run", "--recipe", "demo", "a", "b"], "unexpected extra argument"),
        (["generate", "shipped"], "Missing option '--prompt'"),
        (["generate", "shipped", "--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["eval"], "Missing argument 'MODEL'"),
        (["eval", "shipped", "--length", "many"], "--length"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(arguments, words, compress):
    answer = compress(*arguments)
    assert words in answer.error
    assert answer.code == 2


def failing(monkeypatch, error):
    def broken():
        raise error

    monkeypatch.setattr("compress.shipped.recipes", broken)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (RecipeError("steps.0: too few\nbits"), 2, "error: steps.0: too few bits"),
        (CheckpointError("shard: truncated"), 1, "error: shard: truncated"),
        (NumericsError("layer: not finite"), 1, "error: layer: not finite"),
        (MemoryError(), 1, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "out of memory"),
        (OSError(28, "No space left on device", "out/shard"), 1, "the disk is full"),
        (PermissionError(13, "Permission denied", "out/shard"), 1, "out/shard: Permission denied"),
    ],
)
def test_what_a_user_can_mend_is_one_line(error, code, words, compress, monkeypatch):
    failing(monkeypatch, error)
    answer = compress("recipes")
    assert words in answer.error
    assert answer.code == code


def test_debug_shows_where_it_happened(compress, monkeypatch):
    failing(monkeypatch, CheckpointError("shard: truncated"))
    answer = compress("recipes", "--debug")
    assert answer.code == 1
    assert "Traceback" in answer.err
    assert answer.err.splitlines()[-1] == "error: shard: truncated"
    assert "Traceback" not in compress("recipes").err


def test_a_bug_keeps_its_traceback_and_says_whose_it_is(compress, monkeypatch):
    failing(monkeypatch, ZeroDivisionError("division by zero"))
    for arguments in (["recipes"], ["recipes", "--debug"]):
        answer = compress(*arguments)
        assert answer.code == 1
        assert answer.err.count("Traceback") == 1
        assert "bug in compress-llm" in answer.err.splitlines()[-1]


@pytest.mark.parametrize(("number", "word"), [(2, "interrupted"), (15, "ended by SIGTERM")])
def test_an_interruption_is_no_error(number, word, compress, monkeypatch):
    failing(monkeypatch, Ended(number))
    answer = compress("recipes")
    assert answer.code == 128 + number
    assert answer.err == word + "\n"


def test_main_leaves_the_handlers_of_signals_as_they_were(compress):
    import signal

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    compress("recipes")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


@pytest.mark.parametrize("arguments", [["recipes"], ["recipes", "--json"], ["recipes", "demo"]])
def test_a_reader_that_goes_away_is_no_error(arguments):
    running = process(*arguments)
    running.stdout.close()
    assert running.wait() in (cli.BY_SIGNAL + 13, 0)
    assert running.stderr.read() == ""
    running.stderr.close()
