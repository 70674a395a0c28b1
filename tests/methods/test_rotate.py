"""Rotations: exact in every family that admits them, better to round, and learned ones never worse than random ones."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedModel

import compress
from compress.calibration.data import load_tokenizer, load_tokens
from compress.checkpoint.source import find_source
from compress.checkpoint.stream import StreamedModel
from compress.errors import CheckpointError, NumericsError, RecipeError
from compress.linalg.grid import GridRule, fit_grid
from compress.linalg.rotation import DenseRotation, MeanKeeping
from compress.methods import rotate_learning
from compress.methods.rewrite import Found
from compress.methods.rotate import Rotate, RotateConfig, Rotations
from compress.methods.rotate_learning import RoundedModel, rounded
from compress.pipeline.plan import plan
from compress.pipeline.progress import Silent
from compress.pipeline.rewriting import _planned, open_rewritten, seeded
from compress.pipeline.run import run
from tests.runs import fingerprints, recipe_for
from tests.tiny_models import TINY, save_tiny

REFUSED = {
    "gemma2": "Gemma 2 .* norms behind attention and MLP",
    "gemma3_text": "Gemma 3 .* norms behind attention and MLP",
    "opt_post_norm": "OPT .* token table has 32 columns",
}
ROTATED = sorted(TINY.keys() - REFUSED)
EXPERTS = ("mixtral", "qwen3_moe")
SETTINGS: dict[str, dict[str, Any]] = {
    "r1": {"r2": "none"},
    "r2": {"r1": "none"},
    "both, orthogonal": {"r1": "orthogonal", "r2": "orthogonal"},
    "online alone": {"r1": "none", "r2": "none", "online": ["mlp"]},
    "all": {"online": ["mlp", "attention"], "block_size": 16},
}
IDS = torch.arange(2 * 24).view(2, 24)
LEARN = {"candidates": 3, "learn": 6, "bits": 3, "group_size": 16}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = save_tiny(family, tmp_path_factory.mktemp("tiny") / family)
        return made[family]

    return get


@pytest.fixture(scope="session")
def ran(tiny: Any, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`ran(family, settings, *later steps)`: the result of a run, made once."""
    made: dict[str, Any] = {}

    def get(family: str, settings: dict[str, Any], *then: dict[str, Any]) -> Any:
        key = json.dumps([family, settings, then])
        if key not in made:
            recipe = recipe_for(tiny(family), [{"rotate": settings}, *then], text, evaluation=False)
            made[key] = run(recipe, tmp_path_factory.mktemp("rotated") / "out")
        return made[key]

    return get


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def stock(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def relative(found: Tensor, true: Tensor) -> float:
    return float((found - true).norm() / true.norm())


def planned(folder: Path, number: int = 0, source: Any = None, **settings: Any) -> Any:
    def generator(purpose: str) -> torch.Generator:
        return seeded(0, number, purpose)

    found = Found(None, {}.__getitem__, generator)
    return _planned(number, Rotate, RotateConfig(**settings), source or find_source(str(folder)), "F32", found)


def rewritten(folder: Path, work: Path, *steps: Any) -> StreamedModel:
    work.mkdir()
    (work / "config.json").write_text(json.dumps(steps[-1].after.config))
    return StreamedModel(work, reader=open_rewritten(folder, steps), specs={})


# ---- the same function


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("family", ROTATED)
def test_computes_the_same(family, settings, tiny, tmp_path):
    if family in EXPERTS and "mlp" in settings.get("online", ()):
        settings = {**settings, "online": ["attention"]}
    step = planned(tiny(family), **settings)
    model = rewritten(tiny(family), tmp_path / "w", step).whole()
    before = stock(tiny(family))
    assert relative(logits(model), logits(before)) < 1e-5
    assert any(name in step.tensors and not isinstance(step.tensors[name], str) for name in step.before.infos)


@pytest.mark.parametrize("family", ["llama_gqa_tied", "gemma", "phi3", "opt", "gpt2_no_prefix", "gpt_neox", "mixtral"])
def test_r1_and_r2_leave_an_ordinary_checkpoint(family, tiny, ran):
    result = ran(family, {})
    config = json.loads((result.folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["model_type"] == TINY[family][0]
    assert relative(logits(stock(result.folder)), logits(stock(tiny(family)))) < 1e-5
    assert result.plan.bytes_total_after == sum(
        t.nbytes for f in result.folder.glob("*.safetensors") for t in load_file(f).values()
    )


def test_a_tied_head_is_untied_and_counted(tiny, ran):
    result = ran("llama_gqa_tied", {})
    assert not json.loads((result.folder / "config.json").read_text())["tie_word_embeddings"]
    vocabulary, width = 288, 64
    assert result.plan.bytes_total_after - result.plan.bytes_total_before == 4 * vocabulary * width
    assert f"the head gets its own {vocabulary} x {width} weights" in result.report["rewrites"][0]["note"]
    alone = planned(tiny("llama_gqa_tied"), r1="none")
    assert alone.after.config["tie_word_embeddings"]


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_what_is_online_loads_generates_and_saves(family, tiny, ran, tmp_path):
    result = ran(family, {"online": ["mlp", "attention"]})
    written = json.loads((result.folder / "config.json").read_text())["quantization_config"]
    assert written["structure"] == {
        "hadamard": {"mlp_out": 128, "attn_out": 64},
        "check": written["structure"]["check"],
    }
    model, before = compress.load(result.folder), stock(tiny(family))
    assert relative(logits(model), logits(before)) < 1e-5
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    prompt = IDS[:1, :5]
    assert torch.equal(model.generate(prompt, **options), before.generate(prompt, **options))  # with a cache
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(compress.load(tmp_path / "saved")), logits(model))


def test_an_unguarded_copy_of_what_is_online_is_refused(ran, tmp_path):
    """Its tensors have ordinary names and shapes: stock transformers would run it without the transform."""
    model = compress.load(ran("llama", {"online": ["mlp"]}).folder)
    with pytest.raises(CheckpointError, match="save_pretrained"):
        PreTrainedModel.save_pretrained(model, tmp_path / "copy")


@pytest.mark.parametrize("size", [7, 24, 4096, 64])
def test_a_described_transform_that_does_not_fit_or_is_not_the_one(size, ran, tmp_path):
    """Blocks of 64 fit the 128 inputs, and give another model."""
    folder = shutil.copytree(ran("llama", {"online": ["mlp"]}).folder, tmp_path / "altered")
    config = json.loads((folder / "config.json").read_text())
    structure = config["quantization_config"]["structure"]
    structure["hadamard"]["mlp_out"] = size
    if size != 64:
        del structure["check"]
    (folder / "config.json").write_text(json.dumps(config))
    for opened in (compress.load, StreamedModel):
        with pytest.raises(
            CheckpointError, match="is not what this model was made with" if size == 64 else f"blocks of {size}"
        ):
            opened(folder)


def test_hidden_states_in_other_bases_are_not_compared(tiny, text, tmp_path):
    recipe = recipe_for(tiny("llama"), [{"rotate": {}}], text)
    report = run(recipe, tmp_path / "out").report
    assert "different bases" in report["evaluation"]["hidden_states"]["reason"]
    assert report["evaluation"]["fidelity"]["kl_mean"] < 1e-5


def test_online_weights_are_in_that_basis(tiny, tmp_path):
    """Without the transform the rotated down projection computes something else: it is not there for nothing."""
    model = rewritten(tiny("llama"), tmp_path / "w", planned(tiny("llama"), online=["mlp"])).whole()
    for block in model.model.layers:
        block.mlp.down_proj = block.mlp.down_proj.linear
    assert relative(logits(model), logits(stock(tiny("llama")))) > 0.1


@pytest.mark.parametrize("online", [[], ["attention"]])
def test_rotating_twice(online, tiny, tmp_path):
    """Each rotation once, however many steps or runs lie between; what transforms inputs while it runs is refused."""
    first = planned(tiny("opt"), online=online, r2="none")
    with pytest.raises(RecipeError, match="rewritten before" if online else "r1: it is in another basis already"):
        planned(tiny("opt"), 1, first.after)
    if not online:
        second = planned(tiny("opt"), 1, first.after, r1="none")
        with pytest.raises(RecipeError, match="r1: it is in another basis already"):
            planned(tiny("opt"), 2, second.after, r2="none")
        with pytest.raises(RecipeError, match="r2: it is in another basis already"):
            planned(tiny("opt"), 2, second.after, r1="none")
        model = rewritten(tiny("opt"), tmp_path / "w", first, second).whole()
        assert relative(logits(model), logits(stock(tiny("opt")))) < 1e-5


def test_a_rotated_folder_is_not_rotated_again(tiny, ran, text, tmp_path):
    """Its config.json says so, also where transformers has written it."""
    folder = ran("llama_gqa_tied", {}).folder
    assert json.loads((folder / "config.json").read_text())["compress_rewritten"] == {"rotate": ["r1", "r2"]}
    stock(folder).save_pretrained(tmp_path / "saved")
    for path in (folder, tmp_path / "saved"):
        with pytest.raises(
            RecipeError, match=r"steps.0.rotate: r1: it is in another basis already.*begin with the original"
        ):
            plan(recipe_for(path, [{"rotate": {}}], text, evaluation=False))


def test_a_shift_whose_gain_is_0_is_refused(tiny, tmp_path, text):
    from compress.errors import NumericsError

    folder = save_tiny("gpt2", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if n.endswith("ln_f.weight"))
    tensors[name][3] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericsError, match="ln_f: has a shift where its gain is 0"):
        run(recipe_for(folder, [{"rotate": {}}], text, evaluation=False), tmp_path / "out")


# ---- refusals


@pytest.mark.parametrize(("family", "message"), REFUSED.items())
def test_families_whose_stream_cannot_be_rotated(family, message, tiny, text):
    with pytest.raises(RecipeError, match=f"steps.0.rotate: {message}"):
        plan(recipe_for(tiny(family), [{"rotate": {}}], text))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r1": "none", "r2": "none"}, "rotates nothing"),
        ({"r1": "none", "r2": "none", "online": ["mlp"], "learn": 3}, "both are none"),
        ({"r1": "orthogonal", "block_size": 16}, "neither R1 nor an online transform"),
        ({"online": ["mlp", "mlp"]}, "names a branch twice"),
        ({"learning_rate": 1.0, "candidates": 2}, "learning_rate is for learn"),
        ({"bits": 3}, "bits is for candidates and learn"),
        ({"learn": 1, "group_size": 0}, "group_size=0"),
    ],
)
def test_settings_that_do_nothing(settings, message):
    with pytest.raises(ValidationError, match=message):
        RotateConfig(**settings)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        (
            "llama",
            {"block_size": 48},
            r"block_size=48 does not suit the residual stream, 64; use one of \[2, 4, 8, 16, 32, 64\]",
        ),
        (
            "llama",
            {"online": ["mlp"], "r1": "none", "block_size": 256},
            "does not suit the input of the last linear of mlp, 128",
        ),
        (
            "llama",
            {"learn": 1, "group_size": 24},
            r"group_size=24 does not divide in_features=64 .* use one of \[1, 2, 4, 8, 16\]",
        ),
        ("mixtral", {"online": ["mlp"]}, "experts are not transformed"),
        ("qwen3_moe", {"online": ["mlp"]}, "experts are not transformed"),
    ],
)
def test_what_a_model_does_not_admit(family, settings, message, tiny, text):
    with pytest.raises(RecipeError, match=f"steps.0.rotate: .*{message}"):
        plan(recipe_for(tiny(family), [{"rotate": settings}], text))


def test_a_width_without_a_hadamard_matrix(tmp_path, text):
    odd = save_tiny("llama", tmp_path / "odd", intermediate_size=107)
    with pytest.raises(RecipeError, match="mlp has 107 entries, for which there is no Hadamard matrix"):
        plan(recipe_for(odd, [{"rotate": {"online": ["mlp"]}}], text))
    blocks = save_tiny("llama", tmp_path / "blocks", intermediate_size=214)
    assert "in blocks of 2 in mlp" in planned(blocks, online=["mlp"]).rewrite.note


# ---- what it is for


def test_outliers_are_spread(tiny, tmp_path):
    folder = save_tiny("llama", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if name.endswith(("gate_proj.weight", "up_proj.weight", "q_proj.weight")):
            tensors[name][:, [5, 40]] *= 30
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    before, after = stock(folder), rewritten(folder, tmp_path / "w", planned(folder)).whole()

    def error(weight: Tensor) -> float:
        grid = fit_grid(weight, 32, GridRule(4))
        return float((grid.decode(grid.encode(weight)) - weight).square().sum() / weight.square().sum())

    for name in ("gate_proj", "up_proj"):
        old, new = (getattr(m.model.layers[1].mlp, name).weight for m in (before, after))
        assert error(new) < error(old) / 2
        assert new.abs().max() / new.square().mean().sqrt() < 0.5 * old.abs().max() / old.square().mean().sqrt()


# ---- looking at the model


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 8), (4, 16), (8, -1)])
def test_rounded_is_the_grid(bits, group_size, symmetric):
    weight = torch.randn(12, 48, generator=torch.Generator().manual_seed(bits))
    weight[3] = 0
    weight[4] = weight[4].abs()
    grid = fit_grid(weight, group_size, GridRule(bits, symmetric))
    torch.testing.assert_close(rounded(weight, bits, group_size, symmetric), grid.decode(grid.encode(weight)))


def test_gradient_of_rounding():
    """Where the largest entry of a group grows, so does its step; else each entry passes its own gradient."""
    weight = torch.randn(1, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    up = torch.randn(1, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out = rounded(weight, 3, 8, True)
    (gradient,) = torch.autograd.grad((out * up).sum(), weight)
    with torch.no_grad():
        top = int(weight.abs().argmax())
        scale = 2 * float(weight.abs().max()) / 7
        slope = float((((out - weight) / scale) * up).sum()) * 2 / 7 * float(weight[0, top].sign())
        expected = up.clone()
        expected[0, top] += slope
    torch.testing.assert_close(gradient, expected)


def loss_of(model: Any, folder: Path, recipe: Any) -> float:
    tokens = load_tokens(recipe.calibration, load_tokenizer(folder), vocab_size=288)
    total, count = 0.0, 0
    for row in tokens.rows:
        found = logits(model, row[None])[0, :-1]
        total += float(cross_entropy(found, row[1:], reduction="sum"))
        count += len(row) - 1
    return total / count


def test_a_loss_that_is_no_number_chooses_nothing(tiny, text, tmp_path, monkeypatch):
    monkeypatch.setattr(rotate_learning, "next_token_loss", lambda *_: torch.tensor(math.nan))
    recipe = recipe_for(tiny("llama"), [{"rotate": {"candidates": 2, "group_size": 16}}], text, evaluation=False)
    with pytest.raises(NumericsError, match="loss of the calibration rows is not a number"):
        run(recipe, tmp_path / "out")


@pytest.mark.parametrize("family", ["llama_gqa_tied", "gemma", "gpt2", "gpt_neox", "phi3", "mixtral"])
def test_the_loss_is_that_of_the_rounded_result(family, tiny, ran, text):
    """What is compared while looking, in the original basis, is what `rotate` and then `rtn` give."""
    online = [] if family == "mixtral" else ["mlp"]
    looking = {
        "bits": 3,
        "group_size": 16,
        "symmetric": False,
    }  # symmetric: the least weight lies half way between two steps
    settings = {"candidates": 2, "online": online, **looking}
    result = ran(family, settings, {"rtn": looking})
    figures = result.report["rewrites"][0]["figures"]
    assert figures["candidate"] == min((0, 1), key=figures["losses"].__getitem__) and not figures["learned"]
    found = loss_of(compress.load(result.folder), tiny(family), result.plan.recipe)
    assert found == pytest.approx(min(figures["losses"]), rel=2e-4)
    assert abs(figures["losses"][0] - figures["losses"][1]) > 1e-3


@pytest.mark.parametrize("family", ["llama_gqa_tied", "gpt2", "qwen3_moe"])
def test_learned_rotations_are_exact_and_never_worse(family, tiny, ran):
    result = ran(family, LEARN)
    figures = result.report["rewrites"][0]["figures"]
    assert len(figures["losses"]) == 3
    used = figures["loss_learned"] if figures["learned"] else min(figures["losses"])
    assert used <= min(figures["losses"])
    assert figures["learned"] == (figures["loss_learned"] < min(figures["losses"]))
    assert relative(logits(stock(result.folder)), logits(stock(tiny(family)))) < 1e-5


def test_learning_lowers_the_loss(tiny, text, tmp_path):
    """More steps on the rows that are scored: the loss falls, by more than candidates differ."""
    settings = {"learn": 40, "bits": 2, "group_size": 16, "r2": "hadamard"}
    result = run(recipe_for(tiny("llama"), [{"rotate": settings}], text, evaluation=False), tmp_path / "out")
    figures = result.report["rewrites"][0]["figures"]
    assert figures["learned"]
    assert figures["loss_learned"] < figures["losses"][0] - 0.02


def test_the_same_again(tiny, ran, text, tmp_path):
    recipe = recipe_for(tiny("llama_gqa_tied"), [{"rotate": LEARN}], text, evaluation=False)
    again = run(recipe, tmp_path / "again")
    assert fingerprints(again.folder) == fingerprints(ran("llama_gqa_tied", LEARN).folder)


def test_an_interrupted_run_does_not_look_again(tiny, ran, text, tmp_path, monkeypatch):
    class Stopped(Silent):
        def begin(self, phase: str, total: int, unit: str) -> None:
            if phase == "learn rotations":
                raise KeyboardInterrupt

    recipe = recipe_for(tiny("llama_gqa_tied"), [{"rotate": LEARN}], text, evaluation=False)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "out", progress=Stopped())
    assert plan(recipe).bytes_kept == 8 * (64**2 + 3 * 16**2)
    looked = []
    loss = RoundedModel.loss
    monkeypatch.setattr(RoundedModel, "loss", lambda *arguments: looked.append(1) or loss(*arguments))
    resumed = run(recipe, tmp_path / "out")
    assert len(looked) == 1  # the learned rotations; candidates are remembered
    assert fingerprints(resumed.folder) == fingerprints(ran("llama_gqa_tied", LEARN).folder)


def test_candidates_differ_and_keep_the_mean_where_they_must(tiny):
    for family in ("llama", "opt"):
        step = planned(tiny(family))
        from compress.checkpoint.foreign import translated
        from compress.models.families import architecture_of
        from compress.pipeline.rewriting import model_shape

        infos = translated(step.before.config, step.before.infos)
        shape = model_shape(architecture_of(step.before.config, infos.keys()), infos, "F32")
        stream = shape.stream()
        drawn = [Rotations.drawn(shape, stream, RotateConfig(), lambda p: seeded(0, p), i) for i in (0, 1)]
        eye = torch.eye(64, dtype=torch.float64)
        first, second = (d.r1.times(eye) for d in drawn)
        assert float((first - second).abs().max()) > 0.1
        assert isinstance(drawn[0].r1, MeanKeeping) == (family == "opt")
        assert torch.allclose(first.sum(0), torch.ones(64, dtype=torch.float64)) == (family == "opt")
        assert not torch.equal(drawn[0].r2[0].times(torch.eye(16)), drawn[0].r2[1].times(torch.eye(16)))
        if family == "llama":
            torch.testing.assert_close(first.abs(), torch.full_like(first, 1 / math.sqrt(64)))
    found = Found({}, {"r1": 2 * eye, "r2": torch.stack([torch.eye(16)] * 3)}.__getitem__, lambda p: seeded(0, p))
    replaced = drawn[0].replaced(found)
    torch.testing.assert_close(replaced.r1.times(eye), 2 * eye)
    assert isinstance(replaced.r2[2].made, DenseRotation)
