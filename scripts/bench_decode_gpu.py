"""Decoding of a whole model on a GPU through CUDA graphs: tokens per second at 4 bits beside bfloat16.

    python scripts/bench_decode_gpu.py [--model 8b|1b|tiny] [--ways bf16 w4 …] [--device cuda|cpu] [--json FILE]

A random Llama of the model's shapes is made on the device, way by way (as in bench_decode.py: `w4` are integers of 4 bits in
groups of 128, symmetric, the head in 8 bits). It reads a prompt, then decodes greedily; one token is one CUDA graph, whose
state (token, position, keys and values) stays on the GPU. Attention covers all places of the cache in both ways, masked.
Times are medians of single replays by CUDA events. `x bf16` is wanted to be 2.5 at 4 bits on 8b. The tokens must be those
that the same steps choose without a graph.

On a CPU (`--device cpu`) the steps run one by one without graphs: the same arithmetic, for a trial of this script.
COMPRESS_CUDA_KERNELS=1 uses the kernels on a GPU where they were never checked; scripts/gpu_check.sh sets it and calls this.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench_decode import MODELS, built, sizes
from measure import commit
from torch import Tensor

SHAPES: dict[str, dict[str, int]] = {
    **MODELS,
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 256,
    },
}  # fmt: skip
WANTED = 2.5  # times bf16, of 4 bits on 8b
WARM = 3  # steps before one is captured: kernels are loaded, workspaces exist


class Steps:
    """Greedy decoding, a token a call, without a word to the host: what a CUDA graph can replay."""

    def __init__(self, model: Any, prompt: Tensor, capacity: int):
        """`prompt` [1, tokens] is read; `capacity`: tokens that the cache holds in all."""
        from transformers import StaticCache

        self.model, device, n = model, prompt.device, prompt.shape[1]
        self.cache = StaticCache(config=model.config, max_cache_len=capacity)
        self.places = torch.arange(capacity, device=device)
        self.position = torch.tensor([[n]], device=device)
        self.made = torch.zeros(1, capacity + 1, dtype=torch.long, device=device)
        logits = model(prompt, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        self.token = logits[:, -1].float().argmax(-1, keepdim=True)
        self.made[:, n] = self.token

    def __call__(self) -> None:
        seen = (self.places <= self.position).view(1, 1, 1, -1)
        out = self.model(
            input_ids=self.token, position_ids=self.position, attention_mask=seen, past_key_values=self.cache,
            use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        self.token.copy_(out.logits[:, -1].float().argmax(-1, keepdim=True))
        self.position.add_(1)
        self.made.index_copy_(1, self.position[0], self.token)


def captured(steps: Steps) -> Callable[[], None]:
    """A call that replays one step; some steps are done on the way."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM):
            steps()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        steps()
    return graph.replay


def seconds_of(call: Callable[[], None], on_gpu: bool) -> float:
    if not on_gpu:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start_event, end_event = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start_event.record()
    call()
    end_event.record()
    end_event.synchronize()
    return float(start_event.elapsed_time(end_event)) / 1e3


def measured(config: Any, way: str, device: torch.device, n_prompt: int, n_new: int) -> dict[str, Any]:
    """The figures of one way."""
    from compress.runtime.attention import folding
    from compress.runtime.prepare import arithmetic

    on_gpu = device.type == "cuda"
    torch.manual_seed(0)
    with torch.device(device), torch.inference_mode():
        model = built(config, way)
        weight_bytes, read_bytes = sizes(model)
        prompt = torch.randint(config.vocab_size, (1, n_prompt), generator=torch.Generator(device).manual_seed(1))
        with folding(model):
            plain = Steps(model, prompt, n_prompt + n_new)
            eager = [seconds_of(plain, on_gpu) for _ in range(n_new)]
            times, agree = eager, None
            if on_gpu:
                steps = Steps(model, prompt, n_prompt + n_new)
                replay = captured(steps)
                times = [seconds_of(replay, True) for _ in range(n_new - WARM)]
                agree = torch.equal(steps.made, plain.made)
    rate = 1 / median(times)
    return {
        "way": way, "tokens_per_s": rate, "tokens_per_s_without_graph": 1 / median(eager), "graph": on_gpu,
        "same_tokens_as_without": agree, "weight_bytes": weight_bytes, "read_bytes": read_bytes,
        "gb_per_s": rate * read_bytes / 1e9, "tokens": plain.made[0, n_prompt:].tolist(), **arithmetic(model),
    }  # fmt: skip


def table(cells: list[dict[str, Any]]) -> list[str]:
    """One line per way."""
    dense = next((c["tokens_per_s"] for c in cells if c["way"] == "bf16"), None)
    lines = [f"{'way':12} {'tokens/s':>9} {'no graph':>9} {'x bf16':>7} {'GB/s':>7} {'weights, MB':>12}  kernels"]
    for c in cells:
        times = f"{c['tokens_per_s'] / dense:7.2f}" if dense else "      -"
        lines.append(
            f"{c['way']:12} {c['tokens_per_s']:9.1f} {c['tokens_per_s_without_graph']:9.1f} {times} {c['gb_per_s']:7.0f} "
            f"{c['weight_bytes'] / 1e6:12,.0f}  {c['kernels']}"
        )
    return lines


def verdict(model: str, cells: list[dict[str, Any]]) -> str:
    """The goal, met or by how much it is missed; what makes the figures worthless."""
    wrong = [c["way"] for c in cells if c["same_tokens_as_without"] is False]
    if wrong:
        return f"failed: {', '.join(wrong)}: the graph chooses other tokens than the steps without it"
    rates = {c["way"]: c["tokens_per_s"] for c in cells if c["graph"]}
    if model != "8b" or not {"w4", "bf16"} <= rates.keys():
        return "the goal is for w4 beside bf16, model 8b, on a GPU: not looked at"
    ratio = rates["w4"] / rates["bf16"]
    return f"{'met' if ratio >= WANTED else 'missed'}: w4 decodes {ratio:.2f} x bf16, {WANTED} wanted"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SHAPES), default="8b")
    parser.add_argument("--ways", nargs="+", default=["bf16", "w4"], help="of bench_decode.py [default: bf16 w4]")
    parser.add_argument("--device", default="cuda", help="[default: cuda]")
    parser.add_argument("--prompt", type=int, default=128, help="tokens [default: 128]")
    parser.add_argument("--new", type=int, default=64, help="tokens [default: 64]")
    parser.add_argument("--json", type=Path, default=Path("out/bench_decode_gpu.json"))
    given = parser.parse_args()
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("bench_decode_gpu: torch sees no NVIDIA GPU; --device cpu tries the script", file=sys.stderr)
        return 2
    if given.new <= WARM:
        parser.error(f"--new {given.new}: more than {WARM} tokens are needed")
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        "llama", **SHAPES[given.model], max_position_embeddings=given.prompt + given.new, tie_word_embeddings=False
    )
    cells = []
    for way in given.ways:
        cells.append(measured(config, way, device, given.prompt, given.new))
        gc.collect()  # one model at a time is there
        if device.type == "cuda":
            torch.cuda.empty_cache()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    said = verdict(given.model, cells)
    print(f"{name}, {given.model}, {given.prompt} tokens of prompt, {given.new} new")
    print("\n".join([*table(cells), said]))
    report = {"device": name, "model": given.model, "commit": commit(), "prompt": given.prompt, "new": given.new}
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps({**report, "ways": cells, "verdict": said}, indent=1) + "\n", encoding="utf-8")
    print(given.json)
    return 1 if said.startswith("failed") else 0


if __name__ == "__main__":
    raise SystemExit(main())
