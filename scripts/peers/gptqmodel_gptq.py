"""GPTQ by GPTQModel, in its own environment. Run by scripts/bench_peers_gptq.py and scripts/bench_quality.py."""

from __future__ import annotations

import argparse
import json
import os
from importlib.metadata import version
from pathlib import Path

import torch

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # it takes half of the cores, and does not start with one worker
from gptqmodel import GPTQModel, QuantizeConfig
from transformers import AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=Path, required=True, help="JSON: token ids by row")
    parser.add_argument("--out", required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--damping", type=float)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    rows = json.loads(options.rows.read_text())
    settings = QuantizeConfig(
        bits=options.bits, group_size=options.group_size, sym=True, device="cpu",
        **({} if options.damping is None else {"damp_percent": options.damping}),
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    dtype = {} if options.dtype == "auto" else {"dtype": getattr(torch, options.dtype)}
    model = GPTQModel.load(options.model, settings, **dtype)
    calibration = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
    model.quantize(calibration, batch_size=options.batch_size, tokenizer=tokenizer)
    model.save(options.out)
    print("SETTINGS " + json.dumps({
        "version": version("gptqmodel"), "transformers": version("transformers"), "torch": torch.__version__,
        "model dtype": options.dtype, "damping": settings.damp_percent, "desc_act": settings.desc_act,
        "act_group_aware": settings.act_group_aware, "batch_size": options.batch_size,
        "offload_to_disk": settings.offload_to_disk,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
