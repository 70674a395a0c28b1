"""Low-rank modules, plain and with rounded factors, in checkpoints of every kind of family."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import compress
from compress.checkpoint.description import GUARD, OWN, OWN_INDEX, quantization_config
from compress.checkpoint.source import find_source
from compress.cli.inspect import modules_in
from compress.errors import CheckpointError, CompressError
from compress.evaluation.size import Sizes
from compress.methods.base import Layer, SiteTask
from compress.methods.rtn import RTN, RTNConfig
from compress.models.families import architecture_of, module_name
from compress.modules.low_rank import LowRankLinear
from tests.checkpoint.folders import Folder, _write, assert_same_tensors, in_blocks, stored_tensors

IDS = torch.arange(2 * 24).view(2, 24)
RANK = 16
SHARD = "compress-00001-of-00001"


def low_rank_folder(source: Path, path: Path, dtype: torch.dtype = torch.float32) -> Folder:
    """Random factors of about the size of the weights; of some layers the right one is rounded, of some both."""
    config = json.loads((source / "config.json").read_text())
    tensors = {
        n: t.to(dtype) if t.is_floating_point() else t for n, t in load_file(source / "model.safetensors").items()
    }
    architecture = architecture_of(config, tensors.keys())
    dense, specs = dict(tensors), {}
    generator = torch.Generator().manual_seed(0)
    linears = [name for site in architecture.all_sites() if in_blocks("", site) for name in site.linears]
    for i, name in enumerate(linears):
        weight = tensors.pop(f"{name}.weight")
        out, n = weight.T.shape if architecture.transposed else weight.shape
        left = torch.randn(out, RANK, generator=generator).to(dtype)
        right = (torch.randn(RANK, n, generator=generator) / (RANK * n) ** 0.5).to(dtype)
        module = LowRankLinear.from_factors(left, right)
        for leaf in ("right", "left") if i % 3 == 2 else ("right",) if i % 3 == 1 else ():
            task = Layer(leaf, module.leaves()[leaf].weight, None, RTNConfig(bits=4, group_size=16), dtype)
            rounded = RTN.compress(SiteTask("site", (task,)), None, torch.Generator())[leaf].module
            module = module.with_leaf(leaf, rounded, None)
        tensors |= {f"{name}.{suffix}": t.detach().clone() for suffix, t in module.stored().items()}
        product = module.dense()
        dense[f"{name}.weight"] = product.T.contiguous() if architecture.transposed else product
        specs[name] = module.spec
    config["dtype"] = str(dtype).removeprefix("torch.")
    _write(path.with_name(f"{path.name}-twin"), config, dense, "model")
    config |= {"quantization_config": quantization_config(OWN, specs, architecture), "transformers_weights": GUARD}
    _write(path, config, tensors, SHARD)
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, f"{SHARD}.safetensors")}
    (path / OWN_INDEX).write_text(json.dumps(index))
    return Folder(path, path.with_name(f"{path.name}-twin"), specs, architecture)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize(
    "family", ["llama_gqa_tied", "gemma3_text", "opt", "gpt2", "gpt2_no_prefix", "gpt_neox", "mixtral"]
)
def test_loads_equals_its_dense_twin_and_survives_saving(family, tiny, tmp_path):
    folder = low_rank_folder(tiny(family), tmp_path / "q")
    model = AutoModelForCausalLM.from_pretrained(folder.path)
    for name, spec in folder.specs.items():
        module = model.get_submodule(module_name(folder.architecture, name))
        assert isinstance(module, LowRankLinear) and module.spec == spec
    expected = logits(model)
    torch.testing.assert_close(expected, logits(compress.load(folder.twin)), rtol=1e-3, atol=1e-3)
    assert model.generate(IDS, max_new_tokens=3, do_sample=False).shape == (2, 27)
    model.save_pretrained(tmp_path / "one")
    compress.load(tmp_path / "one").save_pretrained(tmp_path / "two", max_shard_size="40KB")
    assert_same_tensors(stored_tensors(tmp_path / "one"), stored_tensors(tmp_path / "two"))
    assert torch.equal(logits(compress.load(tmp_path / "two")), expected)
    assert json.loads((tmp_path / "two" / "config.json").read_text())["transformers_weights"] == GUARD


def test_device_maps_reach_into_the_factors(tiny, tmp_path):
    folder = low_rank_folder(tiny("llama"), tmp_path / "q")
    expected = logits(compress.load(folder.path))
    assert torch.equal(logits(compress.load(folder.path, device_map="auto")), expected)
    spread = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    spread["model.layers"] = "disk"
    offloaded = AutoModelForCausalLM.from_pretrained(
        folder.path, device_map=spread, offload_folder=str(tmp_path / "disk")
    )
    torch.testing.assert_close(logits(offloaded), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_exported_dense_it_is_its_twin(family, dtype, tiny, tmp_path):
    folder = low_rank_folder(tiny(family), tmp_path / "q", dtype)
    compress.export(folder.path, "dense", tmp_path / "dense")
    assert_same_tensors(
        {n: t for n, t in stored_tensors(tmp_path / "dense").items() if n != "lm_head.weight" or family == "llama"},
        stored_tensors(folder.twin),
    )


def test_other_formats_say_that_they_cannot_hold_it(tiny, tmp_path):
    folder = low_rank_folder(tiny("llama"), tmp_path / "q")
    for format_ in ("gptq", "awq", "compressed-tensors"):
        with pytest.raises(CompressError, match=r"_proj: .* low_rank.*; formats that can hold this model: dense$"):
            compress.export(folder.path, format_, tmp_path / format_)


def test_sizes_are_those_of_the_factors(tiny, tmp_path):
    folder = low_rank_folder(tiny("llama_gqa_tied"), tmp_path / "q", torch.bfloat16)
    source = find_source(str(folder.path), None)
    sizes = Sizes(source)
    for name, spec in folder.specs.items():
        assert sizes.layers[name].nbytes == spec.nbytes("BF16")
        assert sizes.layers[name].weights == spec.in_features * spec.out_features
    model = compress.load(folder.path)
    unique = {id(p): p.nbytes for p in model.parameters()}
    assert sizes.in_memory() == sum(unique.values())
    assert sum(layer.nbytes for layer in sizes.layers.values()) < sizes.tensors
    listed = modules_in(source, folder.architecture, folder.specs, {})
    assert not any(name.endswith((".left", ".right")) for name in listed)
    both = next(n for n, s in folder.specs.items() if s.left is not None)
    assert listed[both].representation == (
        "low_rank rank=16 right=(quantized bits=4 group_size=16) left=(quantized bits=4 group_size=16)"
    )


@pytest.mark.parametrize("what", ["missing", "shape", "dtype", "rank", "leaf"])
def test_a_description_that_does_not_fit_its_tensors_is_refused(what, tiny, tmp_path):
    folder = low_rank_folder(tiny("llama"), tmp_path / "q")
    name = next(n for n, s in folder.specs.items() if s.right is None)
    tensors, config = stored_tensors(folder.path), json.loads((folder.path / "config.json").read_text())
    said = rf"{name}\.left\.weight"
    if what == "missing":
        del tensors[f"{name}.left.weight"]
    elif what == "shape":
        tensors[f"{name}.left.weight"] = tensors[f"{name}.left.weight"][:, :8].contiguous()
    elif what == "dtype":
        tensors[f"{name}.left.weight"] = tensors[f"{name}.left.weight"].int()
    else:
        for module in config["quantization_config"]["modules"]:
            module |= {"rank": 8} if what == "rank" else {"right": {"representation": "low_rank"}}
            for leaf in ("left", "right"):
                if what == "rank":
                    module.pop(leaf, None)
        said = r"right\.weight" if what == "rank" else "not how a factor can be stored"
    save_file(tensors, folder.path / f"{SHARD}.safetensors", metadata={"format": "pt"})
    (folder.path / OWN_INDEX).write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, f"{SHARD}.safetensors")})
    )
    (folder.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=said):
        compress.load(folder.path)


def test_stock_transformers_stops_with_a_sentence(tiny, tmp_path, stock):
    folder = low_rank_folder(tiny("llama"), tmp_path / "q")
    (answer,) = stock({"do": "load", "folder": folder.path, "class": "AutoModelForCausalLM"})
    assert "pip install compress-llm" in answer["error"]
