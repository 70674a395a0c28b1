"""Logits and decoded weights of a GPTQ or AWQ folder under GPTQModel's own loader, in its own environment.

Run by scripts/bench_export.py and by the tests. Writes a safetensors file: `logits` [rows, length, vocabulary] in float32,
and `weight.NAME` [out, in] of every quantized module as GPTQModel decodes it, in the dtype that it loaded the model in.
"""

from __future__ import annotations

import argparse
import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # it refuses to start on two cores otherwise

import torch
from gptqmodel import BACKEND, GPTQModel
from safetensors.torch import save_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=Path, required=True, help="JSON: [{folder, rows, out, dtype, backend}, …]")
    jobs = json.loads(parser.parse_args().jobs.read_text())
    for job in jobs:
        try:
            answer = run(**job)
        except Exception as error:  # a folder that it refuses is an answer, not the end
            answer = {"error": f"{type(error).__name__}: {error}"}
        print("ANSWER " + json.dumps(answer), flush=True)
    print(
        "VERSIONS " + json.dumps({name: version(name) for name in ("gptqmodel", "transformers", "torch")}), flush=True
    )


def run(folder: str, rows: list[list[int]], out: str, dtype: str, backend: str) -> dict[str, object]:
    loaded = GPTQModel.load(folder, device="cpu", dtype=getattr(torch, dtype), backend=BACKEND[backend])
    model = loaded.model.eval()
    tensors: dict[str, torch.Tensor] = {}
    kernels = set()
    for name, module in model.named_modules():
        if hasattr(module, "qweight"):
            kernels.add(type(module).__name__)
            tensors[f"weight.{name}"] = decoded(module)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(rows), use_cache=False).logits
    save_file({**tensors, "logits": logits.float().contiguous()}, out)
    return {"kernels": sorted(kernels), "layers": len(tensors), "tied": bool(model.config.tie_word_embeddings)}


def decoded(module: Any) -> torch.Tensor:
    """The weight [out, in] as the module decodes it."""
    if hasattr(module, "dequantize_weight"):
        return module.dequantize_weight().T.contiguous()
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    weight = dequantize_gemm(module.qweight, module.qzeros, module.scales, module.bits, module.group_size)
    return weight.T.contiguous()


if __name__ == "__main__":
    main()
