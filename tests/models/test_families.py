"""The tables, without torch: what `architecture_of` says of a config, and what it refuses."""

import json
import subprocess
import sys

import pytest
import torch

from compress.errors import CheckpointError, RecipeError
from compress.models.families import architecture_of, disk_name, is_ignored, known_families, module_name
from compress.models.tables import FAMILIES
from tests.tiny_models import TINY, tensor_names, tiny_config

LLAMA = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 288}


def test_reading_a_table_imports_neither_torch_nor_transformers():
    code = (
        "import sys; from compress.models.families import architecture_of; architecture_of({'model_type': 'llama'}); "
        "print([m for m in ('torch', 'transformers', 'pydantic') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_every_table_has_a_tiny_model():
    assert {model_type for model_type, _ in TINY.values()} == set(FAMILIES) == set(known_families())


@pytest.mark.parametrize("model_type", FAMILIES)
def test_defaults_are_those_of_the_config_class(model_type):
    from transformers import CONFIG_MAPPING

    defaults = CONFIG_MAPPING[model_type].__dataclass_fields__
    for key, value in FAMILIES[model_type].defaults.items():
        names = (key, FAMILIES[model_type].keys.get(key, key))
        theirs = [defaults[name].default for name in names if name in defaults]
        assert value in theirs or (value is None and not theirs), key  # None: derived from other settings


@pytest.mark.parametrize("family", TINY)
def test_names_lead_to_modules_and_back(family):
    arch = architecture_of(tiny_config(family).to_dict())
    names = [*arch.embeddings, *arch.blocks, *(n for norms in arch.block_norms for n in norms)]
    names += [name for site in arch.all_sites() for name in site.linears]
    names += [arch.final_norm] if arch.final_norm else []
    assert [disk_name(arch, module_name(arch, name)) for name in names] == names


@pytest.mark.parametrize("family", TINY)
def test_sites_and_their_linears_have_unique_names(family):
    arch = architecture_of(tiny_config(family).to_dict())
    sites = arch.all_sites()
    linears = [name for site in sites for name in site.linears]
    assert len({site.name for site in sites}) == len(sites)
    assert len(set(linears)) == len(linears)


def test_sites_of_a_llama_in_data_order():
    (q, o, gate, down) = architecture_of({**LLAMA, "num_key_value_heads": 4}).sites(1)
    block = "model.layers.1"
    assert [(s.name, s.kind) for s in (q, o, gate, down)] == [
        (f"{block}.attn_in", "attn_in"),
        (f"{block}.attn_out", "attn_out"),
        (f"{block}.mlp_in", "mlp_in"),
        (f"{block}.mlp_out", "mlp_out"),
    ]
    assert q.linears == tuple(f"{block}.self_attn.{x}_proj" for x in "qkv")
    assert (q.producer.name, q.producer.kind) == (f"{block}.input_layernorm", "norm")
    assert (o.producer.name, o.producer.kind) == (f"{block}.self_attn.v_proj", "rows")
    assert (gate.producer.name, gate.producer.kind) == (f"{block}.post_attention_layernorm", "norm")
    assert (down.producer.name, down.producer.kind) == (f"{block}.mlp.up_proj", "rows")


@pytest.mark.parametrize(
    ("family", "kind", "producer"),
    [
        ("llama_gqa_tied", "attn_out", None),  # v is repeated over heads
        ("phi3", "attn_in", "input_layernorm"),
        ("phi3", "attn_out", None),  # v is inside qkv_proj
        ("phi3", "mlp_out", None),
        ("gpt2", "mlp_in", "ln_2"),
        ("gpt2", "mlp_out", None),  # GELU in between
        ("gpt_neox", "mlp_in", "post_attention_layernorm"),
        ("gemma2", "mlp_in", "pre_feedforward_layernorm"),
        ("opt", "attn_out", "self_attn.v_proj"),
        ("opt", "mlp_out", "fc1"),  # relu(s x) = s relu(x)
        ("opt_post_norm", "attn_in", None),  # the norm's output is the residual too
        ("opt_post_norm", "mlp_in", None),
        ("mixtral", "expert_in", None),  # the norm feeds the router and every expert
        ("mixtral", "expert_out", "block_sparse_moe.experts.0.w3"),
    ],
)
def test_producers(family, kind, producer):
    arch = architecture_of(tiny_config(family).to_dict())
    site = next(s for s in arch.sites(0) if s.kind == kind)
    assert (site.producer and site.producer.name) == (producer and f"{arch.blocks[0]}.{producer}")


def test_experts_come_after_attention_in_ascending_order():
    sites = architecture_of(tiny_config("mixtral").to_dict()).sites(2)
    assert [(s.kind, s.expert) for s in sites[:2]] == [("attn_in", None), ("attn_out", None)]
    assert [(s.kind, s.expert) for s in sites[2:]] == [(k, e) for e in range(4) for k in ("expert_in", "expert_out")]
    moe = "model.layers.2.block_sparse_moe.experts"
    assert sites[4].linears == (f"{moe}.1.w1", f"{moe}.1.w3")
    assert sites[5].linears == (f"{moe}.1.w2",)


def test_a_mixture_may_have_dense_blocks():
    config = tiny_config("qwen3_moe", num_hidden_layers=6, mlp_only_layers=[1], decoder_sparse_step=2).to_dict()
    arch = architecture_of(config)
    sparse = [any(s.expert is not None for s in arch.sites(i)) for i in range(6)]
    assert sparse == [False, False, False, True, False, True]
    assert architecture_of({**config, "mlp_only_layers": [1, 3, 5]}).experts is None


def test_the_prefix_is_read_off_the_names():
    config = tiny_config("gpt2", num_hidden_layers=1).to_dict()
    assert architecture_of(config).blocks == ("transformer.h.0",)
    assert architecture_of(config, ["transformer.h.0.ln_1.weight", "transformer.wte.weight"]).blocks == (
        "transformer.h.0",
    )
    arch = architecture_of(config, ["h.0.ln_1.weight", "wte.weight", "wpe.weight", "ln_f.weight"])
    assert (arch.blocks, arch.embeddings, arch.final_norm) == (("h.0",), ("wte", "wpe"), "ln_f")
    assert module_name(arch, "h.0.attn.c_attn") == "transformer.h.0.attn.c_attn"
    assert module_name(arch, "lm_head") == "lm_head"
    names = ["decoder.layers.0.fc1.weight", "decoder.embed_tokens.weight"]
    opt = architecture_of(tiny_config("opt", num_hidden_layers=1).to_dict(), names)
    assert module_name(opt, opt.sites(0)[2].linears[0]) == "model.decoder.layers.0.fc1"


@pytest.mark.parametrize(
    ("says", "stored", "tied"),
    [
        ({}, False, True),  # Gemma's default
        ({"tie_word_embeddings": False}, True, False),
        ({}, True, False),  # transformers does not tie two tensors that are both stored and differ
    ],
)
def test_tied(says, stored, tied):
    config = {**LLAMA, "model_type": "gemma", "num_hidden_layers": 1, **says}
    names = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", *["lm_head.weight"] * stored]
    assert architecture_of(config, names).tied is tied


def test_unknown_family_names_the_nearest_and_the_known():
    with pytest.raises(RecipeError, match=r"'qwen4' .*nearest known is 'qwen3'.*known: gemma, .*qwen3_moe"):
        architecture_of({**LLAMA, "model_type": "qwen4"})


def test_the_remedy_for_wrapped_gemma_works(tmp_path):
    from transformers import Gemma3Config, Gemma3ForCausalLM, Gemma3ForConditionalGeneration

    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=TINY["gemma3_text"][1], vision_config=vision, mm_tokens_per_image=4)
    m = Gemma3ForConditionalGeneration(config)
    t = Gemma3ForCausalLM(m.config.text_config)
    t.model = m.model.language_model
    t.tie_weights()
    t.save_pretrained(tmp_path)
    assert architecture_of(json.loads((tmp_path / "config.json").read_text()), tensor_names(tmp_path)).tied
    again = Gemma3ForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.lm_head.weight, m.lm_head.weight)
    assert torch.equal(again.model.layers[2].mlp.up_proj.weight, m.model.language_model.layers[2].mlp.up_proj.weight)


def test_refusals_give_reason_and_remedy():
    with pytest.raises(RecipeError, match=r"'gemma3' .*vision tower.*gemma3_text"):
        architecture_of({**LLAMA, "model_type": "gemma3"})
    with pytest.raises(RecipeError, match=r"gpt2 with add_cross_attention=True .*decoder-only"):
        architecture_of({"model_type": "gpt2", "add_cross_attention": True})


@pytest.mark.parametrize(
    ("says", "message"),
    [
        ({"hidden_size": "64"}, "hidden_size='64'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"num_hidden_layers": 10**9}, r"model.layers.1: config.json has num_hidden_layers=1000000000"),
        ({"model_type": "mixtral", "num_local_experts": 10**9}, "num_experts=1000000000"),
        ({"model_type": "qwen3_moe", "decoder_sparse_step": 0}, "decoder_sparse_step=0"),
    ],
)
def test_a_config_that_cannot_be_is_refused_at_once(says, message):
    names = ["model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"]
    with pytest.raises(CheckpointError, match=message):
        architecture_of({**LLAMA, "num_hidden_layers": 1, **says}, names)


def test_a_missing_embedding_is_refused():
    with pytest.raises(
        CheckpointError, match=r"model.embed_tokens: .*not stored"
    ):  # transformers would take the head's
        architecture_of({**LLAMA, "num_hidden_layers": 1}, ["model.layers.0.mlp.up_proj.weight", "lm_head.weight"])


def test_leftovers_of_old_releases():
    assert is_ignored("h.0.attn.bias")
    assert is_ignored("model.layers.3.self_attn.rotary_emb.inv_freq")
    assert not is_ignored("h.0.attn.c_attn.bias")
    assert not is_ignored("gpt_neox.layers.0.attention.dense.bias")
