"""Steps that rewrite the whole model: what they may stand beside, what is read, what is kept, what is resumed.

`Louder` is a rewrite whose result is known: the residual stream times c, by embeddings and writers, which the norms undo.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress import methods
from compress.checkpoint.headers import read_headers
from compress.checkpoint.load import load
from compress.checkpoint.reader import CheckpointReader
from compress.checkpoint.rewritten import RewrittenReader
from compress.errors import CheckpointError, NumericsError, RecipeError
from compress.methods.base import Extent, MethodConfig
from compress.methods.rewrite import Found, ModelMethod, ModelShape, ModelView, Rewrite
from compress.models.derived import Derived
from compress.pipeline.memory import Memory
from compress.pipeline.output import OBSERVED, WORK_FOLDER
from compress.pipeline.plan import plan
from compress.pipeline.progress import Silent
from compress.pipeline.run import Machine, run
from compress.recipe import Recipe
from tests.runs import fingerprints, recipe_for
from tests.tiny_models import save_tiny

IDS = torch.arange(5, 29)[None]
ROUND = {"rtn": {"bits": 8, "group_size": 32}}
DROP = {"drop_blocks": {"blocks": [1]}}


class LouderConfig(MethodConfig):
    looks: bool = True
    factor: float = 2.0


class Louder(ModelMethod):
    name = "louder"
    summary = "the residual stream, times a factor that was found by looking"
    Config = LouderConfig
    calls: ClassVar[list[str]] = []

    @classmethod
    def rewrite(cls, model: ModelShape, config: LouderConfig, found: Found) -> Rewrite:
        def factor() -> Tensor:
            return found.tensor("factor") if config.looks else torch.tensor(config.factor)

        table = "model.embed_tokens.weight"
        tensors = {table: Derived(model.shapes[table], (table,), lambda rows: rows.float() * factor(), by_rows=True)}
        tied = "lm_head.weight" not in model.shapes
        if tied:
            tensors["lm_head.weight"] = Derived(model.shapes[table], (table,), lambda rows: rows, by_rows=True)
        for name in model.linears:
            for stored in (f"{name}.weight", f"{name}.bias"):
                if name.endswith(("o_proj", "down_proj")) and stored in model.shapes:
                    tensors[stored] = Derived(model.shapes[stored], (stored,), lambda values: values.float() * factor())
        return Rewrite(tensors, untied=tied, note="louder" if found.values is None else f"by {found.values['factor']}")

    @classmethod
    def observes(cls, config: LouderConfig) -> bool:
        return config.looks

    @classmethod
    def observation_bytes(cls, extent: Extent, config: LouderConfig) -> int:
        return 12345

    @classmethod
    def observe(cls, view: ModelView, config: LouderConfig) -> dict[str, Any]:
        cls.calls.append("observe")
        blocks = view.shape.n_blocks

        def sizes() -> list[float]:
            cls.calls.append("looked")
            found, hidden = [], view.embedded()
            with view.track("observe", blocks, "block") as advance:
                for index in range(blocks):
                    with view.loaded(index) as block:
                        for batch in range(len(hidden)):
                            hidden[batch] = block(hidden[batch])
                    found.append(float(hidden[0].norm()))
                    advance(f"{index}")
            hidden.close()
            return found

        found = view.remember("sizes", sizes)

        def make() -> Tensor:
            cls.calls.append("made")
            return torch.tensor(config.factor)

        view.keep("factor", make)
        with view.track("behind", 1, "time") as advance:
            advance("")
        return {"factor": config.factor, "sizes": found}


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(methods.METHODS, "louder", f"{__name__}:Louder")
    Louder.calls.clear()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_tiny("llama_gqa_tied", tmp_path / "source")


def asked(source: Path, text: Path, *steps: dict[str, Any], **fields: Any) -> Recipe:
    return recipe_for(source, list(steps), text, **{"evaluation": False, **fields})


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    return load(folder, dtype=torch.float32)(IDS, use_cache=False).logits


class Stop(Silent):
    """Interrupts at the nth step of a phase."""

    def __init__(self, phase: str, nth: int):
        self.wanted, self.left, self.phase = phase, nth, ""

    def begin(self, phase: str, total: int, unit: str) -> None:
        self.phase = phase

    def advance(self, steps: int = 1, detail: str = "") -> None:
        self.left -= self.phase == self.wanted
        if self.left == 0:
            raise KeyboardInterrupt


# ---- what may stand where


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        (
            [ROUND, DROP],
            "steps.1: drop_blocks rewrites the whole model and must stand before rtn, which compresses layers",
        ),
        ([DROP, ROUND, {"louder": {}}], "steps.2: louder rewrites the whole model and must stand before rtn"),
        ([{**DROP, "layers": "*.q_proj"}], "steps.0.layers: drop_blocks rewrites the whole model, not single layers"),
        ([{**DROP, "skip": "*.q_proj"}], "steps.0.skip: drop_blocks rewrites the whole model"),
        ([{**DROP, "overrides": {"*.q_proj": {"blocks": [0]}}}], "steps.0.overrides: drop_blocks rewrites the whole"),
        ([DROP, {"drop_blocks": {"blocks": [2]}}], "steps.1.drop_blocks: blocks: 2 is no block.*they are 0 to 1"),
    ],
)
def test_what_cannot_stand_there_is_refused_in_the_plan(steps: Any, said: str, source: Path, text: Path):
    with pytest.raises(RecipeError, match=said) as refused:
        plan(asked(source, text, *steps))
    assert "\n" not in str(refused.value)


def test_a_compressed_source_is_refused_where_tensors_would_be_made(source: Path, text: Path, tmp_path: Path):
    run(asked(source, text, ROUND), tmp_path / "packed")
    with pytest.raises(
        RecipeError, match="steps.0.louder: .*is compressed already, and louder rewrites ordinary weights"
    ):
        plan(asked(tmp_path / "packed", text, {"louder": {}}))


# ---- the result


def test_the_plan_says_what_the_result_will_be_before_it_has_looked(source: Path, text: Path, tmp_path: Path):
    recipe = asked(source, text, {"louder": {}}, DROP)
    planned = plan(recipe)
    assert [step.settled for step in planned.rewrites] == [False, True] and planned.architecture.n_blocks == 2
    assert any("steps.0.louder looks at the whole model first" in warning for warning in planned.warnings)
    assert any("they are stored apart, which adds 73,728 bytes" in warning for warning in planned.warnings)
    assert not Louder.calls
    result = run(recipe, tmp_path / "out")
    assert result.plan.bytes_total_after == planned.bytes_total_after
    assert sum(info.nbytes for info in read_headers(tmp_path / "out").values()) == planned.bytes_total_after
    assert not any("looks at the whole model" in warning for warning in result.report["warnings"])
    first, second = result.report["rewrites"]
    assert first["note"] == "by 2.0" and len(first["figures"]["sizes"]) == 3
    assert second["note"] == "leaves out block 1 of 0 to 2" and second["figures"] == {}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("steps", [[{"louder": {}}], [{"louder": {}}, {"louder": {"factor": 4.0}}]], ids=["one", "two"])
def test_the_result_is_the_source_in_other_words(steps: Any, source: Path, text: Path, tmp_path: Path):
    run(asked(source, text, *steps), tmp_path / "out")
    torch.testing.assert_close(logits(tmp_path / "out"), logits(source), rtol=1e-4, atol=1e-4)
    before, after = load_file(source / "model.safetensors"), load_all(tmp_path / "out")
    table = "model.embed_tokens.weight"
    assert torch.equal(after[table], before[table] * (2.0 if len(steps) == 1 else 8.0))
    assert torch.equal(after["lm_head.weight"], before[table])


def load_all(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_rewrites_in_a_row_give_what_each_gives_on_the_result_of_the_other(source: Path, text: Path, tmp_path: Path):
    run(asked(source, text, {"louder": {}}, DROP), tmp_path / "together")
    run(asked(source, text, {"louder": {}}), tmp_path / "first")
    run(asked(tmp_path / "first", text, DROP), tmp_path / "second")
    run(asked(source, text, DROP, {"louder": {"factor": 2.0}}), tmp_path / "other_way")
    together = load_all(tmp_path / "together")
    for other in ("second", "other_way"):
        found = load_all(tmp_path / other)
        assert found.keys() == together.keys()
        assert all(torch.equal(tensor, together[name]) for name, tensor in found.items())


def test_layers_are_compressed_as_though_the_rewritten_model_had_been_written(source: Path, text: Path, tmp_path: Path):
    later = {"gptq": {"bits": 4, "group_size": 32}}
    run(asked(source, text, {"louder": {}}, DROP, later), tmp_path / "together")
    run(asked(source, text, {"louder": {}}, DROP), tmp_path / "first")
    run(asked(tmp_path / "first", text, later), tmp_path / "second")
    together, apart = load_all(tmp_path / "together"), load_all(tmp_path / "second")
    assert together.keys() == apart.keys()
    assert all(torch.equal(together[name], apart[name]) for name in apart)


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_float_tensors_are_stored_as_the_recipe_says(stored: str, text: Path, tmp_path: Path):
    source = save_tiny("llama_gqa_tied", tmp_path / "source", dtype=torch.bfloat16)
    step = {"louder": {"factor": 1.01, "looks": False}}
    recipe = asked(source, text, step, model={"path": str(source), "dtype": stored})
    planned = plan(recipe)
    run(recipe, tmp_path / "out")
    before, after = load_file(source / "model.safetensors"), load_all(tmp_path / "out")
    assert {tensor.dtype for tensor in after.values()} == {getattr(torch, stored)}
    assert sum(tensor.nbytes for tensor in after.values()) == planned.bytes_total_after
    name = "model.layers.1.mlp.down_proj.weight"
    made = before[name].float() * 1.01  # rounded once, to what is stored
    assert torch.equal(after[name], made.to(getattr(torch, stored)))
    assert torch.equal(after["lm_head.weight"].bfloat16(), before["model.embed_tokens.weight"])


# ---- what is found is kept


@pytest.mark.parametrize(("phase", "nth"), [("observe", 2), ("behind", 1), ("compress", 2)])
def test_an_interrupted_run_goes_on_with_what_it_had_found(
    phase: str, nth: int, source: Path, text: Path, tmp_path: Path
):
    recipe = asked(source, text, {"louder": {}}, DROP, ROUND)
    whole = run(recipe, tmp_path / "whole")
    Louder.calls.clear()
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "cut", progress=Stop(phase, nth))
    assert not (tmp_path / "cut" / "config.json").exists()
    cut = list(Louder.calls)
    Louder.calls.clear()
    resumed = run(recipe, tmp_path / "cut")
    assert fingerprints(tmp_path / "cut") == fingerprints(tmp_path / "whole")
    assert resumed.report["rewrites"] == whole.report["rewrites"]
    expected = {
        "observe": (["observe", "looked"], ["observe", "looked", "made"]),
        "behind": (["observe", "looked", "made"], ["observe"]),
        "compress": (["observe", "looked", "made"], []),
    }
    assert (cut, Louder.calls) == expected[phase]
    assert not (tmp_path / "cut" / WORK_FOLDER).exists()


@pytest.mark.parametrize("damage", ["torn", "of_another"])
def test_a_kept_tensor_that_cannot_be_read_is_made_again(damage: str, source: Path, text: Path, tmp_path: Path):
    recipe = asked(source, text, {"louder": {}})
    run(recipe, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "cut", progress=Stop("behind", 1))
    (file,) = (tmp_path / "cut" / WORK_FOLDER).glob(f"{OBSERVED}0.factor.*")
    if damage == "torn":
        file.write_bytes(file.read_bytes()[:-2])
    else:
        save_file({"other": torch.ones(3)}, file)
    Louder.calls.clear()
    run(recipe, tmp_path / "cut")
    assert Louder.calls == ["observe", "made"]
    assert fingerprints(tmp_path / "cut") == fingerprints(tmp_path / "whole")


def test_where_activations_live_changes_nothing(source: Path, text: Path, tmp_path: Path):
    recipe = asked(source, text, {"louder": {}}, ROUND)
    run(recipe, tmp_path / "memory")
    run(recipe, tmp_path / "disk", machine=Machine(activation_bytes=0))
    assert fingerprints(tmp_path / "memory") == fingerprints(tmp_path / "disk")


def test_a_line_that_was_cut_off_is_forgotten(tmp_path: Path):
    memory = Memory(tmp_path / "memory.jsonl")
    assert memory.remember("a", lambda: (1, 2)) == [1, 2]  # as it will be read
    memory.remember("b", lambda: {"x": 1.5})
    memory.path.write_bytes(memory.path.read_bytes()[:-3])
    again = Memory(memory.path)
    assert again.values == {"a": [1, 2]}
    assert again.remember("b", lambda: 7) == 7
    assert again.remember("c", lambda: 8) == 8
    assert Memory(memory.path).values == {"a": [1, 2], "b": 7, "c": 8}


def test_another_source_under_the_same_name_is_not_gone_on_with(source: Path, text: Path, tmp_path: Path):
    recipe = asked(source, text, {"louder": {}}, DROP, ROUND)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "cut", progress=Stop("compress", 2))
    weights = source / "model.safetensors"
    save_file({name: tensor * 1.5 for name, tensor in load_file(weights).items()}, weights, metadata={"format": "pt"})
    with pytest.raises(RecipeError, match="another content of the model"):
        run(recipe, tmp_path / "cut")


def test_bytes_are_planned_where_float_dtypes_are_mixed(source: Path, text: Path, tmp_path: Path):
    weights = source / "model.safetensors"
    mixed = {name: t if "norm" in name else t.bfloat16() for name, t in load_file(weights).items()}
    save_file(mixed, weights, metadata={"format": "pt"})
    result = run(asked(source, text, DROP), tmp_path / "out")
    assert result.plan.bytes_total_after == sum(t.nbytes for t in load_all(tmp_path / "out").values())


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_another_dtype_without_a_rewrite(stored: str, source: Path, text: Path, tmp_path: Path):
    """Norms and all else that is kept are rounded when they are written: they must run so before."""
    run(asked(source, text, ROUND, model={"path": str(source), "dtype": stored}), tmp_path / "out")
    assert {t.dtype for t in load_all(tmp_path / "out").values() if t.is_floating_point()} == {getattr(torch, stored)}


def test_what_looks_is_planned_by_the_model_that_it_looks_at(source: Path, text: Path):
    looks = {"drop_blocks": {"n_drop": 1, "score": "taylor", "protect": [0, 0]}}
    alone = plan(asked(source, text, looks))
    followed = plan(asked(source, text, looks, {"drop_blocks": {"blocks": [0]}}))
    assert followed.peak_bytes >= alone.peak_bytes


def test_making_tensors_takes_memory_in_the_plan(source: Path, text: Path):
    rotated = plan(asked(source, text, {"rotate": {}}))
    assert rotated.peak_bytes > plan(asked(source, text, {"drop_blocks": {"blocks": [2]}})).peak_bytes


# ---- damaged sources


@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "model.layers.2.self_attn.q_proj.weight"],
)
@pytest.mark.parametrize("looks", [True, False])
def test_a_source_with_nan_is_named(name: str, looks: bool, source: Path, text: Path, tmp_path: Path):
    tensors = load_file(source / "model.safetensors")
    tensors[name].view(-1)[::7] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name.removesuffix('.weight')}.* NaN") as refused:
        run(asked(source, text, {"louder": {"looks": looks}}, ROUND), tmp_path / "out")
    assert "\n" not in str(refused.value)


def test_values_beyond_the_dtype_that_is_stored_are_refused(source: Path, text: Path, tmp_path: Path):
    recipe = asked(source, text, {"louder": {"factor": 1e9}}, model={"path": str(source), "dtype": "float16"})
    with pytest.raises(NumericsError, match=r"beyond the range of F16; use --set model.dtype=bfloat16"):
        run(recipe, tmp_path / "out")


# ---- the reader


@pytest.fixture
def table(tmp_path: Path):
    """`open(...)`: a reader of a table that is another one times a column, and what it should hold."""
    torch.manual_seed(0)
    rows, scale = torch.randn(1000, 16), torch.randn(1, 16)
    save_file({"rows": rows, "scale": scale}, tmp_path / "model.safetensors")
    calls: list[int] = []

    def make(part: Tensor, column: Tensor) -> Tensor:
        calls.append(len(part))
        return part * column

    def open_(by_rows: bool, cache_bytes: int = 0) -> RewrittenReader:
        base = CheckpointReader(tmp_path)
        info = base.info("rows")
        infos = {name: type(info)(name, "F32", (1000, 16), info.file, 0, 64000) for name in ("a", "b")}
        derived = Derived((1000, 16), ("rows", "scale"), make, by_rows)
        return RewrittenReader(
            base, {**infos, "scale": base.info("scale")}, {"a": derived, "b": derived, "scale": "scale"}, cache_bytes
        )

    return open_, rows * scale, calls


def test_a_table_by_rows_is_made_only_where_it_is_read(table: Any, monkeypatch: pytest.MonkeyPatch):
    open_, expected, calls = table
    monkeypatch.setattr("compress.checkpoint.rewritten.ROWS_BYTES", 64 * 8 * 100)  # 100 rows at a time
    with open_(by_rows=True) as reader:
        wanted = torch.tensor([3, 4, 5, 700, 999])
        assert torch.equal(reader.read_rows("a", wanted), expected[wanted]) and calls == [5]  # one product
        assert torch.equal(reader.read_rows("a", wanted, torch.bfloat16), expected[wanted].bfloat16())
        calls.clear()
        assert torch.equal(reader.read("a"), expected) and calls == [100] * 10
        assert torch.equal(reader.read("scale"), reader.base.read("scale"))
        pieces = b"".join(bytes(piece) for piece in reader.chunks("a"))
        assert pieces == expected.numpy().tobytes()
        calls.clear()  # a stretch that begins and ends within tiles: tiles as they were, the last one not made again
        part = reader._bytes(reader.info("b"), 64 * 150 + 8, 64 * 100)
        assert bytes(part) == pieces[64 * 150 + 8 :][: 64 * 100] and calls == [100, 100]
        assert bytes(reader._bytes(reader.info("b"), 64 * 260, 8)) == pieces[64 * 260 :][:8] and calls == [100, 100]


def test_a_tensor_is_made_once_while_there_is_room_for_it(table: Any):
    open_, expected, calls = table
    with open_(by_rows=False, cache_bytes=130_000) as reader:
        for name in ("a", "b", "a", "b"):
            assert torch.equal(reader.read(name), expected)
        assert torch.equal(reader.read_rows("b", torch.tensor([8, 9])), expected[8:10])
        assert len(calls) == 2
    calls.clear()
    with open_(by_rows=False, cache_bytes=64_000) as reader:  # room for one
        for name in ("a", "a", "b", "a"):
            reader.read(name)
        assert len(calls) == 3
