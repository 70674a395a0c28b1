"""The families of models that can be compressed, as data: one table each. `families.py` lays them over a `config.json`.

A table says what the decoder's linears are called on disk, which of them share an input, and what feeds that input.
All names inside a table are relative: to the block for linears and norms, to the base model for the rest. Nothing here
needs torch or transformers; `skeleton.py` holds every table to the real modules.

A new family: a `Family` below, its line in `FAMILIES`, a tiny model in `tests/tiny_models.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

FULL, SLIDING = "full_attention", "sliding_attention"  # as config.json has them
Settings = Mapping[str, Any]  # config.json with the family's defaults under it, by the names that most families use


@dataclass(frozen=True)
class ExpertTable:
    """A mixture of experts as it is named on disk: `{block}.{name}.{e}.{gate|up|down}`; see `architecture.Experts`."""

    name: str
    gate: str
    up: str
    down: str
    router: str


@dataclass(frozen=True)
class Family:
    """How one family names and wires its decoder.

    `attn_rows` and `mlp_rows` name the linear whose output rows line up with the inputs of `attn_out` and `mlp_out` and
    take a positive scale; None where nothing does (fused weights, GELU in between). `defaults` repeat the defaults of
    the config class in transformers for the keys that are read here, since `config.json` may leave them out.
    """

    title: str
    defaults: Settings
    attn_in: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    attn_out: str = "self_attn.o_proj"
    mlp_in: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    mlp_out: str = "mlp.down_proj"
    attn_norm: str | None = "input_layernorm"  # the norm that only attn_in reads
    mlp_norm: str | None = "post_attention_layernorm"
    attn_rows: str | None = "self_attn.v_proj"
    mlp_rows: str | None = "mlp.up_proj"
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    norm_offset: float = 0.0
    base: str = "model"  # the base model's name inside the causal language model; may be missing on disk
    layers: str = "layers"
    embeddings: tuple[str, ...] = ("embed_tokens",)
    final_norm: str | None = "norm"
    head: str = "lm_head"
    transposed: bool = False
    experts: ExpertTable | None = None
    keys: Mapping[str, str] = field(default_factory=dict)  # usual key -> this family's key in config.json
    renamed: Mapping[str, str] = field(default_factory=dict)  # a part of a name on disk -> the same in the module tree
    refusals: Mapping[str, str] = field(default_factory=dict)  # a flag of config.json -> why it cannot be admitted
    adapt: Callable[[Family, Settings], Family] | None = None  # for settings that change the table
    layer_norm: bool = False  # norms of the stream are LayerNorm, else RMSNorm
    value_layout: Literal["apart", "fused", "by_head"] = (
        "apart"  # of queries, keys and values in the last linear of attn_in
    )
    one_width: bool = False  # its forward reshapes what leaves the last block to the width of the embeddings
    bound: str | None = None  # why its residual stream cannot be written down in another basis
    layer_types: Callable[[Settings, int], tuple[str, ...]] | None = None  # what config.json means where it has none


def _defaults(hidden: int, blocks: int, heads: int, vocab: int, positions: int, **others: Any) -> Settings:
    common: dict[str, Any] = {"head_dim": None}
    common |= {"hidden_size": hidden, "num_hidden_layers": blocks, "num_attention_heads": heads, "vocab_size": vocab}
    return {**common, "max_position_embeddings": positions, "tie_word_embeddings": False, **others}


def _adapt_opt(family: Family, settings: Settings) -> Family:
    if (
        settings["activation_function"] != "relu"
    ):  # relu(s x) = s relu(x) for s > 0; the other activations are not linear so
        family = replace(family, mlp_rows=None)
    if not settings["do_layer_norm_before"]:  # OPT-350m: the normed states are also the residual, so nothing folds
        return replace(family, attn_norm=None, mlp_norm=None, final_norm=None)
    if not settings["layer_norm_elementwise_affine"]:
        family = replace(family, attn_norm=None, mlp_norm=None)
    return replace(family, final_norm=None) if settings["_remove_final_layer_norm"] else family


def _every_nth_full(n: int, key: str | None = None) -> Callable[[Settings, int], tuple[str, ...]]:
    """Kinds of attention where every n-th block sees all tokens and the others a window; config.json may have n as `key`."""

    def kinds(config: Settings, n_blocks: int) -> tuple[str, ...]:
        every = (config.get(key) if key else None) or n
        return tuple(FULL if (i + 1) % every == 0 else SLIDING for i in range(n_blocks))

    return kinds


def _sliding_from(config: Settings, n_blocks: int) -> tuple[str, ...]:
    """Kinds of attention where blocks from `max_window_layers` on see a window, if windows are in use."""
    slides = config.get("use_sliding_window", False) and config.get("sliding_window", 4096) is not None
    first = config.get("max_window_layers", 28) if slides else n_blocks
    return tuple(SLIDING if i >= first else FULL for i in range(n_blocks))


_LLAMA = Family("Llama 2, 3", _defaults(4096, 32, 32, 32000, 2048, num_key_value_heads=None))
_QWEN3_NORMS = ("input_layernorm", "self_attn.q_norm", "self_attn.k_norm", "post_attention_layernorm")
_GEMMA2_NORMS = (
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
)  # fmt: skip
_GEMMA3_NORMS = ("input_layernorm", "self_attn.q_norm", "self_attn.k_norm", *_GEMMA2_NORMS[1:])
_POST_NORMS = (
    "its norms behind attention and MLP scale what is added to the residual stream entry by entry, which commutes with no "
    "rotation and no slicing"
)
_NOT_CAUSAL = "its attention looks both ways, so it is no language model to calibrate or score; use a causal checkpoint"

FAMILIES: dict[str, Family] = {  # model_type of config.json -> table
    "llama": _LLAMA,
    "mistral": replace(_LLAMA, title="Mistral", defaults=_defaults(4096, 32, 32, 32000, 131072, num_key_value_heads=8)),
    "qwen2": replace(
        _LLAMA,
        title="Qwen 2, 2.5",
        defaults=_defaults(4096, 32, 32, 151936, 32768, num_key_value_heads=32),
        layer_types=_sliding_from,
    ),
    "qwen3": replace(
        _LLAMA,
        title="Qwen 3",
        defaults=_defaults(4096, 32, 32, 151936, 32768, num_key_value_heads=32, head_dim=128),
        norms=_QWEN3_NORMS,
        layer_types=_sliding_from,
    ),
    "gemma": replace(
        _LLAMA,
        title="Gemma 1",
        defaults=_defaults(3072, 28, 16, 256000, 8192, num_key_value_heads=16, head_dim=256, tie_word_embeddings=True),
        norm_offset=1.0,
        refusals={"use_bidirectional_attention": _NOT_CAUSAL},
    ),
    "gemma2": replace(
        _LLAMA,
        title="Gemma 2",
        defaults=_defaults(2304, 26, 8, 256000, 8192, num_key_value_heads=4, head_dim=256, tie_word_embeddings=True),
        mlp_norm="pre_feedforward_layernorm",
        norms=_GEMMA2_NORMS,
        norm_offset=1.0,
        bound=_POST_NORMS,
        layer_types=_every_nth_full(2),
        refusals={"use_bidirectional_attention": _NOT_CAUSAL},
    ),
    "gemma3_text": replace(
        _LLAMA,
        title="Gemma 3 (text)",
        defaults=_defaults(2304, 26, 8, 262208, 131072, num_key_value_heads=4, head_dim=256, tie_word_embeddings=True),
        mlp_norm="pre_feedforward_layernorm",
        norms=_GEMMA3_NORMS,
        norm_offset=1.0,
        bound=_POST_NORMS,
        layer_types=_every_nth_full(6, "sliding_window_pattern"),
        refusals={"use_bidirectional_attention": _NOT_CAUSAL},
    ),
    "phi3": replace(
        _LLAMA,
        title="Phi-3, Phi-4",
        defaults=_defaults(3072, 32, 32, 32064, 4096, num_key_value_heads=None),
        attn_in=("self_attn.qkv_proj",),
        attn_rows=None,
        mlp_in=("mlp.gate_up_proj",),
        mlp_rows=None,
        value_layout="fused",
    ),
    "opt": Family(
        "OPT",
        {
            **_defaults(768, 12, 12, 50272, 2048, tie_word_embeddings=True),
            "activation_function": "relu",
            "do_layer_norm_before": True,
            "layer_norm_elementwise_affine": True,
            "_remove_final_layer_norm": False,
            "word_embed_proj_dim": None,
        },
        attn_out="self_attn.out_proj",
        attn_norm="self_attn_layer_norm",
        mlp_in=("fc1",),
        mlp_out="fc2",
        mlp_norm="final_layer_norm",
        mlp_rows="fc1",
        norms=("self_attn_layer_norm", "final_layer_norm"),
        layers="decoder.layers",
        embeddings=("decoder.embed_tokens", "decoder.embed_positions"),
        final_norm="decoder.final_layer_norm",
        adapt=_adapt_opt,
        layer_norm=True,
    ),
    "gpt2": Family(
        "GPT-2",
        _defaults(768, 12, 12, 50257, 1024, tie_word_embeddings=True),
        attn_in=("attn.c_attn",),
        attn_out="attn.c_proj",
        attn_norm="ln_1",
        attn_rows=None,
        mlp_in=("mlp.c_fc",),
        mlp_out="mlp.c_proj",
        mlp_norm="ln_2",
        mlp_rows=None,
        norms=("ln_1", "ln_2"),
        base="transformer",
        layers="h",
        embeddings=("wte", "wpe"),
        final_norm="ln_f",
        layer_norm=True,
        value_layout="fused",
        transposed=True,
        one_width=True,
        keys={
            "hidden_size": "n_embd",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions",
        },
        refusals={"add_cross_attention": "cross-attention reads an encoder; only decoder-only GPT-2 is supported"},
    ),
    "gpt_neox": Family(
        "GPT-NeoX, Pythia",
        _defaults(6144, 44, 64, 50432, 2048, use_parallel_residual=True),
        attn_in=("attention.query_key_value",),
        attn_out="attention.dense",
        attn_rows=None,
        mlp_in=("mlp.dense_h_to_4h",),
        mlp_out="mlp.dense_4h_to_h",
        mlp_rows=None,
        layer_norm=True,
        value_layout="by_head",
        base="gpt_neox",
        embeddings=("embed_in",),
        final_norm="final_layer_norm",
        head="embed_out",
        renamed={"embed_out": "lm_head"},
    ),
    "mixtral": replace(
        _LLAMA,
        title="Mixtral",
        defaults=_defaults(4096, 32, 32, 32000, 131072, num_key_value_heads=8, num_experts=8, num_experts_per_tok=2),
        experts=ExpertTable("block_sparse_moe.experts", "w1", "w3", "w2", "block_sparse_moe.gate"),
        keys={"num_experts": "num_local_experts"},
        renamed={"block_sparse_moe": "mlp"},
    ),
    "qwen3_moe": replace(
        _LLAMA,
        title="Qwen 3 MoE",
        defaults={
            **_defaults(2048, 24, 32, 151936, 32768, num_key_value_heads=4, num_experts=128, num_experts_per_tok=8),
            "decoder_sparse_step": 1,
            "mlp_only_layers": None,
        },
        norms=_QWEN3_NORMS,
        experts=ExpertTable("mlp.experts", "gate_proj", "up_proj", "down_proj", "mlp.gate"),
        keys={"num_experts": "num_local_experts"},
    ),
}

REFUSED = {  # model_type -> why, and what to do
    "gemma3": "is Gemma 3 wrapped together with a vision tower, and only its language model can be compressed. Save "
    "that alone (gemma3_text): m = Gemma3ForConditionalGeneration.from_pretrained(…); "
    "t = Gemma3ForCausalLM(m.config.text_config); t.model = m.model.language_model; t.tie_weights(); "
    "t.save_pretrained(…). Gemma3ForCausalLM.from_pretrained of the wrapper itself gives random weights",
}

# Buffers that old releases of transformers stored, and that models no longer have: causal masks and rotary tables.
IGNORED_SUFFIXES = (
    ".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias"
)  # fmt: skip
