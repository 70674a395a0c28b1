"""drop_blocks: the model that is left is the original with its blocks stepped over, and scores are what they say they are."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional

from compress.checkpoint.load import load
from compress.checkpoint.stream import StreamedModel
from compress.errors import CheckpointError, RecipeError
from compress.methods.base import Extent
from compress.methods.drop_blocks import DropBlocks, DropBlocksConfig
from compress.methods.rewrite import Found, ModelShape
from compress.models.families import architecture_of, changed_config
from compress.pipeline.model_view import StreamedView
from compress.pipeline.plan import plan
from compress.pipeline.progress import Silent
from compress.pipeline.run import Machine, run
from tests.runs import fingerprints, recipe_for
from tests.tiny_models import TINY, save_tiny

IDS = torch.arange(7, 31)[None]


def drop(source: Path, out: Path, text: Path, **settings: Any) -> Any:
    return run(recipe_for(source, [{"drop_blocks": settings}], text, evaluation=False), out)


def blocks_of(model: Any) -> list[torch.nn.Module]:
    return list(next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList)))


@contextmanager
def without(model: Any, *blocks: int):
    """`model` with some blocks stepped over."""
    chosen = [blocks_of(model)[block] for block in blocks]
    for block in chosen:
        block.forward = lambda hidden_states, *args, **kwargs: hidden_states
    try:
        yield model
    finally:
        for block in chosen:
            del block.forward


def stock(folder: Path) -> Any:
    """What transformers loads, to which nothing of ours has been done."""
    from transformers import AutoModelForCausalLM

    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config and "transformers_weights" not in config
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


@torch.no_grad()
def check_equal(source: Path, out: Path, dropped: tuple[int, ...]) -> None:
    original, shorter = stock(source), stock(out)
    with without(original, *dropped):
        expected = original(IDS, use_cache=False).logits
        assert torch.equal(shorter(IDS, use_cache=False).logits, expected)
    cache = None
    for at in range(IDS.shape[1]):  # token by token; beyond the window of those that slide
        step = shorter(IDS[:, at : at + 1], past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        torch.testing.assert_close(step.logits[:, 0], expected[:, at], rtol=1e-4, atol=1e-4)
    assert shorter.generate(IDS, max_new_tokens=3, do_sample=False, eos_token_id=-1).shape == (1, 27)


@pytest.mark.parametrize("family", TINY)
def test_the_rest_computes_what_the_original_does_without_them(family: str, tmp_path: Path, text: Path):
    source = save_tiny(family, tmp_path / "source", num_hidden_layers=4, **_kinds(family))
    result = drop(source, tmp_path / "out", text, blocks=[0, 2])
    assert result.plan.format == "plain" and result.plan.architecture.n_blocks == 2
    check_equal(source, tmp_path / "out", (0, 2))


def _kinds(family: str, n_blocks: int = 4) -> dict[str, Any]:
    if "layer_types" not in TINY[family][1]:
        return {}
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    return {"layer_types": kinds[:n_blocks]}


IMPLICIT = {
    "gemma2": {"layer_types": None, "sliding_window": 8},
    "gemma3_text": {"layer_types": None, "sliding_window": 8, "sliding_window_pattern": 3},
    "qwen2": {"layer_types": None, "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2},
    "qwen3": {"layer_types": None, "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2},
    "qwen3_moe": {"mlp_only_layers": [1], "decoder_sparse_step": 2, "num_hidden_layers": 5},
    "llama": {"eos_token_id": [256, 257, 258, 259, 260]},
}


@pytest.mark.parametrize("family", IMPLICIT)
@pytest.mark.parametrize("dropped", [(0,), (1, 3), (4,)], ids=str)
def test_what_config_leaves_to_be_understood_of_blocks_follows_them(
    family: str, dropped: tuple[int, ...], tmp_path: Path, text: Path
):
    settings = {"num_hidden_layers": 5, **IMPLICIT[family]}
    source = save_tiny(family, tmp_path / "source", **settings)
    config = json.loads((source / "config.json").read_text())
    if settings.get("layer_types", ()) is None:
        del config["layer_types"]  # as older releases wrote it
    said = {key: value for key, value in settings.items() if key != "layer_types"}
    (source / "config.json").write_text(json.dumps(config | said))
    drop(source, tmp_path / "out", text, blocks=list(dropped))
    check_equal(source, tmp_path / "out", dropped)
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert after["eos_token_id"] == config.get("eos_token_id") or family != "llama"


def test_a_block_that_would_change_by_moving_is_not_moved(tmp_path: Path, text: Path):
    source = save_tiny("gpt2", tmp_path / "source", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(RecipeError, match="scale_attn_by_inverse_layer_idx.*only the last blocks"):
        drop(source, tmp_path / "out", text, blocks=[0])
    with pytest.raises(RecipeError, match="scale_attn_by_inverse_layer_idx"):  # before anything is looked at
        plan(recipe_for(source, [{"drop_blocks": {"n_drop": 1}}], text))
    drop(source, tmp_path / "out", text, blocks=[2])
    check_equal(source, tmp_path / "out", (2,))


@pytest.mark.parametrize(
    ("key", "value"), [("layer_types", 5), ("layer_types", ["full_attention"]), ("max_window_layers", "x")]
)
def test_settings_by_block_that_do_not_fit_are_named(key: str, value: Any):
    config = {"model_type": "qwen2", "num_hidden_layers": 4, key: value}
    with pytest.raises(CheckpointError, match=rf"config.json: {key}="):
        changed_config(config, architecture_of(config), blocks=[0, 1], untied=False)


def test_both_names_of_the_number_of_blocks_change():
    config = {"model_type": "gpt2", "n_layer": 4, "num_hidden_layers": 4}
    changed = changed_config(config, architecture_of(config), blocks=[0, 3], untied=False)
    assert changed["n_layer"] == changed["num_hidden_layers"] == 2
    assert config["n_layer"] == 4


def test_the_result_needs_nothing_of_ours(tmp_path: Path, text: Path):
    drop(save_tiny("llama", tmp_path / "source"), tmp_path / "out", text, blocks=[1])
    code = (
        "import sys; from transformers import AutoModelForCausalLM as A; import torch; "
        f"m = A.from_pretrained({str(tmp_path / 'out')!r}); assert len(m.model.layers) == 2; "
        "m.generate(torch.arange(5)[None], max_new_tokens=2, do_sample=False); "
        "assert not any(n.split('.')[0] == 'compress' for n in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


# ---- scores, each against the few lines that it is the fast form of


@pytest.fixture
def looked(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch):
    """`looked(family, ...)`: figures of a run on a model of five blocks, its tokens and the whole model."""
    seen: list[Any] = []
    original = StreamedView.__init__

    def spy(view: Any, *args: Any) -> None:
        original(view, *args)
        seen.append(view.batches)

    monkeypatch.setattr(StreamedView, "__init__", spy)

    def look(family: str = "llama_gqa_tied", machine: Machine | None = None, **settings: Any) -> Any:
        source = tmp_path / f"source-{family}"
        if not source.exists():
            save_tiny(family, source, num_hidden_layers=5, **_kinds(family, 5))
        recipe = recipe_for(source, [{"drop_blocks": {"rows": 5, **settings}}], text, evaluation=False)
        result = run(recipe, tmp_path / f"out-{len(seen)}", machine=machine)
        rows = torch.cat(list(seen[-1]))[:5]
        return result.report["rewrites"][0]["figures"], rows, load(source, dtype=torch.float32)

    return look


def loss_of(model: Any, rows: torch.Tensor) -> torch.Tensor:
    logits = model(rows, use_cache=False).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


@pytest.mark.parametrize("family", ["llama_gqa_tied", "gpt2", "mixtral", "gemma2", "opt_post_norm", "gpt_neox"])
@torch.no_grad()
def test_perplexity_is_that_of_the_model_without_the_block(looked: Any, family: str):
    figures, rows, model = looked(family, n_drop=1)
    for block, score in enumerate(figures["rounds"][0]["scores"]):
        with without(model, block):
            assert score == pytest.approx(float(loss_of(model, rows)), rel=1e-4)
    assert figures["rounds"][0]["loss"] == pytest.approx(float(loss_of(model, rows)), rel=1e-4)
    scores = figures["rounds"][0]["scores"]
    assert figures["blocks"] == [scores.index(min(scores))]


def test_groups_of_variants_and_where_states_live_change_nothing(looked: Any, monkeypatch: pytest.MonkeyPatch):
    whole, _, _ = looked(n_drop=2)
    monkeypatch.setattr("compress.methods.drop_blocks_scores.AT_ONCE", 2)
    assert looked(n_drop=2, machine=Machine(activation_bytes=0))[0] == whole


@pytest.mark.parametrize("family", ["llama_gqa_tied", "gpt2", "mixtral", "gemma3_text"])
def test_taylor_is_weight_times_gradient(looked: Any, family: str):
    figures, rows, model = looked(family, n_drop=1, score="taylor", protect=[0, 0])
    model.requires_grad_(True)
    loss_of(model, rows).backward()
    for block, score in zip(blocks_of(model), figures["rounds"][0]["scores"], strict=True):
        # fused experts are 3-D here, linears there
        found = sum(
            float((p * p.grad).detach().abs().sum()) for p in block.parameters() if p.ndim > 1 and p.grad is not None
        )
        assert score == pytest.approx(found, rel=2e-3)


@pytest.mark.parametrize("score", ["perplexity", "taylor"])
def test_pieces_of_logits_and_of_the_head_change_nothing(looked: Any, score: str, monkeypatch: pytest.MonkeyPatch):
    settings = {"n_drop": 1, "score": score, "protect": [0, 0], "family": "gpt_neox"}
    whole = looked(**settings)[0]
    monkeypatch.setattr("compress.pipeline.model_view.MIN_CHUNK_TOKENS", 7)
    monkeypatch.setattr("compress.pipeline.model_view.LOGIT_BYTES", 1)
    monkeypatch.setattr("compress.checkpoint.stream.HEAD_TILE", 50)
    pieces = looked(**settings)[0]
    assert pieces["rounds"][0]["scores"] == pytest.approx(whole["rounds"][0]["scores"], rel=1e-4)
    assert pieces["blocks"] == whole["blocks"]


def test_magnitude_needs_no_tokens_and_looks_at_matrices(tmp_path: Path):
    source = save_tiny("llama", tmp_path / "source", tokenizer=False)
    recipe = {"model": str(source), "steps": [{"drop_blocks": {"n_drop": 1, "score": "magnitude", "protect": [0, 0]}}]}
    from compress.recipe import Recipe

    result = run(Recipe.from_dict({**recipe, "evaluation": False}), tmp_path / "out")
    scores = result.report["rewrites"][0]["figures"]["rounds"][0]["scores"]
    assert result.report["calibration_tokens"] == 0
    for block, score in zip(blocks_of(load(source, dtype=torch.float32)), scores, strict=True):
        assert score == pytest.approx(
            sum(float(p.detach().abs().sum()) for p in block.parameters() if p.ndim > 1), rel=1e-5
        )


@torch.no_grad()
def test_angles_are_those_of_the_last_tokens(looked: Any):
    figures, rows, model = looked(n_drop=1, score="angular_distance")
    states = model.model(rows, use_cache=False, output_hidden_states=True).hidden_states  # the last one is normed
    for block in range(4):
        cosine = functional.cosine_similarity(states[block][:, -1], states[block + 1][:, -1], dim=-1)
        assert figures["rounds"][0]["scores"][block] == pytest.approx(float(cosine.acos().mean()) / math.pi, rel=1e-4)


@torch.no_grad()
def test_iterative_looks_again_at_what_is_left(looked: Any):
    figures, rows, model = looked(n_drop=3, selection="iterative")
    gone: list[int] = []
    for seen in figures["rounds"]:
        found = {}
        for block in set(range(5)) - set(gone):
            with without(model, *gone, block):
                found[block] = float(loss_of(model, rows))
        assert {block: s for block, s in enumerate(seen["scores"]) if s is not None} == pytest.approx(found, rel=1e-4)
        gone.append(min(found, key=lambda block: found[block]))
    assert figures["order"] == gone and figures["blocks"] == sorted(gone)
    with without(model, *gone[:2]):
        assert figures["rounds"][2]["loss"] == pytest.approx(float(loss_of(model, rows)), rel=1e-4)


@torch.no_grad()
def test_contiguous_is_the_run_with_the_smallest_angle_around_it(looked: Any):
    figures, rows, model = looked(n_drop=2, score="angular_distance", selection="contiguous", protect=[1, 1])
    states = model.model(rows, use_cache=False, output_hidden_states=True).hidden_states
    angles = {
        first: float(
            functional.cosine_similarity(states[first][:, -1], states[first + 2][:, -1], dim=-1).acos().mean() / math.pi
        )
        for first in (1, 2)
    }
    first = min(angles, key=lambda block: angles[block])
    assert figures["blocks"] == [first, first + 1]
    scores = figures["rounds"][0]["scores"]
    assert scores[1:3] == pytest.approx([angles[1], angles[2]], rel=1e-4)
    assert [scores[0], *scores[3:]] == [None, None, None]


@pytest.mark.parametrize("score", ["perplexity", "taylor", "angular_distance"])
def test_protected_blocks_stay(looked: Any, score: str):
    figures, _, _ = looked(n_drop=2, score=score, protect=[2, 1])
    assert figures["blocks"] == [2, 3]


@pytest.mark.parametrize("score", ["perplexity", "taylor", "magnitude"])
def test_an_interrupted_look_goes_on(score: str, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch):
    source = save_tiny("llama", tmp_path / "source", num_hidden_layers=5)
    monkeypatch.setattr("compress.methods.drop_blocks_scores.AT_ONCE", 2)
    settings = {"n_drop": 2, "score": score, "protect": [0, 0]}
    if score != "magnitude":
        settings["selection"] = "iterative"
    recipe = recipe_for(source, [{"drop_blocks": settings}], text, evaluation=False)
    loads: list[int] = []
    load_block = StreamedModel.load_block
    monkeypatch.setattr(
        StreamedModel, "load_block", lambda self, i, *rest: (loads.append(i), load_block(self, i, *rest))[1]
    )

    class Stop(Silent):
        left = {"perplexity": 12, "taylor": 14, "magnitude": 3}[score]  # 5 + 3 + 1 and 4 + 2; twice 5 and twice 4; 5
        phase = ""

        def begin(self, phase: str, total: int, unit: str) -> None:
            self.phase = phase

        def advance(self, steps: int = 1, detail: str = "") -> None:
            self.left -= self.phase == "observe"
            if self.left == 0:
                raise KeyboardInterrupt

    whole = run(recipe, tmp_path / "whole")
    n_whole = len(loads)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "cut", progress=Stop())
    loads.clear()
    resumed = run(recipe, tmp_path / "cut")
    assert n_whole - len(loads) == {"perplexity": 9, "taylor": 10, "magnitude": 3}[score]
    assert resumed.report["rewrites"] == whole.report["rewrites"]
    assert fingerprints(tmp_path / "cut") == fingerprints(tmp_path / "whole")


# ---- beside other rewrites


def test_a_shorter_model_can_be_sliced_and_a_sliced_one_not_be_shortened(tmp_path: Path, text: Path):
    source = save_tiny("llama", tmp_path / "source")
    slicing, dropping = {"slicegpt": {"sparsity": 0.0}}, {"drop_blocks": {"n_drop": 1}}
    result = run(recipe_for(source, [dropping, slicing], text, evaluation=False), tmp_path / "out")
    (gone,) = result.report["rewrites"][0]["figures"]["blocks"]
    original, shorter = load(source, dtype=torch.float32), load(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad(), without(original, gone):
        expected = original(IDS, use_cache=False).logits
        torch.testing.assert_close(shorter(IDS, use_cache=False).logits, expected, rtol=1e-3, atol=1e-3)
    cut = {"slicegpt": {"sparsity": 0.25}}
    with pytest.raises(
        RecipeError, match=r"^steps.1.drop_blocks: .*put drop_blocks before the step that makes the stream"
    ):
        run(recipe_for(source, [cut, dropping], text, evaluation=False), tmp_path / "refused")


# ---- a source that is compressed already


@pytest.mark.parametrize(
    "bits_and_format", [(4, "compressed-tensors"), (4, "compress"), (3, "compressed-tensors")], ids=str
)
@pytest.mark.parametrize("score", ["perplexity", "magnitude", "angular_distance"])
def test_blocks_of_a_compressed_model_go_too(bits_and_format: Any, score: str, tmp_path: Path, text: Path):
    bits, format_ = bits_and_format
    save_tiny("llama_gqa_tied", tmp_path / "source", num_hidden_layers=4)
    rounding = {"rtn": {"bits": bits, "group_size": 32}, "skip": "*.1.mlp.up_proj", "overrides": {"*.3.*": {"bits": 8}}}
    recipe = recipe_for(tmp_path / "source", [rounding], text, evaluation=False, output={"format": format_})
    run(recipe, tmp_path / "packed")
    settings = {"n_drop": 1, "score": score, "protect": [1, 1]}
    result = drop(tmp_path / "packed", tmp_path / "out", text, **settings)
    (gone,) = result.report["rewrites"][0]["figures"]["blocks"]
    specs = result.plan.specs
    assert len(specs) == (21 if gone == 1 else 20) and specs["model.layers.2.mlp.down_proj"].bits == 8
    original, shorter = load(tmp_path / "packed"), load(tmp_path / "out")
    with torch.no_grad(), without(original, gone):
        assert torch.equal(shorter(IDS, use_cache=False).logits, original(IDS, use_cache=False).logits)


def test_gradients_of_a_compressed_model_are_refused(tmp_path: Path, text: Path):
    save_tiny("llama", tmp_path / "source")
    run(
        recipe_for(tmp_path / "source", [{"rtn": {"bits": 4, "group_size": 32}}], text, evaluation=False),
        tmp_path / "p",
    )
    with pytest.raises(RecipeError, match=r"^steps.0.drop_blocks: score=taylor needs gradients.*use score=perplexity"):
        drop(tmp_path / "p", tmp_path / "out", text, n_drop=1, score="taylor")


# ---- how many


def shape(n_blocks: int = 8, first: int = 1) -> ModelShape:
    """Blocks of 100 numbers, the first one of `first` times that."""
    prefixes = tuple(f"model.layers.{i}" for i in range(n_blocks))
    shapes = {f"{prefix}.w": (10, 10 * (first if i == 0 else 1)) for i, prefix in enumerate(prefixes)}
    shapes["lm_head.weight"] = (999, 10)
    nbytes = {name: 4 * math.prod(sizes) for name, sizes in shapes.items()}
    return ModelShape("Llama", shapes, prefixes, (), 10, lambda: pytest.fail("not needed"), nbytes)


def kept(config: DropBlocksConfig, model: ModelShape) -> int:
    found = Found(None, lambda name: pytest.fail(name), lambda purpose: torch.Generator())
    blocks = DropBlocks.rewrite(model, config, found).blocks
    assert blocks is not None
    return len(blocks)


@pytest.mark.parametrize(
    ("settings", "n_kept"),
    [
        ({"n_drop": 1}, 7),
        ({"n_drop": 7}, 1),
        ({"keep_ratio": 0.75}, 6),
        ({"keep_ratio": 0.76}, 6),
        ({"keep_ratio": 0.74}, 5),
        ({"keep_ratio": 0.125}, 1),
        ({"n_drop": 2, "score": "taylor"}, 6),
    ],
)
def test_before_it_has_looked_the_plan_knows_how_many(settings: dict[str, Any], n_kept: int):
    assert kept(DropBlocksConfig(**settings), shape()) == n_kept


def test_blocks_of_unequal_size_are_counted_by_size():
    assert kept(DropBlocksConfig(keep_ratio=0.5), shape(first=3)) == 3  # 5 of 10 hundreds: the first and two more


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"n_drop": 8}, "n_drop=8, but 7 of 8 blocks can go; use n_drop=7"),
        ({"n_drop": 3, "score": "taylor"}, "n_drop=3, but 2 of 8 blocks can go; use n_drop=2"),
        ({"n_drop": 1, "score": "taylor", "protect": (5, 3)}, r"protect=\[5, 3\] keeps all 8 blocks.*protect=\[1, 1\]"),
        ({"keep_ratio": 0.1}, "keep_ratio=0.1 leaves none of 8 blocks; use keep_ratio=0.125 or more"),
        ({"keep_ratio": 0.5, "score": "magnitude"}, "without all 2 blocks that may go, 0.75 of the bytes are left"),
        ({"blocks": (8,)}, "8 is no block of this model; they are 0 to 7"),
        ({"blocks": tuple(range(8))}, "leaves none"),
    ],
)
def test_too_many_are_refused_with_a_number_that_works(settings: dict[str, Any], said: str):
    with pytest.raises(RecipeError, match=said):
        kept(DropBlocksConfig(**settings), shape())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "nothing says what goes"),
        ({"n_drop": 1, "blocks": [1]}, "n_drop and blocks are two ways"),
        ({"blocks": [1, 1]}, "names a block twice"),
        ({"blocks": [1], "score": "taylor"}, "leaves no choice"),
        ({"n_drop": 1, "selection": "contiguous"}, "needs score=angular_distance"),
        ({"n_drop": 1, "selection": "iterative", "score": "magnitude"}, "stay the same when blocks go"),
        ({"n_drop": 1, "score": "magnitude", "rows": 3}, "rows=3: score=magnitude looks at weights only"),
        ({"n_drop": 1, "protect": [-1, 0]}, r"protect=\[-1, 0\]"),
    ],
)
def test_settings_that_contradict_are_refused(settings: dict[str, Any], said: str):
    with pytest.raises(ValidationError, match=said):
        DropBlocksConfig(**settings)


@pytest.mark.parametrize("settings", [{"blocks": [1]}, {"n_drop": 1}, {"keep_ratio": 0.5, "score": "taylor"}])
def test_what_is_written_out_with_every_default_is_the_same(settings: dict[str, Any]):
    config = DropBlocksConfig(**settings)
    assert DropBlocksConfig(**config.model_dump(mode="json")) == config


def test_what_looking_costs_grows_with_depth_in_time_and_not_in_memory():
    def extent(n_blocks: int) -> Extent:
        return Extent(n_blocks * 10**6, n_blocks, 512, 1000, 128 * 256, 2048, (), 128)

    for score in ("perplexity", "taylor", "angular_distance"):
        config = DropBlocksConfig(n_drop=1, score=score)
        assert DropBlocks.observation_bytes(extent(80), config) == DropBlocks.observation_bytes(extent(8), config)
    one, two = (DropBlocks.observation_flops(extent(n), DropBlocksConfig(n_drop=1)) for n in (20, 40))
    assert 3 < two / one < 4.1
    twice = DropBlocksConfig(n_drop=2, selection="iterative")
    assert DropBlocks.observation_flops(extent(20), twice) == 2 * one
