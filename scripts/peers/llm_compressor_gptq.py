"""GPTQ by llm-compressor, in its own environment. Run by scripts/bench_peers_gptq.py and scripts/bench_quality.py."""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=Path, required=True, help="JSON: token ids by row")
    parser.add_argument("--out", required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument(
        "--dense", action="store_true", help="write the rounded weights as they are, in no format of theirs"
    )
    parser.add_argument("--damping", type=float)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    rows = json.loads(options.rows.read_text())
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    weights = {"num_bits": options.bits, "type": "int", "symmetric": True, "strategy": "group",
               "group_size": options.group_size}  # fmt: skip
    modifier = GPTQModifier(
        config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"],
        **({} if options.damping is None else {"dampening_frac": options.damping}),
    )  # fmt: skip
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}),
        recipe=modifier,
        max_seq_length=max(map(len, rows)),
        num_calibration_samples=len(rows),
        shuffle_calibration_samples=False,
        batch_size=options.batch_size,
    )
    if options.dense:
        plain = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype)
        rounded = {name: tensor for name, tensor in model.state_dict().items() if name in plain.state_dict()}
        plain.load_state_dict(rounded)
        plain.save_pretrained(options.out)
    else:
        model.save_pretrained(options.out, save_compressed=True)
    tokenizer.save_pretrained(options.out)
    print("SETTINGS " + json.dumps({
        "version": version("llmcompressor"), "transformers": version("transformers"), "torch": torch.__version__,
        "model dtype": options.dtype, "damping": modifier.dampening_frac, "order": "static (its default)",
        "block_size": modifier.block_size, "batch_size": options.batch_size,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
