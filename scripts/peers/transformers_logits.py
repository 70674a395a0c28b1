"""Logits of a folder under transformers, without compress-llm: dense and compressed-tensors folders, and where optimum and
gptqmodel are installed GPTQ and AWQ ones.

Run by scripts/bench_export.py. Writes a safetensors file with `logits` [rows, length, vocabulary] in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

PACKAGES = ("transformers", "compressed-tensors", "optimum", "gptqmodel", "torch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=Path, required=True, help="JSON: [{folder, rows, out, dtype, dequantize?}, …]")
    for job in json.loads(parser.parse_args().jobs.read_text()):
        try:
            answer = run(**job)
        except Exception as error:  # a folder that it refuses is an answer, not the end
            answer = {"error": f"{type(error).__name__}: {error}"}
        print("ANSWER " + json.dumps(answer), flush=True)
    assert "compress" not in sys.modules
    print("VERSIONS " + json.dumps({name: v for name in PACKAGES if (v := installed(name))}), flush=True)


def run(folder: str, rows: list[list[int]], out: str, dtype: str, dequantize: bool = False) -> dict[str, object]:
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **options).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(rows), use_cache=False).logits
    save_file({"logits": logits.float().contiguous()}, out)
    return {"kernels": sorted({type(m).__name__ for m in model.modules() if hasattr(m, "qweight")})}


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
