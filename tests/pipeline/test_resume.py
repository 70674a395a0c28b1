"""Killed at any moment and started again, a run ends with the very files of a run that nothing disturbed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.errors import RecipeError
from compress.pipeline.progress import Silent
from compress.pipeline.run import RunResult, run
from compress.recipe import Recipe
from tests.pipeline.killing import Moment, run_until
from tests.tiny_models import save_tiny

REPORT, PAGE = "compress_report.json", "compress_report.html"
WORDS = "the old bridge over the river was never as dark as the stone under it, and nobody went there slowly. "

MOMENTS = [  # in the order in which a run comes by
    Moment("os.replace", "*/journal.jsonl"),
    Moment("os.fsync", "*-00001-of-*.partial", "torn"),
    Moment("os.replace", "*-00002-of-*"),
    Moment("os.replace", "*-00003-of-*", "after"),  # the shard is there, the journal does not know it
    Moment("os.fsync", "*/journal.jsonl", "torn", 2),
    Moment("advance", "compress", nth=2),
    Moment("os.replace", "*.safetensors.index.json", "after"),
    Moment("os.fsync", "*/tokenizer.json.partial", "torn"),
    Moment("os.replace", "*/out/config.json"),
    Moment("os.replace", "*/out/config.json", "after"),
    Moment("advance", "evaluate*", nth=2),
    Moment("os.replace", f"*/{REPORT}"),
    Moment("rmtree", "*/.compress"),
]
WHOLE = MOMENTS[9:]  # the model is finished then; what is missing is its evaluation and the report


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("resume")
    source = save_tiny("llama", folder / "model", max_shard_size="300KB")
    (source / "LICENSE").write_text("do as you like")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    (folder / "text.txt").write_text(WORDS * 40)
    return {
        "model": str(source),
        "calibration": {"data": str(folder / "text.txt"), "samples": 4, "length": 32, "batch_size": 2},
        "steps": [{"gptq": {"bits": 4, "group_size": 32}}],
        "evaluation": {"data": str(folder / "text.txt"), "length": 32, "max_tokens": 256},
    }


@pytest.fixture(scope="module")
def undisturbed(recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return run(Recipe.from_dict(recipe), tmp_path_factory.mktemp("undisturbed") / "out")


def contents(folder: Path) -> dict[str, str]:
    """Checksums of all files, at any depth, but the report and its page, which hold timings."""
    files = [f for f in sorted(folder.rglob("*")) if f.is_file() and f.name not in (REPORT, PAGE)]
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def lasting(report: dict[str, Any]) -> dict[str, Any]:
    """The report without what may differ: where, when, how fast."""
    passing = (
        "out",
        "seconds",
        "activities",
        "created",
        "peak_bytes",
        "peaks",
        "replayed_blocks",
        "predicted_seconds",
        "evaluation",
    )
    kept = {key: value for key, value in report.items() if key not in passing}
    return {**kept, "fidelity": report["evaluation"]["fidelity"], "files": {**report["files"]}}


def assert_no_model(folder: Path) -> None:
    """Nobody takes the folder for a model."""
    from transformers import AutoModelForCausalLM

    assert not (folder / "config.json").exists()
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)


@pytest.mark.parametrize("moment", MOMENTS, ids=str)
def test_killed_and_resumed(moment: Moment, recipe: dict[str, Any], undisturbed: RunResult, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run_until(moment, recipe, out, torch.get_num_threads()) == -9
    if moment in WHOLE:
        assert contents(undisturbed.folder).items() <= contents(out).items()
    else:
        assert_no_model(out)
    resumed = run(Recipe.from_dict(recipe), out)
    assert contents(out) == contents(undisturbed.folder)
    assert lasting(resumed.report) == lasting(undisturbed.report)
    assert not (out / ".compress").exists()


def test_killed_again_and_again(recipe: dict[str, Any], undisturbed: RunResult, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for moment in (MOMENTS[2], MOMENTS[4], MOMENTS[3], MOMENTS[8], MOMENTS[10]):
        assert run_until(moment, recipe, out, torch.get_num_threads()) == -9
    run(Recipe.from_dict(recipe), out)
    assert contents(out) == contents(undisturbed.folder)


class Phases(Silent):
    """Stops a run at the `stop`-th step of a phase, and remembers which phases there were."""

    def __init__(self, phase: str = "", stop: int = 0):
        super().__init__()
        self.phases: list[str] = []
        self.phase, self.left = phase, stop

    def begin(self, phase: str, total: int, unit: str) -> None:
        self.phases.append(phase.split()[0])

    def advance(self, steps: int = 1, detail: str = "") -> None:
        if self.phases[-1] == self.phase:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt


def interrupt(recipe: dict[str, Any], out: Path, phase: str, step: int = 2) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(Recipe.from_dict(recipe), out, progress=Phases(phase, step))


def test_evaluation_alone_is_repeated(recipe: dict[str, Any], undisturbed: RunResult, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupt(recipe, out, "evaluate")
    written = {f.name: f.stat().st_mtime_ns for f in out.iterdir() if f.is_file()}
    phases = Phases()
    result = run(Recipe.from_dict(recipe), out, progress=phases)
    assert set(phases.phases) == {"evaluate"}
    assert {name: (out / name).stat().st_mtime_ns for name in written} == written
    assert lasting(result.report) == lasting(undisturbed.report)


@pytest.mark.parametrize("phase", ["compress", "evaluate"])
def test_a_damaged_shard_is_made_again(
    phase: str, recipe: dict[str, Any], undisturbed: RunResult, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    interrupt(recipe, out, phase)
    shard = out / "model-00002-of-00005.safetensors"
    damaged = bytearray(shard.read_bytes())
    damaged[-1] ^= 1
    shard.write_bytes(damaged)
    progress = Silent()
    result = run(Recipe.from_dict(recipe), out, progress=progress)
    assert [note for note in progress.notes if shard.name in note]
    assert result.report["replayed_blocks"] == 0
    assert contents(out) == contents(undisturbed.folder)


def test_a_journal_that_makes_no_sense_begins_anew(
    recipe: dict[str, Any], undisturbed: RunResult, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    interrupt(recipe, out, "evaluate")
    (out / ".compress" / "journal.jsonl").write_bytes(b'{"a": 1}\n[]\n\x00\xff')
    run(Recipe.from_dict(recipe), out)
    assert contents(out) == contents(undisturbed.folder)


def test_another_recipe_continues_where_nothing_was_finished(
    recipe: dict[str, Any], undisturbed: RunResult, tmp_path: Path
) -> None:
    out, own = tmp_path / "out", {**recipe, "output": {"format": "compress"}}
    assert run_until(Moment("os.replace", "*-00001-of-*", "after"), own, out, torch.get_num_threads()) == -9
    assert (out / "compress-00001-of-00005.safetensors").exists()
    run(Recipe.from_dict(recipe), out)
    assert contents(out) == contents(undisturbed.folder)


def test_changed_text_is_noticed(recipe: dict[str, Any], tmp_path: Path) -> None:
    text = tmp_path / "own.txt"
    text.write_text(WORDS * 40)
    own = {**recipe, "calibration": {**recipe["calibration"], "data": str(text)}}
    interrupt(own, tmp_path / "out", "compress")
    text.write_text("other " + WORDS * 40)
    with pytest.raises(RecipeError, match="unfinished run with another calibration text; continue"):
        run(Recipe.from_dict(own), tmp_path / "out")


def test_another_device_does_not_go_on(recipe: dict[str, Any], undisturbed: RunResult, tmp_path: Path) -> None:
    """Its numbers differ in the last bits. A finished result is one wherever it was made."""
    out = tmp_path / "out"
    interrupt(recipe, out, "compress")
    journal = out / ".compress" / "journal.jsonl"
    header, rest = journal.read_text().split("\n", 1)
    content = json.loads(header)
    assert (content["device"], content["dtype of the arithmetic"]) == ("cpu", "float32")
    journal.write_text(json.dumps({**content, "device": "cuda", "dtype of the arithmetic": "bfloat16"}) + "\n" + rest)
    with pytest.raises(
        RecipeError, match="run on cuda in bfloat16.* on cpu in float32; use --device cuda, .*--overwrite"
    ):
        run(Recipe.from_dict(recipe), out)
    assert run(Recipe.from_dict(recipe), undisturbed.folder).already_finished


def test_finished_again_gives_the_stored_report(recipe: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = run(Recipe.from_dict(recipe), out)
    before = {f: f.stat().st_mtime_ns for f in out.rglob("*")}
    phases = Phases()
    again = run(Recipe.from_dict(recipe), out, progress=phases)
    assert again.already_finished
    assert not first.already_finished
    assert not phases.phases
    assert json.dumps(again.report) == json.dumps(first.report)
    assert {f: f.stat().st_mtime_ns for f in out.rglob("*")} == before


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "unfinished"])
def test_overwrite_removes_only_what_is_ours(
    finished: bool, recipe: dict[str, Any], undisturbed: RunResult, tmp_path: Path
) -> None:
    out, own = tmp_path / "out", {**recipe, "output": {"format": "compress"}}
    if finished:
        run(Recipe.from_dict(own), out)
    else:
        interrupt(own, out, "evaluate")
    (out / "notes").mkdir()
    theirs = {"notes/plan.md": "mine", "tokenizer_notes.txt": "mine too", "weights.safetensors": "not a shard of ours"}
    for name, text in theirs.items():
        (out / name).write_text(text)
    run(Recipe.from_dict(recipe), out, overwrite=True)
    found = contents(out)
    assert {name: (out / name).read_text() for name in theirs} == theirs
    assert {name: digest for name, digest in found.items() if name not in theirs} == contents(undisturbed.folder)


def test_a_refused_overwrite_loses_nothing(recipe: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(Recipe.from_dict(recipe), out)
    before = contents(out)
    wanted = {**recipe, "calibration": {**recipe["calibration"], "samples": 10_000}}
    with pytest.raises(RecipeError, match=r"calibration\.samples"):
        run(Recipe.from_dict(wanted), out, overwrite=True)
    assert {name: digest for name, digest in contents(out).items() if not name.startswith(".compress")} == before
    assert run(Recipe.from_dict(recipe), out).already_finished
