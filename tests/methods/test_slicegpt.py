"""SliceGPT: exact where nothing is cut, and what is cut is what the principal directions leave."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import compress
from compress.calibration.data import load_tokenizer, load_tokens
from compress.checkpoint.headers import read_header, read_headers
from compress.checkpoint.source import find_source
from compress.checkpoint.stream import StreamedModel
from compress.errors import CheckpointError, RecipeError
from compress.linalg.hadamard import random_orthogonal
from compress.methods.rewrite import Found
from compress.methods.slicegpt import SliceGPT, SliceGPTConfig, basis_name
from compress.models.families import architecture_of
from compress.pipeline.output import OBSERVED
from compress.pipeline.plan import plan
from compress.pipeline.progress import Silent
from compress.pipeline.rewriting import _planned, open_rewritten
from compress.pipeline.run import Machine, run
from tests.checkpoint.conftest import stock as stock
from tests.reference.slicegpt import sliced_logits
from tests.runs import fingerprints, recipe_for
from tests.tiny_models import TINY, save_tiny

REFUSED = {
    "gemma2": "Gemma 2 .* norms behind attention and MLP",
    "gemma3_text": "Gemma 3 .* norms behind attention and MLP",
    "opt_post_norm": "OPT .* token table has 32 columns",
    "gpt_neox": "GPT-NeoX, Pythia .* side by side",
}
SLICEABLE = sorted(TINY.keys() - REFUSED)
IDS = torch.arange(2 * 24).view(2, 24)
D, BLOCKS = 64, 3


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def relative(found: Tensor, true: Tensor) -> float:
    return float((found - true).norm() / true.norm())


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = save_tiny(family, tmp_path_factory.mktemp("tiny") / family)
        return made[family]

    return get


@pytest.fixture(scope="session")
def sliced(tiny: Any, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`sliced(family, **settings)`: the source and the result of a run, made once."""
    made: dict[str, Any] = {}

    def get(family: str, *then: dict[str, Any], **settings: Any) -> Any:
        key = json.dumps([family, then, settings])
        if key not in made:
            recipe = recipe_for(tiny(family), [{"slicegpt": settings}, *then], text, evaluation=False)
            made[key] = run(recipe, tmp_path_factory.mktemp("sliced") / "out")
        return made[key]

    return get


def rewritten(folder: Path, work: Path, bases: list[Tensor], **settings: Any) -> StreamedModel:
    """The model in given bases, without looking at it."""
    kept = {basis_name(number): basis for number, basis in enumerate(bases)}
    found = Found({}, kept.__getitem__, lambda purpose: torch.Generator())
    step = _planned(0, SliceGPT, SliceGPTConfig(**settings), find_source(str(folder)), "F32", found)
    work.mkdir()
    (work / "config.json").write_text(json.dumps(step.after.config))
    return StreamedModel(work, reader=open_rewritten(folder, (step,)), specs={})


# ---- nothing is cut: the same function


@pytest.mark.parametrize("family", SLICEABLE)
def test_untied_folded_and_without_weights_in_norms_it_is_the_same(family, tiny, tmp_path):
    """Q = I everywhere: heads untied, norms folded, LayerNorm centred and made rms; nothing is rotated."""
    model = rewritten(tiny(family), tmp_path / "w", [torch.eye(D)] * (2 * BLOCKS + 1), sparsity=0).whole()
    expected = logits(AutoModelForCausalLM.from_pretrained(tiny(family)))
    assert relative(logits(model), expected) < 1e-5
    assert not model.config.tie_word_embeddings


@pytest.mark.parametrize("family", SLICEABLE)
def test_a_basis_of_its_own_for_every_norm_is_the_same(family, tiny, tmp_path):
    generator = torch.Generator().manual_seed(1)
    bases = [random_orthogonal(D, generator) for _ in range(2 * BLOCKS + 1)]
    model = rewritten(tiny(family), tmp_path / "w", bases, sparsity=0).whole()
    expected = logits(AutoModelForCausalLM.from_pretrained(tiny(family)))
    assert relative(logits(model), expected) < 1e-5
    shortcut = model.get_submodule(model.base_model_prefix)
    matrix = next(m for name, m in shortcut.named_modules() if name.endswith("attn_shortcut")).weight.double()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(D, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["llama_gqa_tied", "gemma", "gpt2", "opt", "gpt_neox_serial", "qwen3_moe"])
def test_at_no_sparsity_a_run_gives_the_same_model(family, tiny, sliced):
    result = sliced(family, sparsity=0)
    loaded = compress.load(result.folder)
    expected = logits(AutoModelForCausalLM.from_pretrained(tiny(family)))
    assert relative(logits(loaded), expected) < 1e-5
    assert result.report["rewrites"][0]["figures"]["energy_lost"] == [0.0] * (2 * BLOCKS + 1)


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_what_cannot_be_sliced_is_refused_by_name(family, tiny, text):
    with pytest.raises(RecipeError, match=REFUSED[family]):
        plan(recipe_for(tiny(family), [{"slicegpt": {}}], text))


# ---- something is cut


@pytest.mark.parametrize("family", SLICEABLE)
def test_the_sliced_model_is_the_original_with_its_stream_projected_at_every_norm(family, tiny, sliced, text):
    """Found by the recursion of the paper on a whole model, with hooks; the same function up to rounding."""
    result = sliced(family, sparsity=0.25)
    recipe = recipe_for(tiny(family), [{"slicegpt": {"sparsity": 0.25}}], text)
    rows, expected, lost = sliced_logits(tiny(family), recipe, 48)
    assert relative(logits(compress.load(result.folder), rows), expected) < 1e-3
    assert result.report["rewrites"][0]["figures"]["energy_lost"] == pytest.approx(lost, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_orientation_changes_numbers_and_not_the_function(family, sliced):
    found = [sliced(family, sparsity=0.25, orientation=o) for o in ("random", "pca")]
    assert relative(*(logits(compress.load(result.folder)) for result in found)) < 1e-3
    first, second = (StreamedModel(r.folder).reader.read(next(iter(read_headers(r.folder)))) for r in found)
    assert not torch.equal(first, second)


def test_a_stream_that_lies_in_few_dimensions_is_sliced_to_them_exactly(tiny, tmp_path, text):
    """Every table and writer is projected on 32 directions: 32 are enough."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "flat"
    save_tiny("llama", folder)
    tensors = load_file(folder / "model.safetensors")
    basis = random_orthogonal(D, torch.Generator().manual_seed(2))[:, :32].float()
    for name, tensor in tensors.items():
        if "embed_tokens" in name:
            tensors[name] = (tensor @ basis @ basis.T).contiguous()
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name] = (basis @ basis.T @ tensor).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    recipe = recipe_for(folder, [{"slicegpt": {"sparsity": 0.5}}], text, evaluation=False)
    result = run(recipe, tmp_path / "out")
    rows = torch.stack(load_tokens(recipe.calibration, load_tokenizer(folder), vocab_size=288).rows)
    expected = logits(AutoModelForCausalLM.from_pretrained(folder), rows)
    assert relative(logits(compress.load(result.folder), rows), expected) < 1e-5
    assert max(result.report["rewrites"][0]["figures"]["energy_lost"]) < 1e-9


def test_the_norm_divides_by_the_size_that_the_stream_had(sliced):
    norm = compress.load(sliced("llama", sparsity=0.25).folder).model.norm
    x = torch.randn(3, 48)
    torch.testing.assert_close(norm(x), x / (x.square().sum(-1, keepdim=True) / 64 + 1e-6).sqrt())


def test_wider_loses_less(tiny, text, tmp_path):
    found = []
    for sparsity in (0.5, 0.25, 0.125):
        result = run(recipe_for(tiny("opt"), [{"slicegpt": {"sparsity": sparsity}}], text), tmp_path / str(sparsity))
        found.append(result.report["evaluation"]["fidelity"]["kl_mean"])
        assert result.report["evaluation"]["hidden_states"]["reason"] == (
            f"every block of a sliced model has a basis of its own, of {int(64 * (1 - sparsity))} entries here and 64 there"
        )
    assert found == sorted(found, reverse=True)


# ---- sizes


def llama_numbers(width: int, last: int, vocabulary: int = 288, mlp: int = 128, kv: int = 64) -> int:
    """Section 6 of the specification: tables, attention, MLP and two shortcuts a block, head."""
    block = width * (2 * D + 2 * kv) + 3 * width * mlp + 2 * width**2
    return vocabulary * width + BLOCKS * block + (last - width) * (mlp + width) + vocabulary * last


@pytest.mark.parametrize(("settings", "width", "last"), [
    ({"sparsity": 0}, 64, 64),
    ({"sparsity": 0.25}, 48, 64),
    ({"sparsity": 0.3}, 40, 64),
    ({"sparsity": 0.3, "round_to": 1}, 44, 64),
    ({"sparsity": 0.3, "slice_head": True}, 40, 40),
])  # fmt: skip
def test_numbers_are_those_of_the_formula(settings, width, last, tiny, text):
    planned = plan(recipe_for(tiny("llama"), [{"slicegpt": settings}], text))
    assert planned.bytes_total_after == 4 * llama_numbers(width, last)
    assert planned.architecture.structure.width == width
    assert planned.architecture.structure.last_width == last


@pytest.mark.parametrize("slice_head", [False, True])
def test_files_hold_what_was_planned(slice_head, sliced):
    result = sliced("llama", sparsity=0.25, slice_head=slice_head)
    stored = read_headers(result.folder)
    n_stored = sum(torch.Size(info.shape).numel() for info in stored.values())
    assert n_stored == llama_numbers(48, 48 if slice_head else 64)
    assert result.plan.bytes_total_after == 4 * n_stored
    assert compress.load(result.folder).lm_head.in_features == (48 if slice_head else 64)


def test_opt_125m_has_the_numbers_of_the_reference():
    """147,250,880 at 20 %, with 50,272 for the bias that the head gets: a regression test of the public code."""
    from transformers import OPTConfig

    config = OPTConfig().to_dict()
    architecture = architecture_of(config)
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    from compress.checkpoint.headers import TensorInfo
    from compress.methods.slicegpt import _numbers, sliceable, width_of
    from compress.methods.slicegpt_tensors import sliced_tensors
    from compress.pipeline.rewriting import model_shape

    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("opt"))
    infos = {
        name: TensorInfo(name, "F16", tuple(p.shape), Path("x"), 0, 2 * p.numel())
        for name, p in model.named_parameters()
    }
    shape = model_shape(architecture, infos, "F32")
    stream = sliceable(shape)
    width = width_of(shape, stream, SliceGPTConfig(sparsity=0.2))
    assert width == 608
    assert _numbers(shape, *sliced_tensors(shape, stream, width, 768, None)) == 147_250_880


@pytest.mark.parametrize("slice_head", [False, True])
def test_a_budget_gives_the_widest_stream_that_fits(slice_head, tiny, text):
    before = llama_numbers(64, 64) - BLOCKS * 2 * 64**2 + 7 * 64
    for ratio in (0.5, 0.75, 0.9, 1.0):
        settings = {"keep_ratio": ratio, "slice_head": slice_head}
        planned = plan(recipe_for(tiny("llama"), [{"slicegpt": settings}], text))
        width = planned.architecture.structure.width
        assert planned.bytes_total_after <= ratio * planned.bytes_total_before == ratio * 4 * before
        wider = width + 8
        assert llama_numbers(wider, wider if slice_head else 64) > ratio * before
        assert not any("outweigh" in warning for warning in planned.warnings)


def test_a_model_that_gets_larger_is_warned_of(tiny, text):
    planned = plan(recipe_for(tiny("llama_gqa_tied"), [{"slicegpt": {"sparsity": 0.1}}], text))
    assert any("outweigh what is cut; slice more, or use keep_ratio" in warning for warning in planned.warnings)
    assert any("share one matrix in the source; they are stored apart" in warning for warning in planned.warnings)
    assert planned.bytes_total_after > planned.bytes_total_before


# ---- loading, running, saving


@pytest.mark.parametrize("family", SLICEABLE)
def test_loads_generates_and_survives_saving(family, sliced, tmp_path):
    folder = sliced(family, sparsity=0.25).folder
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = logits(model)
    cached = model.generate(IDS, max_new_tokens=6, do_sample=False)
    assert torch.equal(cached, model.generate(IDS, max_new_tokens=6, do_sample=False, use_cache=False))
    step = model(IDS[:, -1:], past_key_values=model(IDS[:, :-1], use_cache=True).past_key_values).logits
    torch.testing.assert_close(step[:, 0], expected[:, -1], rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "again", max_shard_size="40KB")
    assert not list((tmp_path / "again").glob("model*"))
    assert torch.equal(logits(compress.load(tmp_path / "again")), expected)


def test_copies_pickles_outputs_and_placements(sliced, tmp_path):
    folder = sliced("llama", sparsity=0.25).folder
    model = compress.load(folder)
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(copy.deepcopy(model)))), expected)
    with torch.no_grad():
        out = model(IDS, output_hidden_states=True)
    assert [h.shape[-1] for h in out.hidden_states] == [48, 48, 48, 64]
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu",
              "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}  # fmt: skip
    offloaded = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "offload")
    assert torch.equal(logits(offloaded), expected)
    eager = compress.load(folder, attn_implementation="eager")
    torch.testing.assert_close(logits(eager), expected, rtol=1e-4, atol=1e-4)
    half = compress.load(folder, dtype=torch.bfloat16)
    assert half.model.layers[0].attn_shortcut.weight.dtype == torch.bfloat16
    assert relative(logits(half).float(), expected) < 0.1


def test_a_structure_that_leaves_tensors_aside(sliced, tmp_path):
    folder = shutil.copytree(sliced("gpt2", sparsity=0.25).folder, tmp_path / "altered")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["structure"]["biases"]
    (folder / "config.json").write_text(json.dumps(config))
    for opened in (compress.load, StreamedModel):
        with pytest.raises(CheckpointError, match=r"lm_head\.bias"):
            opened(folder)


def test_stock_transformers_stops(sliced, tmp_path, stock):
    """Without this package: the sentence, and in an unguarded copy a tensor of a shape that cannot be."""
    for family, name in (("llama", "LlamaForCausalLM"), ("gpt2", "GPT2LMHeadModel")):
        folder = sliced(family, sparsity=0.25).folder
        answers = stock(*({"do": "load", "folder": folder, "class": c} for c in ("AutoModelForCausalLM", name)))
        assert all("compress-llm" in answer["error"] for answer in answers)
        PreTrainedModel.save_pretrained(compress.load(folder), tmp_path / family)
        (answer,) = stock({"do": "load", "folder": tmp_path / family, "class": "AutoModelForCausalLM"})
        assert "mismatch" in answer["error"]
        assert torch.equal(logits(compress.load(tmp_path / family)), logits(compress.load(folder)))


@pytest.mark.parametrize(("family", "then"), [
    ("llama_gqa_tied", {"gptq": {"bits": 4, "group_size": 16}}),
    ("llama_gqa_tied", {"rtn": {"bits": 8, "group_size": 16}}),
    ("llama_gqa_tied", {"svd": {"keep_ratio": 0.8}}),
    ("gpt2", {"gptq": {"bits": 4, "group_size": 16}}),
    ("opt", {"svd": {"keep_ratio": 0.8}}),
    ("mixtral", {"gptq": {"bits": 4, "group_size": 16}}),
])  # fmt: skip
def test_what_is_sliced_can_be_compressed_further(family, then, sliced, tmp_path):
    alone, result = sliced(family, sparsity=0.25), sliced(family, then, sparsity=0.25)
    model = compress.load(result.folder)
    assert relative(logits(model), logits(compress.load(alone.folder))) < (0.1 if "rtn" in then else 1)
    assert result.plan.bytes_total_after < alone.plan.bytes_total_after
    assert model.generate(IDS, max_new_tokens=3, do_sample=False).shape == (2, 27)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(compress.load(tmp_path / "again")), logits(model))


def test_a_sliced_model_can_be_a_source_but_is_not_rewritten_again(sliced, text, tmp_path):
    folder = sliced("llama", sparsity=0.25).folder
    again = run(recipe_for(folder, [{"rtn": {"bits": 8, "group_size": 16}}], text), tmp_path / "again")
    assert again.report["evaluation"]["fidelity"]["kl_mean"] < 0.01
    assert again.report["evaluation"]["hidden_states"]["reason"] is None
    assert relative(logits(compress.load(again.folder)), logits(compress.load(folder))) < 0.1
    with pytest.raises(RecipeError, match="it was rewritten before; begin with the original"):
        plan(recipe_for(folder, [{"slicegpt": {}}], text))


def test_a_model_of_fewer_blocks_can_be_sliced(tiny, text, tmp_path):
    steps = [{"drop_blocks": {"blocks": [1]}}, {"slicegpt": {"sparsity": 0}}]
    pruned = run(recipe_for(tiny("qwen2"), steps[:1], text, evaluation=False), tmp_path / "pruned")
    sliced = run(recipe_for(tiny("qwen2"), steps, text, evaluation=False), tmp_path / "sliced")
    assert relative(logits(compress.load(sliced.folder)), logits(compress.load(pruned.folder))) < 1e-5


def test_fewer_tokens_than_directions_are_noted(tiny, text, tmp_path):
    class Notes(Silent):
        def __init__(self) -> None:
            self.notes: list[str] = []

        def note(self, message: str) -> None:
            self.notes.append(message)

    progress, fields = Notes(), {"calibration": {"data": str(text), "samples": 1, "length": 40}, "evaluation": False}
    result = run(recipe_for(tiny("opt"), [{"slicegpt": {}}], text, **fields), tmp_path / "out", progress=progress)
    assert any("40 calibration tokens reach at most as many of 48 directions" in note for note in progress.notes)
    assert max(result.report["rewrites"][0]["figures"]["energy_lost"]) < 1e-6


# ---- interrupted


@pytest.mark.parametrize(("phase", "after"), [("observe", 1), ("observe", 2), ("compress", 2)])
def test_resumed_after_a_kill_it_gives_the_same_bytes(phase, after, sliced, tiny, text, tmp_path):
    class Stop(Silent):
        now, done = "", 0

        def begin(self, phase: str, total: int, unit: str) -> None:
            self.now = phase

        def advance(self, steps: int = 1, detail: str = "") -> None:
            self.done += self.now == phase
            if self.done == after:
                raise KeyboardInterrupt

    then = {"gptq": {"bits": 4, "group_size": 16}}
    recipe = recipe_for(tiny("llama_gqa_tied"), [{"slicegpt": {"sparsity": 0.25}}, then], text, evaluation=False)
    whole = sliced("llama_gqa_tied", then, sparsity=0.25)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "cut", progress=Stop())
    kept = list((tmp_path / "cut" / ".compress").glob(f"{OBSERVED}*basis*"))
    assert len(kept) == (2 * after if phase == "observe" else 2 * BLOCKS + 1)
    nbytes = sum(info.nbytes for file in kept for info in read_header(file).values())
    assert nbytes == plan(recipe).bytes_kept if phase == "compress" else 0 < nbytes < plan(recipe).bytes_kept
    run(recipe, tmp_path / "cut", machine=Machine(activation_bytes=0))
    assert fingerprints(tmp_path / "cut") == fingerprints(whole.folder)


# ---- refusals


@pytest.mark.parametrize(("settings", "said"), [
    ({"sparsity": 1.0}, "less than 1"),
    ({"sparsity": 0.95}, "leaves 3 of 64 entries, fewer than round_to=8; slice less"),
    ({"sparsity": 0.9, "keep_ratio": 0.9}, "sparsity and keep_ratio are two ways"),
    ({"keep_ratio": 0.9, "round_to": 128}, "round_to=128: is more than the 64 entries"),
    ({"keep_ratio": 0.1}, "no width fits; 8 entries already take 0.275"),
    ({"sparsity": 0.2, "orientation": "pcaa"}, "orientation"),
    ({"width": 48}, "width"),
])  # fmt: skip
def test_settings_that_cannot_be(settings, said, tiny, text):
    with pytest.raises(RecipeError) as caught:
        plan(recipe_for(tiny("llama"), [{"slicegpt": settings}], text))
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_keep_ratio_is_of_bytes(dtype, tiny, text):
    model = {"path": str(tiny("llama")), "dtype": dtype}
    made = plan(recipe_for(tiny("llama"), [{"slicegpt": {"keep_ratio": 0.8}}], text, model=model))
    wider = made.architecture.structure.width == 64  # in half the bytes all of it fits
    assert made.bytes_total_after <= 0.8 * made.bytes_total_before and wider == (dtype == "bfloat16")


@pytest.mark.parametrize("format_", ["dense", "compressed-tensors", "gptq", "awq"])
def test_no_format_holds_it(format_, sliced, tmp_path):
    folder = sliced("llama", sparsity=0.25).folder
    with pytest.raises(RecipeError, match="the blocks have shortcut matrices"):
        compress.export(folder, format_, tmp_path / "out")
    assert not (tmp_path / "out").exists()
