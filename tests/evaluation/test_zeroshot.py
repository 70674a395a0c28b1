"""Answers are those of lm-eval's own command, question by question; what is around them is ours."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import compress
from compress.errors import CheckpointError, NumericsError, RecipeError
from compress.evaluation.zeroshot import TaskSettings, evaluate_tasks, save_results
from compress.pipeline.progress import Silent
from tests.evaluation.questions import CHOICE, N_QUESTIONS, write_questions, write_tasks
from tests.runs import recipe_for
from tests.tiny_models import save_tiny

KINDS = ["first", "second", "shuffled", "written", "flowing"]
ASKED = ("doc", "target", "arguments", "resps", "filtered_resps", "doc_hash", "prompt_hash", "target_hash")
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[me] {% endif %}"
)


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("models") / "llama", dtype=torch.bfloat16)


@pytest.fixture(scope="session")
def packed(original: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    steps = [{"rtn": {"bits": 3, "group_size": 32}}]
    recipe = recipe_for(original, steps, text, evaluation=False)
    return compress.run(recipe, tmp_path_factory.mktemp("packed") / "packed").folder


def settings(tasks: Path, *names: str, **fields: Any) -> TaskSettings:
    return TaskSettings(names or ("first",), (str(tasks),), **fields)


def harness(model: Path, folder: Path, names: list[str], **options: Any) -> dict[str, Any]:
    """The harness itself, with the settings that its command line has by default."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import handle_non_serializable

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    asked = {
        "batch_size": 8,
        "device": "cpu",
        "fewshot_as_multiturn": bool(options.get("apply_chat_template")),
        **options,
    }
    found = simple_evaluate("hf", model_args={"pretrained": str(model)}, tasks=names, task_manager=manager, **asked)
    return json.loads(json.dumps(found, default=handle_non_serializable))


def check_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours["results"] == theirs["results"]
    assert ours["n-shot"] == theirs["n-shot"]
    assert ours["samples"].keys() == theirs["samples"].keys()
    for task, samples in theirs["samples"].items():
        assert [s["doc_id"] for s in ours["samples"][task]] == [s["doc_id"] for s in samples]
        for mine, sample in zip(ours["samples"][task], samples, strict=True):
            assert {key: mine[key] for key in ASKED} == {key: sample[key] for key in ASKED}


def test_every_kind_of_task_is_answered_as_by_the_harness_question_by_question(original: Path, tasks: Path) -> None:
    ours = evaluate_tasks(original, settings(tasks, *KINDS))["model"]
    theirs = harness(original, tasks, KINDS)
    check_same(ours, theirs)
    assert theirs.keys() - ours.keys() == set()
    same = {k: v for k, v in theirs["config"].items() if k not in ("model_args", "model_sha", "batch_size")}
    assert {key: ours["config"][key] for key in same} == same


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"num_fewshot": 2, "limit": 5}, {"num_fewshot": 2, "limit": 5}),
        ({"limit": 0.3, "batch_size": 1}, {"limit": 0.3, "batch_size": 1}),
        (
            {"num_fewshot": 3, "seeds": (7, 7, 7, 7)},
            {
                "num_fewshot": 3,
                "random_seed": 7,
                "numpy_random_seed": 7,
                "torch_random_seed": 7,
                "fewshot_random_seed": 7,
            },
        ),
    ],
)
def test_settings_mean_what_they_mean_to_the_harness(
    ours: dict[str, Any], theirs: dict[str, Any], original: Path, tasks: Path
) -> None:
    names = ["shuffled", "second"]
    check_same(
        evaluate_tasks(original, settings(tasks, *names, **ours))["model"], harness(original, tasks, names, **theirs)
    )


def test_the_chat_template_is_applied_as_by_the_harness(original: Path, tasks: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model = tmp_path / "chat"
    model.mkdir()
    for file in original.iterdir():
        (model / file.name).symlink_to(file)
    tokenizer = AutoTokenizer.from_pretrained(original)
    tokenizer.chat_template = TEMPLATE
    for name in ("tokenizer_config.json", "tokenizer.json"):
        (model / name).unlink()
    tokenizer.save_pretrained(model)
    found = evaluate_tasks(model, settings(tasks, apply_chat_template=True, num_fewshot=1))["model"]
    assert found["samples"]["first"][0]["arguments"][0][0].startswith("[user] ")
    check_same(found, harness(model, tasks, ["first"], apply_chat_template=True, num_fewshot=1))
    with pytest.raises(RecipeError, match="no chat template"):
        evaluate_tasks(original, settings(tasks, apply_chat_template=True))


def test_likelihoods_are_those_of_the_packed_model(packed: Path, tasks: Path) -> None:
    from transformers import AutoTokenizer

    found = evaluate_tasks(packed, settings(tasks, dtype="float32", batch_size=1))["model"]
    model = compress.load(packed, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(packed)
    for sample in found["samples"]["first"]:
        for (context, answer), (likelihood, _) in zip(sample["arguments"], sample["filtered_resps"], strict=True):
            ids = torch.tensor([tokenizer.encode(context + answer)])
            n = len(tokenizer.encode(context))
            with torch.no_grad():
                logs = model(ids).logits.float().log_softmax(-1)
            expected = logs[0, n - 1 : -1].gather(1, ids[0, n:, None]).sum()
            assert float(likelihood) == pytest.approx(float(expected), rel=1e-5)


def test_a_compressed_model_is_set_beside_its_original(packed: Path, original: Path, tasks: Path) -> None:
    found = evaluate_tasks(packed, settings(tasks, "both"), reference=original)
    assert found["model"] != found["reference"]
    alone = evaluate_tasks(original, settings(tasks, "first"))["model"]
    assert found["reference"]["results"]["first"] == alone["results"]["first"]
    row = next(row for row in found["comparison"] if (row["task"], row["metric"]) == ("first", "acc"))
    ours, theirs = ([s["acc"] for s in found[role]["samples"]["first"]] for role in ("model", "reference"))
    changed = [a - b for a, b in zip(ours, theirs, strict=True)]
    assert row["difference"] == pytest.approx(sum(changed) / N_QUESTIONS)
    assert row["flips"] == sum(c != 0 for c in changed) / N_QUESTIONS
    assert row["difference_stderr"] == pytest.approx(float(torch.tensor(changed).std() / math.sqrt(N_QUESTIONS)))
    answers = [[s["filtered_resps"] for s in found[role]["samples"]["first"]] for role in ("model", "reference")]
    assert answers[0] != answers[1]
    choices = [[max(range(3), key=lambda i: float(given[i][0])) for given in role] for role in answers]
    assert row["same_choice"] == sum(a == b for a, b in zip(*choices, strict=True)) / N_QUESTIONS
    group = next(row for row in found["comparison"] if row["task"] == "both")
    assert group["questions"] == N_QUESTIONS + 7


def test_of_two_models_one_is_in_memory_at_a_time(
    original: Path, packed: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress.checkpoint import load as loading

    whole, loaded = loading.load, []

    def load(*arguments: Any, **options: Any) -> Any:
        assert all(earlier() is None for earlier in loaded)
        model = whole(*arguments, **options)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(loading, "load", load)
    evaluate_tasks(packed, settings(tasks, "first", "written", limit=2), reference=original)
    assert len(loaded) == 2


def test_a_model_is_no_different_from_itself(original: Path, tasks: Path) -> None:
    rows = evaluate_tasks(original, settings(tasks, "shuffled", "written"), reference=original)["comparison"]
    assert len(rows) == 3
    assert all(row["difference"] == row["flips"] == 0 for row in rows)


class Counted(Silent):
    """Phases and steps that were reported."""

    def __init__(self) -> None:
        super().__init__()
        self.phases: list[list[Any]] = []

    def begin(self, phase: str, total: int, unit: str) -> None:
        self.phases.append([phase, total, 0])

    def advance(self, steps: int = 1, detail: str = "") -> None:
        self.phases[-1][2] += steps


def test_progress_counts_every_request(original: Path, tasks: Path, capfd: pytest.CaptureFixture[str]) -> None:
    progress = Counted()
    evaluate_tasks(original, settings(tasks, *KINDS, batch_size=2), progress=progress)
    assert all(total == done for _, total, done in progress.phases), progress.phases
    totals = [(phase.removeprefix("llama: "), total) for phase, total, _ in progress.phases]
    assert ("write prompts", 4 * N_QUESTIONS + 7) in totals
    assert ("answer", 3 * (2 * N_QUESTIONS + 7)) in totals
    assert ("answer", N_QUESTIONS) in totals
    assert capfd.readouterr() == ("", "")  # neither bars nor log lines of others


def die_after(monkeypatch: pytest.MonkeyPatch, calls: int) -> list[int]:
    """The model stops in the middle of its answers. Returns: how many calls there were."""
    from compress.evaluation.harness.language_model import LanguageModel

    whole, made = LanguageModel._model_call, [0]

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        made[0] += 1
        if made[0] > calls:
            raise KeyboardInterrupt
        return whole(self, *arguments, **options)

    monkeypatch.setattr(LanguageModel, "_model_call", call)
    return made


def test_an_interrupted_evaluation_goes_on(
    original: Path, packed: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = settings(tasks, batch_size=2, cache=tmp_path / "cache")
    plain = evaluate_tasks(original, settings(tasks, batch_size=2))["model"]
    with monkeypatch.context() as patched:
        die_after(patched, 6)
        with pytest.raises(KeyboardInterrupt):
            evaluate_tasks(original, kept)
    progress = Silent()
    check_same(evaluate_tasks(original, kept, progress=progress)["model"], plain)
    (said,) = [note for note in progress.notes if "answered before" in note]
    answered, asked = (int(word) for word in said.split() if word.isdigit())
    assert 6 <= answered < asked == 3 * N_QUESTIONS
    with monkeypatch.context() as patched:
        made = die_after(patched, 0)
        check_same(evaluate_tasks(original, kept)["model"], plain)  # everything is known
        assert made == [0]
        for model, other in ((packed, kept), (original, settings(tasks, cache=tmp_path / "cache", dtype="float32"))):
            with pytest.raises(KeyboardInterrupt):  # nothing is known of another model, or of it in another dtype
                evaluate_tasks(model, other)
    assert len(list((tmp_path / "cache").glob("*.db"))) == 3


def test_changed_weights_are_another_model_to_the_cache(original: Path, tmp_path: Path) -> None:
    from compress.evaluation.harness.language_model import checkpoint_digest

    copy = tmp_path / "copy"
    copy.mkdir()
    for file in original.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert checkpoint_digest(copy) == checkpoint_digest(original)
    (copy / "README.md").write_text("a card")
    assert checkpoint_digest(copy) == checkpoint_digest(original)
    weights = load_file(copy / "model.safetensors")
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert checkpoint_digest(copy) != checkpoint_digest(original)


def test_a_damaged_cache_is_named(original: Path, tasks: Path, tmp_path: Path) -> None:
    kept = settings(tasks, limit=2, cache=tmp_path)
    evaluate_tasks(original, kept)
    (file,) = tmp_path.glob("*.db")
    file.write_bytes(b"no database at all" * 500)
    with pytest.raises(CheckpointError, match="delete it") as caught:
        evaluate_tasks(original, kept)
    assert str(file) in str(caught.value)


def test_saved_results_are_those_that_the_harness_saves(original: Path, tasks: Path, tmp_path: Path) -> None:
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.utils import make_table

    found = evaluate_tasks(original, settings(tasks, "both", "written"))["model"]
    file = save_results(found, tmp_path / "ours", log_samples=True)
    tracker = EvaluationTracker(output_path=str(tmp_path / "theirs"))
    theirs = harness(original, tasks, ["both", "written"], evaluation_tracker=tracker)
    samples = theirs.pop("samples")
    tracker.save_results_aggregated(theirs, samples)
    for task, answered in samples.items():
        tracker.save_results_samples(task, answered)
    (expected,) = (tmp_path / "theirs").rglob("results_*.json")
    ours, saved = json.loads(file.read_text()), json.loads(expected.read_text())
    assert saved.keys() - ours.keys() == set()
    assert ours["task_hashes"] == saved["task_hashes"]
    assert file.relative_to(tmp_path / "ours").parent == expected.relative_to(tmp_path / "theirs").parent
    for task in samples:
        (mine,) = (tmp_path / "ours").rglob(f"samples_{task}_*.jsonl")
        (written,) = (tmp_path / "theirs").rglob(f"samples_{task}_*.jsonl")
        assert [json.loads(x) for x in mine.read_text().splitlines()] == [
            json.loads(x) for x in written.read_text().splitlines()
        ]
    assert make_table(ours) == make_table(saved)  # a tool of the harness reads it
    exact = save_results(found, tmp_path / "here" / "r.json")
    assert exact == tmp_path / "here" / "r.json"
    assert json.loads(exact.read_text())["results"] == found["results"]


def test_local_tasks_ask_no_server(original: Path, tasks: Path) -> None:
    """`datasets` would count the use of its reader of JSON files; the harness would ask the Hub for the model's commit."""
    program = (
        "import socket, sys\n"
        "def refuse(*a, **k):\n    print('ASKED', a[:2], file=sys.stderr)\n    raise OSError('no network')\n"
        "socket.getaddrinfo = refuse\n"
        "from compress.cli.main import main\n"
        f"sys.exit(main(['eval', {str(original)!r}, '--tasks', 'first', '--include-path', {str(tasks)!r}, '--quiet']))\n"
    )
    offline = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_UPDATE_DOWNLOAD_COUNTS")
    environment = {key: value for key, value in os.environ.items() if key not in offline}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "first" in done.stdout


@pytest.mark.slow
def test_several_processes_give_the_answers_of_one(original: Path, tasks: Path, tmp_path: Path) -> None:
    """Started as accelerate starts them on several GPUs, here on the CPU."""
    names = ["first", "written", "flowing"]
    kept = {"batch_size": 4, "dtype": "float32", "cache": tmp_path / "cache"}
    alone = evaluate_tasks(original, settings(tasks, *names, **kept))["model"]
    (known,) = (tmp_path / "cache").glob("*rank0.db")  # so the first of them knows everything, the second nothing
    arguments = ["--tasks", ",".join(names), "--include-path", str(tasks), "--batch-size", "4", "--dtype", "float32"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "compress"]
    saving = ["--output", str(tmp_path / "r.json"), "--log-samples", "--cache", str(tmp_path / "cache"), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [*command, "eval", str(original), *arguments, *saving],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    found = json.loads(done.stdout)  # one of them speaks
    assert found["n-samples"] == alone["n-samples"]
    for task in names:
        for key, value in alone["results"][task].items():
            assert found["results"][task][key] == (
                pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
            )
    assert sorted(file.name[-8:] for file in (tmp_path / "cache").glob("*.db")) == ["rank0.db", "rank1.db"]
    assert known.exists() and "answered before" in done.stderr


def test_a_model_that_gives_no_numbers_is_no_score(original: Path, tasks: Path, tmp_path: Path) -> None:
    broken = save_tiny("llama", tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][:] = math.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericsError, match="question 0 of first"):
        evaluate_tasks(broken, settings(tasks))


def test_a_model_that_does_not_fit_is_said_beforehand(
    original: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress.pipeline import estimate

    monkeypatch.setattr(estimate, "available_memory", lambda: 1000)
    progress = Silent()
    evaluate_tasks(original, settings(tasks, limit=1), progress=progress)
    assert any("need the whole model in memory" in note for note in progress.notes)


def test_questions_that_are_too_long_are_said(original: Path, tmp_path: Path) -> None:
    data = write_questions(tmp_path / "long.jsonl", n=2, words=200)
    rows = [{**json.loads(line), "query": "word " * 100} for line in data.read_text().splitlines()]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "long.yaml").write_text(CHOICE.format(name="long", data=data))
    progress = Silent()
    evaluate_tasks(original, TaskSettings((str(tmp_path / "long.yaml"),)), progress=progress)
    assert any("6 requests are longer than the model's 256 positions" in note for note in progress.notes)


def test_a_task_that_fixes_its_examples_is_said(original: Path, tasks: Path, tmp_path: Path) -> None:
    fixed = CHOICE.format(name="fixed", data=tasks / "a.jsonl") + "num_fewshot: 0\n"
    (tmp_path / "fixed.yaml").write_text(fixed)
    progress = Silent()
    evaluate_tasks(original, TaskSettings((str(tmp_path / "fixed.yaml"),), num_fewshot=3, limit=2), progress=progress)
    assert any("fixed" in note and "3 was not used" in note for note in progress.notes)


def test_a_recipe_measures_tasks_before_and_after(original: Path, tasks: Path, text: Path, tmp_path: Path) -> None:
    evaluation = {
        "data": str(text), "length": 48, "max_tokens": 480, "tasks": ["first", "second"], "include_path": str(tasks),
        "limit": 5, "num_fewshot": 1, "batch_size": 4,
    }  # fmt: skip
    recipe = recipe_for(original, [{"rtn": {"bits": 3, "group_size": 32}}], text, evaluation=evaluation)
    result = compress.run(recipe, tmp_path / "out")
    measured = result.report["evaluation"]["tasks"]
    assert json.loads((result.folder / "compress_report.json").read_text())["evaluation"]["tasks"] == measured
    again = evaluate_tasks(
        result.folder, settings(tasks, "first", "second", limit=5, num_fewshot=1, batch_size=4), reference=original
    )
    assert measured["comparison"] == again["comparison"]
    assert measured["model"]["results"] == again["model"]["results"]
    assert "samples" not in measured["model"]
    assert str(tasks) not in json.dumps(measured)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [({"tasks": "frist"}, "did you mean 'first'"), ({"apply_chat_template": True}, "no chat template")],
)
def test_a_run_is_not_begun_for_tasks_that_cannot_be_run(
    wrong: dict[str, Any],
    says: str,
    original: Path,
    tasks: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from compress.evaluation.harness.tasks import TaskIndexes

    monkeypatch.setattr(TaskIndexes, "read_all", lambda self: None)  # the harness's own 14,000 take a while
    evaluation = {"data": str(text), "length": 48, "tasks": "first", "include_path": str(tasks), **wrong}
    with pytest.raises(RecipeError, match=says):
        compress.run(recipe_for(original, [{"rtn": {"group_size": 32}}], text, evaluation=evaluation), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_tasks_over_public_benchmarks(shared: Path, shipped_model: Path, root: Path) -> None:
    folder = root / "scripts" / "tasks"
    names = [f"local_{file.stem}" for file in sorted(folder.glob("*.yaml"))]
    assert len(names) == 9
    ours = evaluate_tasks(shipped_model, settings(folder, *names, limit=4))["model"]
    check_same(ours, harness(shipped_model, folder, names, limit=4))
    counts = {task: n["original"] for task, n in ours["n-samples"].items()}
    assert counts["local_hellaswag"] == 10042
    assert counts["local_arc_easy"] == 2376


@pytest.mark.slow
def test_the_command_line_of_the_harness_gives_the_same(original: Path, tasks: Path, tmp_path: Path) -> None:
    """The whole of both commands; reading the harness's list of tasks is most of its time."""
    theirs = ["-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={original}", "--tasks", "first,written"]
    theirs += [
        "--include_path",
        str(tasks),
        "--device",
        "cpu",
        "--batch_size",
        "8",
        "--output_path",
        "o",
        "--log_samples",
    ]
    subprocess.run([sys.executable, *theirs], cwd=tmp_path, capture_output=True, check=True)
    found = evaluate_tasks(original, settings(tasks, "first", "written"))["model"]
    save_results(found, tmp_path / "ours", log_samples=True)
    for task in ("first", "written"):
        (mine,), (written,) = ((tmp_path / place).rglob(f"samples_{task}_*.jsonl") for place in ("ours", "o"))
        assert mine.read_text() == written.read_text()
