"""Half-quadratic quantization by hqq, in its own environment. Run by scripts/bench_quality.py. Writes a dense checkpoint."""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=Path, help="not used: it takes no data")
    parser.add_argument("--out", required=True)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, default=64)
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    config = BaseQuantizeConfig(nbits=options.bits, group_size=options.group_size, axis=1)
    for name, linear in model.model.layers.named_modules():
        if isinstance(linear, torch.nn.Linear):
            whole = torch.nn.Linear(linear.in_features, linear.out_features, bias=False)
            whole.weight.data.copy_(linear.weight.data)
            quantized = HQQLinear(whole, config, compute_dtype=torch.float32, device="cpu", initialize=True)
            linear.weight.data.copy_(quantized.dequantize())
            assert torch.isfinite(linear.weight).all(), name
    model.save_pretrained(options.out)
    AutoTokenizer.from_pretrained(options.model).save_pretrained(options.out)
    print("SETTINGS " + json.dumps({"version": version("hqq"), "torch": torch.__version__, "axis": 1}))


if __name__ == "__main__":
    main()
