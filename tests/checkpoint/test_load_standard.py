"""compressed-tensors folders: stock transformers loads them exactly, and so do we, on packed modules."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

import compress
from compress.errors import CheckpointError
from compress.models.families import module_name
from compress.modules.base import CompressedModule
from tests.checkpoint.folders import assert_same_tensors, in_blocks, quantize_folder, stored_tensors

IDS = torch.arange(2 * 24).view(2, 24)

VARIANTS = {
    **{f"{bits} bits": {"bits": bits} for bits in (2, 3, 4, 5, 6, 8)},
    "per channel": {"group_size": -1, "bits": 3},
    "bf16": {"dtype": torch.bfloat16},
    "bf16 per channel": {"dtype": torch.bfloat16, "group_size": -1, "bits": 8},
    "fp16": {"dtype": torch.float16},
    "with head": {"select": lambda name, site: site.kind != "embedding"},
    "attention only": {"select": lambda name, site: in_blocks(name, site) and "attn" in name},
    "mixed by role": {"bits": lambda name: 8 if "down" in name else 4},
    "mixed by block": {"bits": lambda name: 8 if ".1." in name else 4},
    "asymmetric": {"symmetric": False},
    "asymmetric 3 bits per channel": {"symmetric": False, "bits": 3, "group_size": -1},
    "asymmetric bf16": {"symmetric": False, "dtype": torch.bfloat16},
}
FAMILIES = ["llama_gqa_tied", "gemma", "gemma3_text", "phi3", "opt_post_norm", "gpt_neox", "mixtral", "qwen3_moe"]


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def test_stock_transformers_loads_it_exactly(tiny, tmp_path, stock):
    folders = {name: quantize_folder(tiny("llama"), tmp_path / name, **options) for name, options in VARIANTS.items()}
    for family in FAMILIES:
        folders[family] = quantize_folder(tiny(family), tmp_path / family)
    moe = {"bits": lambda name: 8 if "attn" in name else 4}
    folders["mixed mixture of experts"] = quantize_folder(tiny("mixtral"), tmp_path / "mixed moe", **moe)
    head = {"select": lambda name, site: site.kind != "embedding"}
    folders["renamed head"] = quantize_folder(tiny("gpt_neox"), tmp_path / "renamed head", **head)
    jobs = [
        {"do": "compare", "folder": f.path, "twin": f.twin, "dequantize": name.startswith("asymmetric")}
        for name, f in folders.items()
    ]
    for name, answer in zip(folders, stock(*jobs), strict=True):
        assert answer["error"] is None, name
        assert answer["weights"] == [], name
        assert answer["logits"] <= (1e-4 if "16" not in name else 0.1), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_we_load_it_packed(variant, tiny, tmp_path):
    folder = quantize_folder(tiny("llama"), tmp_path / "q", **VARIANTS[variant])
    model = compress.load(folder.path)
    twin = compress.load(folder.twin)
    assert model.dtype == twin.dtype == VARIANTS[variant].get("dtype", torch.float32)
    for name in folder.specs:
        module = model.get_submodule(name)
        assert isinstance(module, CompressedModule)
        assert torch.equal(module.dense(), twin.get_submodule(name).weight)
    torch.testing.assert_close(logits(model), logits(twin))


@pytest.mark.parametrize("family", ["llama", *FAMILIES])
def test_saved_as_compressed_tensors_again(family, tiny, tmp_path, stock):
    folder = quantize_folder(tiny(family), tmp_path / "q")
    model = compress.load(folder.path)
    model.save_pretrained(tmp_path / "before")
    expected = logits(model)
    model.generate(IDS, max_new_tokens=3, do_sample=False)
    model.save_pretrained(tmp_path / "after", max_shard_size="60KB")
    original = stored_tensors(folder.path)
    for copy in (tmp_path / "before", tmp_path / "after"):
        assert_same_tensors(stored_tensors(copy), original)
        config = json.loads((copy / "config.json").read_text())
        assert (
            config["quantization_config"]
            == json.loads((folder.path / "config.json").read_text())["quantization_config"]
        )
        assert torch.equal(logits(compress.load(copy)), expected)
    if family in ("llama", "mixtral"):  # one with and one without experts
        (answer,) = stock({"do": "compare", "folder": tmp_path / "after", "twin": folder.twin, "dequantize": False})
        assert answer["error"] is None
        assert answer["weights"] == []
        assert answer["logits"] <= 1e-4


@pytest.mark.parametrize("family", ["gpt_neox", "mixtral", "qwen3_moe", "gemma3_text", "opt_post_norm"])
def test_packed_logits_equal_the_dense_twins(family, tiny, tmp_path):
    folder = quantize_folder(tiny(family), tmp_path / "q", symmetric=False)
    model, twin = compress.load(folder.path), compress.load(folder.twin)
    assert all(
        isinstance(model.get_submodule(module_name(folder.architecture, name)), CompressedModule)
        for name in folder.specs
    )
    torch.testing.assert_close(logits(model), logits(twin))


def test_another_dtype_takes_the_scales_along(tiny, tmp_path):
    folder = quantize_folder(tiny("llama"), tmp_path / "q")
    model = compress.load(folder.path, dtype=torch.bfloat16)
    assert model.model.layers[0].mlp.up_proj.weight_scale.dtype == torch.bfloat16
    assert logits(model).dtype == torch.bfloat16


def test_import_compress_leaves_the_standard_loader_alone(tiny, tmp_path):
    pytest.importorskip("compressed_tensors")
    folder = quantize_folder(tiny("llama"), tmp_path / "q")
    model = AutoModelForCausalLM.from_pretrained(folder.path)
    assert not any(isinstance(module, CompressedModule) for module in model.modules())
    assert torch.equal(logits(model), logits(compress.load(folder.twin)))


def test_plain_checkpoints_load_plainly(tiny):
    model = compress.load(tiny("qwen2"))
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(tiny("qwen2"))))


def damaged(folder, damage):
    path = folder.path.with_name("damaged")
    shutil.copytree(folder.path, path)
    damage(path)
    return path


def rewrite(drop=None, **changes):
    """Damage: leave out the tensors whose name contains `drop`; set top-level fields of config.json."""
    from safetensors.torch import load_file, save_file

    def damage(path):
        file = next(path.glob("*.safetensors"))
        if drop:
            save_file({n: t for n, t in load_file(file).items() if drop not in n}, file, metadata={"format": "pt"})
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, **changes}))

    return damage


def truncate(path):
    file = next(path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (truncate, "truncated"),
        (rewrite(drop="layers.1.mlp.up_proj.weight_scale"), "layers.1.mlp.up_proj"),
        (rewrite(drop="layers.1.mlp.up_proj.weight_shape"), "layers.1.mlp.up_proj"),
        (rewrite(drop="layers.1.mlp.up_proj"), "layers.1.mlp.up_proj"),
        (rewrite(drop="layers.1.input_layernorm"), "layers.1.input_layernorm"),
        (rewrite(drop="lm_head"), "lm_head"),
        (rewrite(intermediate_size=256), "mlp"),
        (rewrite(num_hidden_layers=2), "layers.2"),
        (rewrite(num_hidden_layers=4), "layers.3"),
        (rewrite(quantization_config={"quant_method": "awq"}), "awq"),
        (rewrite(quantization_config=7), "quantization_config"),
        (rewrite(quantization_config=None), "weight_packed|tensors|describe"),
        (lambda path: (path / "config.json").unlink(), "config.json"),
        (lambda path: [file.unlink() for file in path.glob("*.safetensors")], "missing|no model"),
    ],
)  # fmt: skip
def test_damage_is_named_and_nothing_is_random(damage, named, own, tiny, tmp_path):
    folder = quantize_folder(tiny("llama"), tmp_path / "q", own=own)
    with pytest.raises(CheckpointError, match=named) as caught:
        compress.load(damaged(folder, damage))
    assert "\n" not in str(caught.value)


def test_missing_folders_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        compress.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no such model folder"):
        compress.load("./nowhere/at-all")
