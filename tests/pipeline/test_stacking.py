"""Stacks behind the pass: interrupted anywhere they come out the same, and nothing is measured or written twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compress.checkpoint.headers import read_base_headers, read_header
from compress.checkpoint.stack import stack_of
from compress.errors import RecipeError
from compress.pipeline import stack_view
from compress.pipeline.plan import plan
from compress.pipeline.progress import Silent
from compress.pipeline.run import run
from compress.pipeline.stacking import files_of
from compress.recipe import Recipe
from tests.runs import fingerprints, recipe_for
from tests.tiny_models import save_tiny

STEPS = [{"bitstack": {"rank": 2, "blocks": 3, "rows": 1, "file_mib": 0.01}}]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Recipe:
    return recipe_for(save_tiny("llama", tmp_path_factory.mktemp("source") / "llama"), STEPS, text, evaluation=False)


@pytest.fixture(scope="module")
def whole(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(recipe, tmp_path_factory.mktemp("whole") / "out").folder


class Stop(Silent):
    """Ends the run after `steps` of the first phase whose name begins with `phase`."""

    def __init__(self, phase: str, steps: int):
        self.wanted, self.left, self.phase = phase, steps, ""

    def begin(self, phase: str, total: int, unit: str) -> None:
        self.phase = phase

    def advance(self, steps: int = 1, detail: str = "") -> None:
        if self.phase.startswith(self.wanted):
            self.left -= steps
            if self.left <= 0:
                raise KeyboardInterrupt


@pytest.mark.parametrize(("phase", "steps"), [("order", 7), ("stack", 1), ("stack", 8)])
def test_interrupted_while_it_is_stacked_it_comes_out_the_same(
    phase: str, steps: int, recipe: Recipe, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(recipe, out, progress=Stop(phase, steps))
    assert not (out / "config.json").exists()
    written = {file.name: file.stat().st_mtime_ns for file in out.glob("*.safetensors")}
    measured: list[int] = []
    changed = stack_view._AtLevel.changed

    def counted(self: Any, index: int, names: Any, *others: Any) -> list[float]:
        measured.append(index)
        return changed(self, index, names, *others)

    monkeypatch.setattr(stack_view._AtLevel, "changed", counted)
    run(recipe, out)
    assert fingerprints(out) == fingerprints(whole)
    assert not (out / ".compress").exists()
    if phase == "stack":
        assert not measured and len(written) == steps
        assert {name: (out / name).stat().st_mtime_ns for name in written} == written
    else:
        assert 0 < len(measured) < 3  # of three blocks, those that were finished are remembered


def test_files_hold_the_order_and_the_plan_knew_every_size(recipe: Recipe, whole: Path) -> None:
    planned = plan(recipe).to_dict()["stack"]
    base = read_base_headers(whole)
    table = stack_of(whole, base)
    assert table is not None
    assert (table.minimum, table.maximum) == (planned["minimum"], planned["maximum"])
    by_level = {level["level"]: level["bytes"] for level in planned["levels"]}
    for level in (1, 2):
        assert sum(entry.nbytes for entry in table.entries if entry.level == level) == by_level[level + 1]
    assert planned["levels"][-1]["bits_per_weight"] == pytest.approx(table.bits(len(table.entries)))
    seen: dict[str, int] = {}
    for number, file in enumerate(table.files):
        header = read_header(whole / file.name)
        entries = [entry for entry in table.entries if entry.file == number]
        assert sum(entry.nbytes for entry in entries) <= 0.01 * 2**20 or len(entries) == 1
        offsets = [info.offset for info in header.values()]
        assert offsets == sorted(offsets) and len(header) == 3 * len(entries)
        for entry in entries:
            assert seen.setdefault(entry.module, 0) + 1 == entry.level
            seen[entry.module] = entry.level
    assert not any(".block_1." in name for name in base) and all(f"{name}.block_0.signs" in base for name in seen)


def test_files_are_cut_by_size() -> None:
    sizes = {("a", 1): 5, ("b", 1): 5, ("a", 2): 11, ("b", 2): 1}
    assert files_of(sizes, sizes, 10) == [[("a", 1), ("b", 1)], [("a", 2)], [("b", 2)]]


def test_settings_of_the_stack_are_those_of_all_layers(recipe: Recipe, tmp_path: Path, text: Path) -> None:
    steps = [{**STEPS[0], "overrides": {"*.q_proj": {"file_mib": 1}}}]
    mixed = recipe_for(Path(recipe.model.path), steps, text, evaluation=False)
    with pytest.raises(RecipeError, match="file_mib is .* for .*, but one stack holds the blocks of all"):
        run(mixed, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_damaged_file_of_a_finished_stack_is_made_again(recipe: Recipe, whole: Path, tmp_path: Path) -> None:
    """Interrupted behind the model, before its report: the files are not believed unseen."""
    from compress.pipeline import run as run_module

    def broken(*_: Any) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "build_report", broken)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, out)
    assert (out / "config.json").exists()
    (out / "stack-00002-of-00009.safetensors").unlink(missing_ok=True)
    next(iter(sorted(out.glob("stack-*.safetensors")))).write_bytes(b"not this")
    run(recipe, out)
    assert fingerprints(out) == fingerprints(whole)
