"""Write a Llama with random weights, of any shape and size, in little memory: tensors go to the disk piece by piece.

Weights are those that transformers initialises a Llama with: normal with standard deviation 0.02, norms 1. Each
tensor has a seed of its own, so it is the same in a deeper model or in other shards. The tokenizer is a byte-level BPE,
trained on the text that ships with the package.

    python scripts/random_llama.py OUT --hidden 512 --mlp 1408 --blocks 8 --heads 8 --kv-heads 4 --vocabulary 4096
    python scripts/random_llama.py OUT --hidden 2048 --mlp 5632 --blocks 70 --vocabulary 32000 --shard-mb 1000
"""

from __future__ import annotations

import argparse
import sys
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package beside this script, installed or not

from compress import shipped
from compress.checkpoint.writer import Stored, write_json, write_safetensors
from compress.modules.spec import DTYPE_BYTES

STD = 0.02  # LlamaConfig.initializer_range
PIECE = 2**22  # elements drawn at a time
DTYPES = {"bfloat16": ("BF16", torch.bfloat16), "float16": ("F16", torch.float16), "float32": ("F32", torch.float32)}


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes. The defaults are those of the benchmarks beside other tools."""

    hidden: int = 512
    mlp: int = 1408
    blocks: int = 8
    heads: int = 8
    kv_heads: int = 4
    vocabulary: int = 4096
    positions: int = 2048
    tied: bool = False

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all tensors, in the order of the model."""
        keys = self.hidden // self.heads * self.kv_heads
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for i in range(self.blocks):
            for name, shape in {
                "input_layernorm": (self.hidden,),
                "self_attn.q_proj": (self.hidden, self.hidden),
                "self_attn.k_proj": (keys, self.hidden),
                "self_attn.v_proj": (keys, self.hidden),
                "self_attn.o_proj": (self.hidden, self.hidden),
                "post_attention_layernorm": (self.hidden,),
                "mlp.gate_proj": (self.mlp, self.hidden),
                "mlp.up_proj": (self.mlp, self.hidden),
                "mlp.down_proj": (self.hidden, self.mlp),
            }.items():
                found[f"model.layers.{i}.{name}.weight"] = shape
        found["model.norm.weight"] = (self.hidden,)
        if not self.tied:
            found["lm_head.weight"] = (self.vocabulary, self.hidden)
        return found

    def config(self, dtype: str) -> dict[str, Any]:
        """config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.blocks,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden // self.heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.positions,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "initializer_range": STD,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": self.tied,
            "use_cache": True,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "dtype": dtype,
        }


def random_llama(
    folder: Path, shape: Shape, *, dtype: str = "bfloat16", shard_bytes: int | None = None, seed: int = 0
) -> Path:
    """Write the model and its tokenizer into `folder`.

    Args:
        dtype: of the tensors on disk.
        shard_bytes: about how large a file gets; None: one file, whatever its size.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stored = {name: _random(name, size, dtype, seed) for name, size in shape.tensors().items()}
    shards = list(_shards(stored, shard_bytes))
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", stored)
    else:
        files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        for file, shard in zip(files, shards, strict=True):
            write_safetensors(folder / file, shard)
        index = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        total = sum(tensor.nbytes for tensor in stored.values())
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})
    write_json(folder / "config.json", shape.config(dtype))
    _write_tokenizer(folder, shape)
    return folder


def _random(name: str, size: tuple[int, ...], dtype: str, seed: int) -> Stored:
    code, torch_dtype = DTYPES[dtype]

    def pieces() -> Iterable[Any]:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
        for start in range(0, prod(size), PIECE):
            n = min(PIECE, prod(size) - start)
            values = torch.ones(n) if len(size) == 1 else torch.randn(n, generator=generator).mul_(STD)
            yield values.to(torch_dtype).view(torch.uint8).numpy().data

    return Stored(code, size, pieces)


def _shards(stored: dict[str, Stored], shard_bytes: int | None) -> Iterator[dict[str, Stored]]:
    shard: dict[str, Stored] = {}
    for name, tensor in stored.items():
        if shard and shard_bytes and sum(t.nbytes for t in shard.values()) + tensor.nbytes > shard_bytes:
            yield shard
            shard = {}
        shard[name] = tensor
    yield shard


def _write_tokenizer(folder: Path, shape: Shape) -> None:
    """`<s>` is 0 and `</s>` 1. A vocabulary larger than the text has words for leaves rows without a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=shape.vocabulary,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(shipped.calibration_text_path())], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": shape.positions, **tokens}
    write_json(folder / "tokenizer_config.json", settings)


def add_shape_options(parser: argparse.ArgumentParser, shape: Shape) -> None:
    """One option for each size, with `shape` as defaults."""
    for field in ("hidden", "mlp", "blocks", "heads", "kv_heads", "vocabulary", "positions"):
        default = getattr(shape, field)
        parser.add_argument(f"--{field.replace('_', '-')}", type=int, default=default, help=f"[default: {default}]")


def shape_of(options: argparse.Namespace) -> Shape:
    """The shape that options of `add_shape_options` describe."""
    fields = ("hidden", "mlp", "blocks", "heads", "kv_heads", "vocabulary", "positions")
    return replace(Shape(), **{field: getattr(options, field) for field in fields})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder to write")
    add_shape_options(parser, Shape())
    parser.add_argument("--tied", action="store_true", help="the head shares the token table")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--shard-mb", type=int, help="size of a file in MB, about; by default one file")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    shape = replace(shape_of(options), tied=options.tied)
    shard_bytes = None if options.shard_mb is None else options.shard_mb * 10**6
    random_llama(options.out, shape, dtype=options.dtype, shard_bytes=shard_bytes, seed=options.seed)
    sizes = {name: prod(size) for name, size in shape.tensors().items()}
    nbytes = sum(sizes.values()) * DTYPE_BYTES[DTYPES[options.dtype][0]]
    print(f"{options.out}: {sum(sizes.values()) / 1e6:,.1f} M parameters, {nbytes / 1e6:,.1f} MB")


if __name__ == "__main__":
    main()
