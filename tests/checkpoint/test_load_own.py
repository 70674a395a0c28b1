"""Our own format: ordinary with us, loud without us, and copies of it too."""

import copy
import json
import pickle

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, LlamaModel, PreTrainedModel

import compress
from compress.checkpoint.description import GUARD
from compress.errors import CheckpointError
from compress.models.families import module_name
from compress.modules.base import CompressedModule
from tests.checkpoint.folders import assert_same_tensors, quantize_folder, stored_tensors
from tests.tiny_models import TINY

LIKE_OTHERS = {"opt_post_norm", "gpt_neox_serial", "mistral", "qwen2", "gemma2"}  # in what is stored
IDS = torch.arange(2 * 24).view(2, 24)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("family", sorted(TINY.keys() - LIKE_OTHERS))
def test_every_family_loads_and_survives_saving(family, tiny, tmp_path):
    """Save and load twice, in one shard and in many, before and after a forward."""
    folder = quantize_folder(tiny(family), tmp_path / "q", own=True)
    model = AutoModelForCausalLM.from_pretrained(folder.path)
    modules = [model.get_submodule(module_name(folder.architecture, name)) for name in folder.specs]
    assert all(isinstance(module, CompressedModule) for module in modules)
    model.save_pretrained(tmp_path / "one")
    expected = logits(model)
    torch.testing.assert_close(expected, logits(compress.load(folder.twin)))
    assert model.generate(IDS, max_new_tokens=3, do_sample=False).shape == (2, 27)
    model.save_pretrained(tmp_path / "two", max_shard_size="40KB")
    again = compress.load(tmp_path / "two")
    again.save_pretrained(tmp_path / "three")
    for path in (tmp_path / "one", tmp_path / "three"):
        assert_same_tensors(stored_tensors(path), stored_tensors(tmp_path / "two"))
        assert json.loads((path / "config.json").read_text())["transformers_weights"] == GUARD
        assert not list(path.glob("model*"))
        assert not list(path.glob(".saving*"))
        assert torch.equal(logits(compress.load(path)), expected)
    if family != "gpt2_no_prefix":  # transformers saves under its own names
        ignored = {name for name in stored_tensors(folder.path) if name.endswith(".attn.bias")}
        original = {name: t for name, t in stored_tensors(folder.path).items() if name not in ignored}
        assert_same_tensors(stored_tensors(tmp_path / "three"), original)


@pytest.mark.parametrize(
    ("family", "symmetric"),
    [
        ("llama", False),
        ("gemma3_text", True),
        ("llama_gqa_tied", True),
        ("gpt2", False),
        ("gpt_neox", True),
        ("opt", True),
    ],
)
def test_tables_and_heads(family, symmetric, tiny, tmp_path):
    everything = {"symmetric": symmetric, "select": lambda name, site: True}
    folder = quantize_folder(tiny(family), tmp_path / "q", own=True, **everything)
    model = compress.load(folder.path)
    torch.testing.assert_close(logits(model), logits(compress.load(folder.twin)))
    assert model.generate(IDS, max_new_tokens=3, do_sample=False).shape == (2, 27)
    model.save_pretrained(tmp_path / "again")
    assert_same_tensors(stored_tensors(tmp_path / "again"), stored_tensors(folder.path))
    assert torch.equal(logits(compress.load(tmp_path / "again")), logits(model))


def test_a_table_alone_leaves_the_head_of_a_tied_model_dense(tiny, tmp_path):
    only_table = {"select": lambda name, site: site.kind == "embedding"}
    folder = quantize_folder(tiny("llama_gqa_tied"), tmp_path / "q", own=True, **only_table)
    torch.testing.assert_close(logits(compress.load(folder.path)), logits(compress.load(folder.twin)))


def test_explicit_classes_and_device_maps(tiny, tmp_path):
    folder = quantize_folder(tiny("llama"), tmp_path / "q", own=True)
    expected = logits(compress.load(folder.path))
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(folder.path)), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder.path, device_map="auto")), expected)
    assert torch.equal(logits(compress.load(folder.path, device="cpu")), expected)
    half = AutoModelForCausalLM.from_pretrained(folder.path, dtype=torch.bfloat16)
    assert half.dtype == half.model.layers[0].mlp.up_proj.weight_scale.dtype == torch.bfloat16
    config = AutoConfig.from_pretrained(folder.path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder.path, config=config)), expected)


def test_offloaded_to_disk(tiny, tmp_path):
    folder = quantize_folder(tiny("llama"), tmp_path / "q", own=True)
    expected = logits(compress.load(folder.path))
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu",
              "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder.path, device_map=places, offload_folder=tmp_path / "offload")
    assert torch.equal(logits(model), expected)


def test_a_base_model_runs_but_cannot_be_saved(tiny, tmp_path):
    folder = quantize_folder(tiny("llama"), tmp_path / "q", own=True)
    model = LlamaModel.from_pretrained(folder.path)
    with torch.no_grad():
        hidden = model(IDS).last_hidden_state
        assert torch.equal(compress.load(folder.path).model(IDS).last_hidden_state, hidden)
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "base")


def test_copies_of_the_model_are_guarded_too(tiny, tmp_path):
    model = compress.load(quantize_folder(tiny("llama"), tmp_path / "q", own=True).path)
    for number, twin in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(copy.deepcopy(model))))):
        twin.save_pretrained(tmp_path / str(number))
        if number == 0:
            assert (tmp_path / "0" / "compress.safetensors.index.json").is_file()
            assert twin.save_pretrained.__self__ is twin
        assert torch.equal(logits(compress.load(tmp_path / str(number))), logits(model))


def test_pushing_uploads_what_is_guarded(tiny, tmp_path, monkeypatch):
    uploaded = {}

    class Api:
        def __init__(self, **kwargs): ...

        def create_repo(self, repo_id, **kwargs):
            return type("Repo", (), {"repo_id": f"someone/{repo_id}"})

        def upload_folder(self, folder_path, repo_id, allow_patterns, **kwargs):
            config = json.loads((folder_path / "config.json").read_text())
            uploaded[repo_id] = (config["transformers_weights"], set(allow_patterns))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    model = compress.load(quantize_folder(tiny("llama"), tmp_path / "q", own=True).path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "private.txt").write_text("not to be uploaded")
    model.save_pretrained(tmp_path / "mine", push_to_hub=True)
    sentence, patterns = uploaded["someone/mine"]
    assert sentence == GUARD
    assert {"config.json", "compress-00001-of-00001.safetensors", "compress.safetensors.index.json"} <= patterns
    assert "private.txt" not in patterns


def test_saving_over_a_previous_save_leaves_nothing_of_it(tiny, tmp_path):
    model = compress.load(quantize_folder(tiny("llama"), tmp_path / "q", own=True).path)
    model.save_pretrained(tmp_path / "again", max_shard_size="40KB")
    (tmp_path / "again" / "model.safetensors").write_text("of some other model")
    model.save_pretrained(tmp_path / "again")
    assert [file.name for file in tmp_path.joinpath("again").glob("*.safetensors")] == [
        "compress-00001-of-00001.safetensors"
    ]
    assert torch.equal(logits(compress.load(tmp_path / "again")), logits(model))


def test_stock_transformers_stops_with_a_sentence(tiny, tmp_path, stock):
    llama = quantize_folder(tiny("llama"), tmp_path / "llama", own=True)
    gpt2 = quantize_folder(tiny("gpt2"), tmp_path / "gpt2", own=True)
    model = compress.load(llama.path)
    model.save_pretrained(tmp_path / "copy")
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    logits(model)
    model.save_pretrained(tmp_path / "after")
    places = {
        "LlamaForCausalLM": (llama.path, *(tmp_path / n for n in ("copy", "shards", "after"))),
        "GPT2LMHeadModel": (gpt2.path,),
    }
    jobs = [
        {"do": "load", "folder": folder, "class": name}
        for explicit, folders in places.items()
        for folder in folders
        for name in ("AutoModelForCausalLM", "AutoModel", explicit)
    ]
    for job, answer in zip(jobs, stock(*jobs), strict=True):
        assert answer["error"] is not None, job
        assert "compress-llm" in answer["error"], job


def test_a_copy_made_past_our_save_pretrained_still_fails_without_us(tiny, tmp_path, stock):
    model = compress.load(quantize_folder(tiny("llama"), tmp_path / "q", own=True).path)
    PreTrainedModel.save_pretrained(model, tmp_path / "unguarded")
    (answer,) = stock({"do": "load", "folder": tmp_path / "unguarded", "class": "AutoModelForCausalLM"})
    assert "mismatch" in answer["error"]
    again = compress.load(tmp_path / "unguarded")
    assert_same_tensors(again.state_dict(), model.state_dict())


def test_a_tied_table_that_is_compressed_is_refused(tiny, tmp_path):
    folder = quantize_folder(tiny("llama_gqa_tied"), tmp_path / "q", own=True, select=lambda name, site: True)
    config = json.loads((folder.path / "config.json").read_text())
    (folder.path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        compress.load(folder.path)
