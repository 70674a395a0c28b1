"""The skeleton, family by family: the table fits the real model, and streaming gives the whole model's logits."""

import json
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from compress.errors import CheckpointError
from compress.models.families import architecture_of, is_ignored
from compress.models.skeleton import Skeleton
from tests.tiny_models import TINY, save_tiny, tensor_names, tiny_config

TOKENS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1))  # longer than the sliding windows
MIXTURES = ("mixtral", "qwen3_moe")


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    made = {}

    def folder(family):
        if family not in made:
            made[family] = save_tiny(family, tmp_path_factory.mktemp(family), tokenizer=False)
        return made[family]

    return folder


def skeleton_of(folder, dtype=torch.float32):
    arch = architecture_of(json.loads((folder / "config.json").read_text()), tensor_names(folder))
    return Skeleton(AutoConfig.from_pretrained(folder), arch, dtype)


def real_tensors(module):
    """Names of parameters and stored buffers that hold memory."""
    return [name for name, tensor in module.state_dict(keep_vars=True).items() if tensor.device.type != "meta"]


@torch.no_grad()
def streamed_logits(skeleton, tensors, tokens):
    """Fill, run and empty each block in turn, with the arguments that it gets in a pass of the whole model."""
    for name in skeleton.outside_tensors():
        skeleton.fill(name, tensors[name])
    calls = []
    for block in skeleton.blocks:
        block.forward = lambda hidden, *args, **kwargs: calls.append((hidden, args, kwargs)) or hidden
    skeleton.model(tokens, use_cache=False)
    hidden = calls[0][0]
    for i, block in enumerate(skeleton.blocks):
        del block.forward
        for name in skeleton.block_tensors(i):
            skeleton.fill(name, tensors[name])
        hidden = block(hidden, *calls[i][1], **calls[i][2])
        assert isinstance(hidden, torch.Tensor)
        skeleton.empty_block(i)
        assert real_tensors(block) == []
        block.forward = lambda states, *args, **kwargs: states
    skeleton.blocks[-1].forward = lambda states, *args, **kwargs: hidden
    return skeleton.model(tokens, use_cache=False).logits


@pytest.mark.parametrize("family", TINY)
def test_streaming_gives_the_logits_of_the_whole_model(folder_of, family):
    folder = folder_of(family)
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = whole(TOKENS, use_cache=False).logits
    streamed = streamed_logits(skeleton_of(folder), load_file(folder / "model.safetensors"), TOKENS)
    assert expected.std() > 0.1
    if family in MIXTURES:  # their fused experts multiply in other shapes than ours
        torch.testing.assert_close(streamed, expected, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(streamed, expected)


@pytest.mark.parametrize("family", [name for name in TINY if name not in MIXTURES])
def test_streaming_in_bfloat16(folder_of, family):
    folder = folder_of(family)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        expected = whole(TOKENS, use_cache=False).logits
    skeleton = skeleton_of(folder, torch.bfloat16)  # `fill` casts the float32 on disk
    assert torch.equal(streamed_logits(skeleton, load_file(folder / "model.safetensors"), TOKENS), expected)


@pytest.mark.parametrize("family", TINY)
def test_the_names_are_those_on_disk(folder_of, family):
    folder = folder_of(family)
    skeleton = skeleton_of(folder)
    names = list(skeleton.outside_tensors())
    for i in range(skeleton.architecture.n_blocks):
        names += skeleton.block_tensors(i)
    assert sorted(names) == [name for name in tensor_names(folder) if not is_ignored(name)]


@pytest.mark.parametrize("family", TINY)
def test_every_linear_of_a_block_is_in_a_site_and_every_norm_in_the_table(folder_of, family):
    skeleton = skeleton_of(folder_of(family))
    arch = skeleton.architecture
    for block, sites, norms in zip(skeleton.blocks, arch.block_sites, arch.block_norms, strict=True):
        in_sites = {id(skeleton.module(name)) for site in sites for name in site.linears}
        assert in_sites == {id(m) for m in block.modules() if type(m).__name__ in ("Linear", "Conv1D")}
        assert {id(skeleton.module(n)) for n in norms} == {
            id(m) for m in block.modules() if type(m).__name__.endswith("Norm")
        }
        for site in sites:
            if site.producer and site.producer.kind == "rows":
                rows = skeleton.module(site.producer.name).weight.shape[0]
                assert rows == skeleton.module(site.linears[0]).weight.shape[1]


def test_nothing_is_real_but_what_no_file_holds(folder_of):
    skeleton = skeleton_of(folder_of("gemma3_text"))
    assert real_tensors(skeleton.model) == []
    assert all(b.device.type == "cpu" for b in skeleton.model.buffers())
    assert not skeleton.model.training
    assert not any(p.requires_grad for p in skeleton.model.parameters())


def test_replaced_modules_are_listed_and_filled_and_leave_with_the_block(folder_of):
    skeleton = skeleton_of(folder_of("llama"))
    name = "model.layers.1.mlp.up_proj"
    before = set(skeleton.block_tensors(1))
    original, other = skeleton.module(name), nn.Linear(64, 128, bias=True)
    skeleton.replace(name, other)
    assert skeleton.module(name) is other
    assert set(skeleton.block_tensors(1)) == before | {f"{name}.bias"}
    skeleton.fill(f"{name}.bias", torch.arange(128.0))
    assert torch.equal(other.bias, torch.arange(128.0))
    skeleton.empty_block(1)
    assert skeleton.module(name) is original
    assert set(skeleton.block_tensors(1)) == before
    assert real_tensors(skeleton.blocks[1]) == []


def test_a_whole_expert_or_its_container_may_be_replaced(folder_of):
    skeleton = skeleton_of(folder_of("mixtral"))
    name = "model.layers.0.block_sparse_moe.experts.3.w2"
    other = nn.Linear(128, 64, bias=False)
    skeleton.replace(name, other)
    assert skeleton.blocks[0].mlp.experts[3].w2 is other


def test_a_tied_head_follows_its_embedding_until_it_is_replaced(folder_of):
    skeleton = skeleton_of(folder_of("llama_gqa_tied"))
    assert "lm_head.weight" not in skeleton.outside_tensors()
    table = torch.randn(288, 64)
    skeleton.fill("model.embed_tokens.weight", table)
    head, embedding = skeleton.module("lm_head"), skeleton.module("model.embed_tokens")
    assert head.weight.data_ptr() == embedding.weight.data_ptr()
    skeleton.replace("lm_head", nn.Linear(64, 288, bias=False))
    assert "lm_head.weight" in skeleton.outside_tensors()


def test_what_is_outside_the_blocks_can_be_emptied(folder_of):
    folder = folder_of("opt_post_norm")
    skeleton, tensors = skeleton_of(folder), load_file(folder / "model.safetensors")
    for name in skeleton.outside_tensors():
        skeleton.fill(name, tensors[name])
    original = skeleton.module("lm_head")
    skeleton.replace("lm_head", nn.Linear(32, 288, bias=False))
    skeleton.empty_outside()
    assert skeleton.module("lm_head") is original
    assert real_tensors(skeleton.model) == []


def both_stored_and_different(tensors):
    return {**tensors, "lm_head.weight": torch.randn(288, 64)}


def without_prefix(tensors):
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("family", "change", "says"),
    [
        ("llama_gqa_tied", both_stored_and_different, {}),  # config.json ties them, transformers then does not
        ("opt", without_prefix, {}),  # as the original OPT
        ("mistral", dict, {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}),  # is Ministral
    ],
)
def test_oddities_of_checkpoints(tmp_path, family, change, says):
    folder = save_tiny(family, tmp_path, tokenizer=False)
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **says}))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder).eval()(TOKENS, use_cache=False).logits
    assert torch.equal(streamed_logits(skeleton_of(folder), tensors, TOKENS), expected)


def test_wrong_tensors_are_refused_by_name(folder_of):
    skeleton = skeleton_of(folder_of("llama"))
    with pytest.raises(CheckpointError, match=r"input_layernorm.weight: shape \[65\] on disk, \[64\]"):
        skeleton.fill("model.layers.0.input_layernorm.weight", torch.ones(65))
    with pytest.raises(
        CheckpointError, match=r"o_proj.bias: model.layers.0.self_attn.o_proj is a Linear and has no bias"
    ):
        skeleton.fill("model.layers.0.self_attn.o_proj.bias", torch.ones(64))
    with pytest.raises(CheckpointError, match=r"model.layers.7.mlp: LlamaForCausalLM has no module"):
        skeleton.fill("model.layers.7.mlp.weight", torch.ones(64))
    with pytest.raises(CheckpointError, match=r"torch.int32 on disk where the model has torch.float32"):
        skeleton.fill("model.layers.0.input_layernorm.weight", torch.ones(64, dtype=torch.int32))


def test_a_table_that_misses_a_linear_is_an_error(monkeypatch):
    from dataclasses import replace

    config = tiny_config("llama")
    arch = architecture_of(config.to_dict())
    no_k = tuple(replace(s, linears=s.linears[:1] + s.linears[2:]) if s.kind == "attn_in" else s for s in arch.sites(1))
    broken = replace(arch, block_sites=(arch.sites(0), no_k, arch.sites(2)))
    with pytest.raises(
        CheckpointError, match=r"model.layers.1.self_attn.k_proj.weight is a matrix that no site knows of"
    ):
        Skeleton(config, broken, torch.float32)
    with pytest.raises(CheckpointError, match="3 blocks were built where the table has 2"):
        Skeleton(config, replace(arch, blocks=arch.blocks[:2], block_sites=arch.block_sites[:2]), torch.float32)


def test_a_compressed_source_gives_the_plain_skeleton():
    config = tiny_config("llama")
    config.quantization_config = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    skeleton = Skeleton(config, architecture_of(config.to_dict()), torch.float32)
    assert type(skeleton.module("model.layers.0.mlp.up_proj")) is nn.Linear
    assert config.quantization_config["format"] == "pack-quantized"  # ours was a copy


def test_96_blocks_take_less_than_a_second():
    from transformers import LlamaConfig

    config = LlamaConfig(num_hidden_layers=96)
    Skeleton(tiny_config("llama"), architecture_of(tiny_config("llama").to_dict()), torch.bfloat16)  # imports the class
    start = time.process_time()
    Skeleton(config, architecture_of(config.to_dict()), torch.bfloat16)
    assert time.process_time() - start < 1  # 0.08 to 0.3 s seen
