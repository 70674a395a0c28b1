"""Tiny random models of every family, saved as transformers saves them, so that the names on disk are the real ones.

Norm weights and biases are random too, so that a mistake with one of them changes the logits. Each folder gets a
byte-level tokenizer; nothing is fetched.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

VOCABULARY = 288  # 256 bytes, three special tokens, and rows that no text reaches, as in real models
BOS, EOS, PAD = 256, 257, 258

_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
_OPT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "ffn_dim": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "word_embed_proj_dim": 64,
}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 64, "n_inner": 128, "n_layer": 3, "n_head": 4, "n_positions": 256}
_NEOX = {k: v for k, v in _SHAPE.items() if k not in ("num_key_value_heads", "head_dim")}
_SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_TIED = {**_SHAPE, "tie_word_embeddings": True}

# name -> (model_type, what its config says). The names of families, and variants that stress one thing.
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**_SHAPE, "num_key_value_heads": 4}),
    "llama_gqa_tied": ("llama", {**_TIED, "attention_bias": True}),
    "mistral": ("mistral", {**_SHAPE, "sliding_window": 8}),
    "qwen2": ("qwen2", {**_TIED, "use_sliding_window": True, **_SLIDING}),
    "qwen3": ("qwen3", {**_SHAPE, "head_dim": 32}),
    "gemma": ("gemma", _TIED),
    "gemma2": ("gemma2", {**_TIED, **_SLIDING, "query_pre_attn_scalar": 16}),
    "gemma3_text": ("gemma3_text", {**_TIED, **_SLIDING, "query_pre_attn_scalar": 16}),
    "phi3": ("phi3", {k: v for k, v in _SHAPE.items() if k != "head_dim"}),
    "opt": ("opt", _OPT),
    "opt_post_norm": ("opt", {**_OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 32}),  # as OPT-350m
    "gpt2": ("gpt2", _GPT2),
    "gpt2_no_prefix": ("gpt2", _GPT2),  # as the original GPT-2: `h.0.…`, with its causal masks stored
    "gpt_neox": ("gpt_neox", _NEOX),
    "gpt_neox_serial": ("gpt_neox", {**_NEOX, "use_parallel_residual": False}),
    "mixtral": ("mixtral", {**_SHAPE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "qwen3_moe",
        {
            **_SHAPE,
            "moe_intermediate_size": 64,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mlp_only_layers": [0],
            "norm_topk_prob": True,
        },
    ),
}


def tiny_config(family: str, **overrides: Any) -> Any:
    """The config of a tiny model: one of `TINY`, with single fields changed."""
    from transformers import AutoConfig

    model_type, fields = TINY[family]
    tokens = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    return AutoConfig.for_model(model_type, **{**fields, **tokens, **overrides})


def tiny_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A random model of the family, whole and in memory."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(tiny_config(family, **overrides), dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():  # tied tensors come once
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            values /= 1 if "embed" in name or "wte" in name or "wpe" in name else math.sqrt(parameter.shape[-1])
        else:
            values *= 0.2
            if name.endswith("norm.weight") or (".ln_" in name and name.endswith("weight")):
                values += 0 if "gemma" in family else 1  # Gemma scales by 1 + weight
        parameter.data.copy_(values)
    return model.to(dtype)


def save_tiny(
    family: str,
    folder: str | Path,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tokenizer: bool = True,
    max_shard_size: str = "5GB",
    **overrides: Any,
) -> Path:
    """Write a random model of the family, and a byte-level tokenizer, as a folder that `from_pretrained` reads."""
    folder = Path(folder)
    model = tiny_model(family, seed, dtype, **overrides)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if family == "gpt2_no_prefix":
        _strip_prefix(folder / "model.safetensors", model.config.n_layer, model.config.n_positions)
    if tokenizer:
        byte_tokenizer().save_pretrained(folder)
    return folder


def byte_tokenizer() -> Any:
    """A tokenizer with one token for each byte, and `<s>`, `</s>`, `<pad>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=256
    )


def tensor_names(folder: str | Path) -> list[str]:
    """The names of the tensors in a folder, from its index or its one file."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return sorted(json.loads(index.read_text())["weight_map"])
    return sorted(load_file(folder / "model.safetensors"))


def _strip_prefix(file: Path, n_blocks: int, n_positions: int) -> None:
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    mask = torch.ones(n_positions, n_positions).tril()[None, None]
    masks = {f"h.{i}.attn.bias": mask.clone() for i in range(n_blocks)}
    save_file({**tensors, **masks}, file, metadata={"format": "pt"})
