"""Learned rounding by auto-round, in its own environment. Run by scripts/bench_quality.py. Writes a dense checkpoint."""

from __future__ import annotations

import argparse
import json
import resource
import time
from importlib.metadata import version
from pathlib import Path

import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer

ROWS_AT_ONCE = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=Path, required=True, help="JSON: token ids by row, of one length")
    parser.add_argument("--out", required=True)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--extended", action="store_true", help="its extension for few bits (enable_alg_ext)")
    parser.add_argument("--amp", action="store_true", help="products in bfloat16, its default")
    options = parser.parse_args()
    rows = torch.tensor(json.loads(options.rows.read_text()))
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tool = AutoRound(
        model,
        tokenizer,
        bits=options.bits,
        group_size=options.group_size,
        sym=True,
        iters=options.iterations,
        nsamples=len(rows),
        seqlen=rows.shape[1],
        batch_size=8,
        dataset=[{"input_ids": part} for part in rows.split(ROWS_AT_ONCE)],
        amp=options.amp,  # without: float32, a little better, and slower
        enable_torch_compile=False,
        device_map="cpu",
        **({"enable_alg_ext": True} if options.extended else {}),
    )
    begun = time.process_time()
    found = tool.quantize()
    quantized = found[0] if isinstance(found, tuple) else found
    cpu = time.process_time() - begun
    quantized.to(torch.float32).save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    print("SETTINGS " + json.dumps({
        "version": version("auto-round"), "transformers": version("transformers"), "torch": torch.__version__,
        "iterations": options.iterations, "extended": options.extended, "amp": options.amp, "batch_size": 8,
        "quantize_cpu_s": round(cpu, 1),
        "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
