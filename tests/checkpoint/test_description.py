import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.checkpoint.description import OWN, STANDARD, modules_of, quantization_config, standard_holds
from compress.checkpoint.headers import read_headers
from compress.errors import CheckpointError
from compress.models.families import architecture_of
from compress.modules.quantized_spec import QuantizedSpec
from tests.checkpoint.folders import in_blocks, quantize_folder
from tests.tiny_models import save_tiny, tiny_config


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("llama") / "source")


def described(folder):
    config = json.loads((folder / "config.json").read_text())
    return modules_of(config, read_headers(folder))


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"symmetric": False},
        {"group_size": -1, "bits": 3},
        {"bits": lambda name: 8 if "down" in name else 4},
        {"bits": lambda name: 8 if ".1." in name else 2},
        {"select": lambda name, site: in_blocks(name, site) and "attn" in name},
        {"select": lambda name, site: True},
    ],
)
def test_what_is_written_is_read(llama, tmp_path, own, options):
    folder = quantize_folder(llama, tmp_path / "q", own=own, **options)
    assert described(folder.path) == folder.specs


@pytest.mark.parametrize("family", ["gpt_neox", "mixtral", "qwen3_moe", "opt", "gpt2"])
def test_names_are_those_on_disk_in_every_family(family, tmp_path):
    source = save_tiny(family, tmp_path / "source", tokenizer=False)
    everything = quantize_folder(source, tmp_path / "own", own=True, select=lambda name, site: True)
    assert described(everything.path) == everything.specs
    if family != "gpt2":
        folder = quantize_folder(source, tmp_path / "standard", bits=lambda name: 8 if "attn" in name else 4)
        assert described(folder.path) == folder.specs


def large(**experts):
    config = tiny_config("qwen3_moe", num_hidden_layers=48, num_experts=128, num_local_experts=128, **experts).to_dict()
    architecture = architecture_of(config)
    names = [n for i in range(48) for site in architecture.sites(i) for n in site.linears]
    return architecture, names


@pytest.mark.parametrize("format_", [OWN, STANDARD])
def test_a_large_mixture_of_experts_has_a_small_config(format_):
    architecture, names = large()
    specs = {name: QuantizedSpec(64, 64, 4 if "experts" in name else 8, 16) for name in names}
    assert len(specs) > 18_000
    assert len(json.dumps(quantization_config(format_, specs, architecture))) < 6_000


def standard_config(llama, tmp_path, **changes):
    folder = quantize_folder(llama, tmp_path / "q").path
    config = json.loads((folder / "config.json").read_text())
    quantization = config["quantization_config"]
    for path, value in changes.items():
        target = quantization
        *parts, last = path.split("__")
        for part in parts:
            target = target[part]
        target[last] = value
    return config, read_headers(folder)


def test_config_of_llm_compressor_is_read(llama, tmp_path):
    """Fields that it writes and we do not, and the names of its version of the group."""
    config, infos = standard_config(
        llama,
        tmp_path,
        version="0.14.1",
        config_groups__group_0__weights__actorder="static",
        config_groups__group_0__weights__observer="mse",
        sparsity_config={},
        ignore=["lm_head", "re:.*router$"],
    )
    del config["quantization_config"]["config_groups"]["group_0"]["format"]
    del config["quantization_config"]["transform_config"]
    assert len(modules_of(config, infos)) == 21


WEIGHTS = "config_groups__group_0__weights"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"config_groups__group_0__format": "float-quantized"}, "float-quantized"),
        ({"config_groups__group_0__format": "nvfp4-pack-quantized"}, "nvfp4-pack-quantized"),
        ({f"{WEIGHTS}__type": "float", f"{WEIGHTS}__num_bits": 8}, "float"),
        ({f"{WEIGHTS}__num_bits": 16}, "16"),
        ({f"{WEIGHTS}__num_bits": "4"}, "'4'"),
        ({f"{WEIGHTS}__actorder": "group"}, "actorder"),
        ({f"{WEIGHTS}__strategy": "tensor"}, "tensor"),
        ({f"{WEIGHTS}__group_size": 0}, "group_size"),
        ({f"{WEIGHTS}__group_size": 2**50}, "group_size|columns|in_features"),
        ({f"{WEIGHTS}__group_size": 32}, "weight_packed"),
        ({f"{WEIGHTS}__num_bits": 8}, "weight_packed"),
        ({f"{WEIGHTS}__symmetric": False}, "weight_zero_point"),
        ({f"{WEIGHTS}__symmetric": "yes"}, "symmetric"),
        ({"config_groups__group_0__input_activations": {"num_bits": 8}}, "input_activations"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        ({"transform_config": {"config_groups": {"R1": {}}}}, "transform_config"),
        ({"quantization_status": "frozen"}, "frozen"),
        ({"config_groups": []}, "config_groups"),
        ({"config_groups__group_0": 3}, "group_0"),
        ({"config_groups__group_0__targets": ["re:("]}, "regular expression"),
        ({"config_groups__group_0__targets": [5]}, "targets"),
        ({"config_groups__group_0__targets": ["model.layers.0.mlp.up_proj"]}, "no scheme"),
        ({"ignore": ["model.layers.0.mlp.up_proj"]}, r"model\.layers\.0\.mlp\.up_proj"),
        ({"quant_method": "gptq"}, "gptq"),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(llama, tmp_path, change, named):
    config, infos = standard_config(llama, tmp_path, **change)
    with pytest.raises(CheckpointError, match=named) as caught:
        modules_of(config, infos)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"format_version": 2}, "upgrade"),
        ({"format_version": "1"}, "format_version"),
        ({"modules": {}}, "modules"),
        ({"modules": [3]}, r"modules\[0\]"),
        ({"modules": [{"names": ["a"]}]}, "representation"),
        ({"modules": [{**QuantizedSpec(8, 8, 4, 8).to_dict(), "names": ["a.[0-99999999]"]}]}, "stands for more"),
        ({"modules": [{**QuantizedSpec(8, 8, 4, 8).to_dict(), "names": ["a", "a"]}]}, "twice"),
        ({"modules": [{**QuantizedSpec(8, 8, 4, 8).to_dict(), "names": ["a"]}]}, "a.weight_packed"),
        (
            {"modules": [{**QuantizedSpec(2**30, 2**30, 4, -1).to_dict(), "names": ["model.layers.0.mlp.up_proj"]}]},
            "stored",
        ),
    ],
)
def test_our_own_description_is_not_believed(llama, tmp_path, change, named):
    folder = quantize_folder(llama, tmp_path / "q", own=True).path
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= change
    with pytest.raises(CheckpointError, match=named):
        modules_of(config, read_headers(folder))


def test_a_column_index_is_refused(llama, tmp_path):
    folder = quantize_folder(llama, tmp_path / "q").path
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight_g_idx"] = torch.zeros(64, dtype=torch.int32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="weight_g_idx"):
        described(folder)


def test_plain_models_have_no_compressed_modules(llama):
    assert described(llama) == {}


@pytest.mark.parametrize(
    ("family", "choose", "reason"),
    [
        ("llama", lambda n: (4, True), None),
        ("llama", lambda n: (8 if "down" in n else 4, True), None),
        ("llama", lambda n: (4, False), None),
        ("llama", lambda n: (8 if "down" in n else 4, False), "several"),
        ("gpt2", lambda n: (4, True), "Conv1D"),
        ("qwen3_moe", lambda n: (8 if "attn" in n else 4, True), None),
        ("qwen3_moe", lambda n: (8 if "down" in n else 4, True), "experts"),
        ("qwen3_moe", lambda n: (4, False), "experts"),
        ("qwen3_moe", lambda n: (4, True) if "experts" not in n else None, "experts"),
        ("qwen3_moe", lambda n: (4, True) if "layers.2" not in n else None, "experts"),
    ],
)
def test_what_the_standard_holds(family, choose, reason):
    architecture = architecture_of(tiny_config(family).to_dict())
    names = [n for i in range(architecture.n_blocks) for site in architecture.sites(i) for n in site.linears]
    specs = {n: QuantizedSpec(64, 64, choose(n)[0], 16, choose(n)[1]) for n in names if choose(n)}
    found = standard_holds(specs, architecture)
    assert (found is None) if reason is None else reason in found


def test_the_standard_holds_a_head_but_no_table():
    architecture = architecture_of(tiny_config("llama").to_dict())
    assert standard_holds({"lm_head": QuantizedSpec(64, 288, 4, 16)}, architecture) is None
    table = {"model.embed_tokens": QuantizedSpec(64, 288, 4, 16, kind="embedding")}
    assert "model.embed_tokens" in standard_holds(table, architecture)
