"""How fast a sliced Llama runs beside the dense one: prefill, and decode with a KV cache.

    python scripts/bench_slice_speed.py                                   # CPU, float32, a few blocks of width 2048
    python scripts/bench_slice_speed.py --device cuda --dtype bfloat16 --hidden 4096 --mlp 11008 --blocks 16 --length 2048

Random weights: the arithmetic is that of a real model. The three models take turns; the fastest of all rounds counts. On CPU
the time is CPU seconds of all threads, which others on the machine disturb less. "FLOP ratio" is the dense model's products
over the sliced one's, attention included: how much faster it could be. Fails if prefill reaches less than GOAL of it.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from measure import commit, machine
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from compress.methods.slicegpt import SliceGPTConfig
from compress.models.families import architecture_of
from compress.models.restructure import restructure
from compress.models.structure import Structure

GOAL = 0.85  # of the FLOP ratio
STEPS = 16  # tokens of decode


@dataclass(frozen=True)
class Llama:
    """One model and how long it takes."""

    name: str
    model: Any
    n_numbers: int

    @torch.inference_mode()
    def prefill(self, ids: Tensor) -> DynamicCache:
        cache = DynamicCache(config=self.model.config)
        self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    @torch.inference_mode()
    def decode(self, cache: DynamicCache, token: Tensor) -> None:
        for _ in range(STEPS):
            token = self.model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)


def build(asked: argparse.Namespace, sparsity: float) -> Llama:
    """A Llama of random weights, cut as `slicegpt` would cut it."""
    config = LlamaConfig(
        hidden_size=asked.hidden, intermediate_size=asked.mlp, num_hidden_layers=asked.blocks, vocab_size=asked.vocabulary,
        num_attention_heads=asked.hidden // 128, num_key_value_heads=asked.kv_heads or asked.hidden // 128,
        max_position_embeddings=2 * asked.length, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(getattr(torch, asked.dtype)).eval().requires_grad_(False)
    if sparsity:
        architecture = architecture_of(config.to_dict())
        step = SliceGPTConfig().round_to
        width = int((1 - sparsity) * asked.hidden) // step * step
        restructure(model, replace(architecture, structure=Structure(rms=True, width=width, last_width=asked.hidden)))
    rotary = type(model.model.rotary_emb)(config)
    model = model.to_empty(device=asked.device)
    model.model.rotary_emb = rotary.to(asked.device)
    generator = torch.Generator(asked.device).manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(0, 0.02, generator=generator)
    return Llama(f"{sparsity:.0%}" if sparsity else "dense", model, sum(p.numel() for p in model.parameters()))


def flops(llama: Llama, asked: argparse.Namespace) -> float:
    """Of one row's prefill: matrices of the blocks, and attention's two products, causal."""
    matrices = sum(p.numel() for p in llama.model.model.layers.parameters() if p.ndim == 2)
    attention = asked.blocks * 2 * asked.length * asked.hidden / 2
    return 2 * asked.length * (matrices + attention)


def seconds(asked: argparse.Namespace) -> float:
    if asked.device != "cpu":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--mlp", type=int, default=5632)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=None, help="[default: as many as heads]")
    parser.add_argument("--vocabulary", type=int, default=4096, help="of which prefill computes one row's logits")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="more than there are free cores spin, which counts")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.25, 0.3])
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    where = machine() if asked.device == "cpu" else torch.cuda.get_device_name()
    print(f"{where}, {asked.threads} threads, torch {torch.__version__}, commit {commit()}")
    models = [build(asked, sparsity) for sparsity in (0.0, *asked.sparsities)]
    ids = torch.randint(asked.vocabulary, (asked.batch, asked.length), device=asked.device)
    best = {model.name: [float("inf")] * 2 for model in models}
    for number in range(asked.rounds + 1):
        for model in models:
            start = seconds(asked)
            cache = model.prefill(ids)
            middle = seconds(asked)
            model.decode(cache, ids[:, :1])
            end = seconds(asked)
            del cache
            if number:  # the first warms up
                best[model.name] = [
                    min(a, b) for a, b in zip(best[model.name], (middle - start, end - middle), strict=True)
                ]
    dense = models[0]
    print("| model | numbers | FLOP ratio | prefill | faster | of the FLOP ratio | decode, per token | faster |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    reached = True
    for model in models:
        (prefill, decode), base = best[model.name], best[dense.name]
        ratio, faster = flops(dense, asked) / flops(model, asked), base[0] / prefill
        reached = reached and (model is dense or faster >= GOAL * ratio)
        print(
            f"| {model.name} | {model.n_numbers / dense.n_numbers:.1%} | {ratio:.3f} | {prefill * 1e3:.1f} ms | {faster:.3f} | "
            f"{faster / ratio:.1%} | {decode / STEPS * 1e3:.2f} ms | {base[1] / decode:.3f} |"
        )
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
