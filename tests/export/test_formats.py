"""Every format holds what the source holds: by our own loader, and by decoders that share no code with us."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import compress
from compress.checkpoint.stream import StreamedModel
from compress.errors import RecipeError
from compress.modules.quantized import QuantizedLinear
from tests.checkpoint.folders import stored_tensors
from tests.export.conftest import MODELS, Made, logits
from tests.export.decoders import decoded

GPTQ = [name for name in MODELS if name != "float32"]
AWQ = [
    name
    for name in GPTQ
    if name
    not in (
        "llama2",
        "llama3",
        "llama8",
        "asymmetric3",
        "asymmetric2",
        "asymmetric8",
        "mixed",
        "gpt2",
        "gpt2_no_prefix",
    )
]
STANDARD = ["llama4", "llama3", "asymmetric4", "rows", "biases_tied", "head_untied", "qwen2", "mixtral", "gpt_neox"]
PAIRS = [("gptq", n) for n in GPTQ] + [("awq", n) for n in AWQ] + [("compressed-tensors", n) for n in STANDARD]

Make = Callable[[str], Made]
every_pair = pytest.mark.parametrize(("format_", "name"), PAIRS)


def full(name: str, prefix: bool) -> str:
    return f"transformer.{name}" if prefix and name.startswith("h.") else name


@every_pair
def test_an_independent_decoder_finds_the_weights(made: Make, format_: str, name: str):
    source = made(name)
    weights = decoded(source.export(format_))
    twin = load_file(source.folder.twin / "model.safetensors")
    assert weights.keys() == {full(n, format_ == "gptq") for n in source.folder.specs}
    for layer in source.folder.specs:
        expected = twin[f"{layer}.weight"].double().numpy()  # the product, rounded to bfloat16
        if source.folder.architecture.transposed:
            expected = expected.T
        found = torch.from_numpy(weights[full(layer, format_ == "gptq")]).to(torch.bfloat16).double().numpy()
        assert np.array_equal(found, expected), layer


@every_pair
def test_we_load_it_and_compute_the_same(made: Make, format_: str, name: str):
    source = made(name)
    model = compress.load(source.export(format_))
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == len(source.folder.specs)
    assert torch.equal(logits(source.export(format_)), logits(source.path))


@pytest.mark.parametrize("name", GPTQ)
def test_dense_is_what_the_source_computes_with(made: Make, name: str):
    source = made(name)
    out = source.export("dense")
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    found, twin = stored_tensors(out), load_file(source.folder.twin / "model.safetensors")
    ignored = {key for key in twin if key.endswith(".attn.bias")}  # causal masks of the original GPT-2
    assert found.keys() == twin.keys() - ignored
    for key, tensor in found.items():
        assert tensor.dtype == twin[key].dtype
        assert torch.equal(tensor, twin[key]), key


@pytest.mark.parametrize(
    ("format_", "name"), [("gptq", "asymmetric3"), ("awq", "qwen2"), ("gptq", "mixtral"), ("dense", "head")]
)
def test_blocks_stream_from_it(made: Make, format_: str, name: str):
    ids = torch.arange(2 * 24).view(2, 24)
    found = []
    for folder in (made(name).export(format_), made(name).path):
        model = StreamedModel(folder, torch.bfloat16)
        hidden = model.embed(ids)
        for index in range(model.n_blocks):
            hidden = model.call_block(model.load_block(index), index, hidden)
            model.unload_block(index)
        found.append(model.logits(model.final_norm(hidden)))
        model.close()
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["llama4", "asymmetric3", "head_untied", "mixtral", "gpt2"])
def test_there_and_back_again(made: Make, name: str, tmp_path):
    """From GPTQ to our tensors again: the very same ones, less the dtype of the scales."""
    source = made(name)
    back = "dense" if name == "gpt2" else "compressed-tensors"
    compress.export(source.export("gptq"), back, tmp_path / "back")
    if back == "dense":
        assert torch.equal(logits(tmp_path / "back"), logits(source.path))
        return
    found, original = stored_tensors(tmp_path / "back"), stored_tensors(source.path)
    assert found.keys() == original.keys()
    for key, tensor in original.items():
        assert torch.equal(found[key].to(tensor.dtype), tensor), key


@pytest.mark.parametrize("format_", ["gptq", "awq"])
def test_a_loaded_model_saves_as_what_it_has_become(made: Make, format_: str, tmp_path):
    compress.load(made("biases_tied").export(format_)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert torch.equal(logits(tmp_path), logits(made("biases_tied").path))


def test_what_gptq_says_of_itself(made: Make):
    symmetric = json.loads((made("llama4").export("gptq") / "config.json").read_text())["quantization_config"]
    assert (symmetric["checkpoint_format"], symmetric["sym"], symmetric["lm_head"]) == ("gptq", True, False)
    assert "dynamic" not in symmetric
    tensors = stored_tensors(made("llama4").export("gptq"))
    assert (tensors["model.layers.0.mlp.up_proj.qzeros"] == 0x77777777).all()  # 8, less one
    side = json.loads((made("llama4").export("gptq") / "quantize_config.json").read_text())
    assert side == symmetric
    asymmetric = json.loads((made("asymmetric4").export("gptq") / "config.json").read_text())["quantization_config"]
    assert (asymmetric["checkpoint_format"], asymmetric["sym"]) == ("gptq_v2", False)
    head = json.loads((made("head").export("gptq") / "config.json").read_text())["quantization_config"]
    assert head["lm_head"] is True


def test_rules_name_what_differs_also_by_its_fused_name(made: Make):
    mixed = json.loads((made("mixed").export("gptq") / "config.json").read_text())["quantization_config"]
    assert (mixed["bits"], mixed["group_size"]) == (4, 32)
    assert mixed["dynamic"] == {r"+:model\.layers\.\d+\.mlp\.down_proj$": {"bits": 8, "group_size": 32}}
    skipped = json.loads((made("skipped").export("gptq") / "config.json").read_text())["quantization_config"]
    assert all(rule.startswith("-:") and value == {} for rule, value in skipped["dynamic"].items())
    from compress.export.gptq import name_expressions
    from compress.export.run import open_model

    model = open_model(str(made("llama4").path))
    attention = [f"model.layers.1.self_attn.{part}_proj" for part in "qkv"]
    assert any("qkv_proj" in e for e in name_expressions(model, attention))
    assert not any("qkv_proj" in e for e in name_expressions(model, attention[:2]))


def test_biases_names_and_ties_stay(made: Make):
    source = made("biases_tied")
    for format_ in ("gptq", "awq", "dense", "compressed-tensors"):
        tensors = stored_tensors(source.export(format_))
        assert "lm_head.weight" not in tensors
        original = stored_tensors(source.path)
        for name in original:
            if name.endswith((".bias", "norm.weight", "embed_tokens.weight")):
                assert torch.equal(tensors[name], original[name])
                assert tensors[name].dtype == original[name].dtype
    untied = json.loads((made("head_untied").export("gptq") / "config.json").read_text())
    assert untied["tie_word_embeddings"] is False


def test_scales_that_float16_does_not_hold_are_told(made: Make, tmp_path):
    report = compress.export(made("float32").path, "gptq", tmp_path / "out")
    assert 0 < report["largest_scale_change"] <= 2**-11
    assert 0 < report["read_back"]["largest_weight_change"] < 2**-10
    assert any("scales are rounded" in warning for warning in report["warnings"])
    exact = compress.export(made("float32").path, "compressed-tensors", tmp_path / "standard")
    assert exact["read_back"]["largest_weight_change"] == exact["largest_scale_change"] == 0


def test_scales_that_vanish_in_float16_are_refused(made: Make, tmp_path):
    from safetensors.torch import save_file

    source = tmp_path / "tiny"
    source.mkdir()
    for file in made("llama4").path.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.2.mlp.up_proj"
    tensors[f"{name}.weight_scale"] *= 1e-6
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecipeError, match=rf"{name}: its scales .* float16.*compressed-tensors instead"):
        compress.export(source, "gptq", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert compress.export(source, "compressed-tensors", tmp_path / "out")["read_back"]["layers"] == 21
