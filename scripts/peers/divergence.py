"""Mean KL divergence of the logits of compressed results to the original's, all by one scorer, in float32.

A result in the compressed-tensors format is loaded by transformers and dequantized; one in the GPTQ format is decoded
here (4 bits, no order of its own).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

BITS = 4
PER_WORD = 32 // BITS


def load_result(folder: Path, original: Path) -> Any:
    """A compressed result as a dense float32 model."""
    method = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]
    if method == "gptq":
        return load_gptq(folder, original)
    from transformers.utils.quantization_config import CompressedTensorsConfig

    dequantize = CompressedTensorsConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=dequantize).eval()


def load_gptq(folder: Path, original: Path) -> Any:
    """The original with every tensor that the result holds in its place, quantized ones decoded."""
    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32).eval()
    stored: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        stored |= load_file(file)
    state = {name: tensor for name, tensor in stored.items() if name in model.state_dict()}
    for name in [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]:
        parts = {p: stored[f"{name}.{p}"] for p in ("qweight", "qzeros", "scales", "g_idx")}
        state[f"{name}.weight"] = decode_gptq(**parts)
    assert state.keys() == model.state_dict().keys(), "the result lacks tensors of the model"
    model.load_state_dict(state)
    return model


def decode_gptq(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor) -> Tensor:
    """Weight [out, in] from the GPTQ v1 layout: words along `in`, zero points less one along `out`."""
    shifts = torch.arange(0, 32, BITS, dtype=torch.int32)
    codes = (qweight.unsqueeze(1) >> shifts[None, :, None]) & (2**BITS - 1)  # [in / 8, 8, out]
    zeros = (qzeros.unsqueeze(2) >> shifts) & (2**BITS - 1)  # [groups, out / 8, 8]
    zeros = zeros.flatten(1) + 1
    groups = g_idx.long()
    return ((codes.flatten(0, 1) - zeros[groups]) * scales[groups].float()).T.contiguous()


@torch.no_grad()
def mean_divergence(reference: Tensor, model: Any, rows: Tensor) -> float:
    """Mean over tokens of KL(reference || model); `reference` holds log-probabilities."""
    found = model(rows, use_cache=False).logits.double().log_softmax(-1)
    return float((reference.exp() * (reference - found)).sum(-1).mean())


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the original")
    parser.add_argument("--rows", type=Path, required=True, help="JSON: token ids by row")
    parser.add_argument("results", type=Path, nargs="+")
    options = parser.parse_args()
    rows = torch.tensor(json.loads(options.rows.read_text()))
    original = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    reference = original(rows, use_cache=False).logits.double().log_softmax(-1)
    found = {
        str(folder): mean_divergence(reference, load_result(folder, options.model), rows) for folder in options.results
    }
    print("KL " + json.dumps(found))


if __name__ == "__main__":
    main()
