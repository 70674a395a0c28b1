"""`compress eval --tasks` and `compress tasks`, as a user gives them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Command
from tests.evaluation.questions import CHOICE, write_tasks


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture
def few_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness's own 14,000 tasks take seconds to read: here it has none."""
    from lm_eval.tasks import _index

    whole = _index.TaskIndex._iter_yaml_files
    monkeypatch.setattr(
        _index.TaskIndex, "_iter_yaml_files", lambda root: iter(()) if "lm_eval" in str(root) else whole(root)
    )


def test_tasks_are_shown_with_their_errors(compress: Command, model: Path, tasks: Path) -> None:
    answer = compress("eval", model, "--tasks", "first,second", "--include-path", tasks, "--limit", 5, "--quiet")
    assert (answer.code, answer.err) == (0, "")
    lines = answer.out.splitlines()
    assert lines[0].split() == ["task", "shots", "questions", "metric", "value", "standard", "error"]
    assert [line.split()[:3] for line in lines[1:] if line[0] != " "] == [["first", "0", "5"], ["second", "0", "5"]]
    assert "±" in lines[1]


def test_a_file_is_a_task_and_progress_is_shown(compress: Command, model: Path, tasks: Path) -> None:
    answer = compress("eval", model, "--tasks", tasks / "first.yaml", "--batch-size", "auto")
    assert answer.code == 0
    assert "llama: answer: 33/33 requests in " in answer.err


def test_two_models_side_by_side_with_perplexity(
    compress: Command, model: Path, finished: Path, tasks: Path, tmp_path: Path
) -> None:
    asked = ["eval", finished, "--reference", model, "--tasks", tasks / "first.yaml", "--quiet"]
    answer = compress(*asked, "--max-tokens", 256, "--length", 64)
    assert answer.code == 0
    assert "KL to the original" in answer.out
    assert "flips" in answer.out
    only = compress(*asked)
    assert "KL to the original" not in only.out
    place = tmp_path / "saved" / "scores.json"
    answer = compress(*asked, "--max-tokens", 256, "--length", 64, "--json", "--output", place, "--log-samples")
    found = json.loads(answer.out)
    assert found["results"]["first"]["acc,none"] == json.loads(place.read_text())["results"]["first"]["acc,none"]
    assert found["compress"]["perplexity"]["fidelity"]["positions"] == 256
    assert found["compress"]["comparison"][0]["task"] == "first"
    assert len(found["samples"]["first"]) == 11
    assert sorted(file.name for file in place.parent.iterdir()) == [
        "scores.json", "scores_reference.json", "scores_reference_samples_first.jsonl", "scores_samples_first.jsonl",
    ]  # fmt: skip


def test_json_without_samples_is_lm_evals(compress: Command, model: Path, tasks: Path) -> None:
    found = json.loads(compress("eval", model, "--tasks", tasks / "second.yaml", "--json", "--quiet").out)
    assert "samples" not in found
    assert "compress" not in found
    assert {"results", "configs", "versions", "n-shot", "n-samples", "config", "lm_eval_version"} <= found.keys()


WRONG: dict[str, tuple[list[Any], str]] = {
    "unknown task": (["--tasks", "fisrt"], "--tasks fisrt: no such task; did you mean 'first'? (list them with: compress tasks)"),
    "pattern": (["--tasks", "x*y"], "--tasks x*y: no task matches it"),
    "no file": (["--tasks", "nowhere.yaml"], "--tasks nowhere.yaml: no such file"),
    "no folder": (["--tasks", "first", "--include-path", "nowhere"], "--include-path nowhere: no such folder"),
    "no name": (["--tasks", ","], "--tasks: names no task"),
    "twice": (["--tasks", "both,first"], "name it once"),
    "no template": (["--tasks", "first", "--apply-chat-template"], "--apply-chat-template: the tokenizer of"),
    "limit": (["--tasks", "first", "--limit", "0"], "--limit 0: use a whole number"),
    "half a question": (["--tasks", "first", "--limit", "1.5"], "--limit 1.5: use a whole number"),
    "batch size": (["--tasks", "first", "--batch-size", "many"], "--batch-size many: use a number"),
    "seed": (["--tasks", "first", "--seed", "1,2"], "--seed 1,2: use one whole number, or four"),
    "dtype": (["--tasks", "first", "--dtype", "int4"], "--dtype int4: choose one of"),
    "samples": (["--tasks", "first", "--log-samples"], "--log-samples: needs a place"),
    "output": (["--tasks", "first", "--output", "/proc/none"], "--output /proc/none: cannot be written"),
    "cache": (["--tasks", "first", "--cache", "/proc/none"], "--cache /proc/none: cannot be written"),
    "about tasks": (["--num-fewshot", "2"], "--num-fewshot: is about tasks, and there are none; add --tasks"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_command_line_is_one_line(
    case: str, compress: Command, model: Path, tasks: Path, few_tasks: None
) -> None:
    options, says = WRONG[case]
    known = [] if "--include-path" in options or "--tasks" not in options else ["--include-path", tasks]
    answer = compress("eval", model, *options, *known, "--quiet")
    assert says in answer.error


BROKEN = {
    "no YAML": (lambda text: "task: [", "no valid YAML"),
    "no task": (lambda text: "metric_list: []\n", "neither `task: NAME` nor `group: NAME`"),
    "unknown key": (lambda text: text.replace("doc_to_text", "doc_to_txt"), "did you mean 'doc_to_text'"),
    "unknown field": (lambda text: text.replace("{{query}}", "{{question}}"), "'question' is undefined"),
    "no split": (lambda text: text.replace("test_split: test", "test_split: dev"), "'dev' is missing"),
    "no data": (lambda text: text.replace("a.jsonl", "nowhere.jsonl"), "nowhere.jsonl"),
    "empty": (lambda text: text.replace("a.jsonl", "empty.jsonl"), "has no documents"),
    "function": (lambda text: text + "process_docs: !function nowhere.process\n", "nowhere"),
    "network": (lambda text: text.replace("path: json", "path: someone/questions"), "run a task over local files"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_task_is_one_line_before_any_model_is_loaded(
    case: str, compress: Command, model: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress.checkpoint import load

    monkeypatch.setattr(load, "load", lambda *a, **k: pytest.fail("a model was loaded"))
    change, says = BROKEN[case]
    (tasks / "empty.jsonl").write_text("")
    file = tmp_path / "wrong.yaml"
    file.write_text(change(CHOICE.format(name="wrong", data=tasks / "a.jsonl")))
    answer = compress("eval", model, "--tasks", file, "--quiet")
    assert says in answer.error
    assert "wrong.yaml" in answer.error


def test_a_broken_file_among_the_users_is_named(
    compress: Command, model: Path, tmp_path: Path, few_tasks: None
) -> None:
    (tmp_path / "mine.yaml").write_text("task: mine\n  broken: [")
    answer = compress("eval", model, "--tasks", "mine", "--include-path", tmp_path, "--quiet")
    assert "no such task" in answer.error
    assert str(tmp_path / "mine.yaml") in answer.error


def test_the_list_of_tasks(compress: Command, tasks: Path, few_tasks: None) -> None:
    found = json.loads(compress("tasks", "--include-path", tasks, "--json").out)
    assert [(task["name"], task["kind"]) for task in found] == [
        ("both", "group"), ("first", "task"), ("flowing", "task"), ("second", "task"), ("shuffled", "task"), ("written", "task"),
    ]  # fmt: skip
    answer = compress("tasks", "f*", "ritt", "--include-path", tasks)
    assert [line.split()[0] for line in answer.out.splitlines()] == ["name", "first", "flowing", "written"]
    assert answer.err == "3 names\n"
    assert "no task's name" in compress("tasks", "nonsense", "--include-path", tasks).error


def test_without_tasks_the_harness_is_not_imported(model: Path) -> None:
    program = (
        "import sys\nfrom compress.cli.main import main\n"
        f"assert main(['eval', {str(model)!r}, '--max-tokens', '128', '--length', '64', '--quiet']) == 0\n"
        "assert 'lm_eval' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
