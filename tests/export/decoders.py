"""Slow decoders of the export formats, written from their description and sharing no code with the package.

Weights come out as float64 [out, in]; with scales of 11 bits and codes of 8 every product is exact there.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file


def decoded(folder: Path) -> dict[str, np.ndarray]:
    """The quantized weights of a folder by name on disk."""
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    tensors = {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}
    end = {"gptq": "qweight", "awq": "qweight", "compressed-tensors": "weight_packed"}[quantization["quant_method"]]
    read = {"gptq": gptq, "awq": awq, "compressed-tensors": compressed_tensors}[quantization["quant_method"]]
    found = {}
    for key in tensors:
        name, _, suffix = key.rpartition(".")
        if suffix == end:
            module = {k.rpartition(".")[2]: t for k, t in tensors.items() if k.rpartition(".")[0] == name}
            found[name] = read(name, module, quantization)
    return found


def words(tensor: torch.Tensor) -> np.ndarray:
    return tensor.numpy().astype(np.int64) & 0xFFFFFFFF


def floats(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy()


def gptq(name: str, module: dict[str, torch.Tensor], quantization: dict) -> np.ndarray:
    settings = {key: quantization[key] for key in ("bits", "group_size")}
    for rule, override in quantization.get("dynamic", {}).items():
        if re.match(rule[2:], name):
            assert rule.startswith("+:"), f"{name} is quantized and left out"
            settings.update(override)
            break
    bits = settings["bits"]
    qweight, qzeros = words(module["qweight"]), words(module["qzeros"])
    codes = np.stack([unpacked(column, bits) for column in qweight.T], axis=1)  # [in, out]
    zeros = np.stack([unpacked(row, bits) for row in qzeros])  # [groups, out]
    if quantization["checkpoint_format"] == "gptq":
        zeros = zeros + 1
    g_idx = module["g_idx"].numpy()
    size = settings["group_size"] if settings["group_size"] != -1 else len(g_idx)
    assert module["g_idx"].dtype == torch.int32
    assert module["scales"].dtype == torch.float16
    assert np.array_equal(g_idx, np.arange(len(g_idx)) // size)
    return ((codes - zeros[g_idx]) * floats(module["scales"])[g_idx]).T


def unpacked(row: np.ndarray, bits: int) -> np.ndarray:
    """The codes in a run of 32-bit words: whole ones in each word, but of 3 bits 32 in three words, two of them split."""
    if bits != 3:
        return np.array([(int(word) >> shift) & (2**bits - 1) for word in row for shift in range(0, 32, bits)])
    codes = []
    for a, b, c in row.reshape(-1, 3):
        codes += [(int(a) >> shift) & 7 for shift in range(0, 30, 3)]
        codes.append((int(a) >> 30) | ((int(b) & 1) << 2))
        codes += [(int(b) >> shift) & 7 for shift in range(1, 31, 3)]
        codes.append((int(b) >> 31) | ((int(c) & 3) << 1))
        codes += [(int(c) >> shift) & 7 for shift in range(2, 32, 3)]
    return np.array(codes)


def awq(name: str, module: dict[str, torch.Tensor], quantization: dict) -> np.ndarray:
    assert name not in (quantization["modules_to_not_convert"] or [])
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # nibble k of a word holds this column

    def columns(tensor: torch.Tensor) -> np.ndarray:
        packed = words(tensor)
        out = np.empty((packed.shape[0], packed.shape[1] * 8), dtype=np.int64)
        for k, column in enumerate(order):
            out[:, column::8] = (packed >> (4 * k)) & 15
        return out

    codes, zeros, scales = columns(module["qweight"]), columns(module["qzeros"]), floats(module["scales"])
    size = codes.shape[0] // scales.shape[0]
    assert quantization["group_size"] in (size, -1)
    assert module["scales"].dtype == torch.float16
    return ((codes - zeros.repeat(size, axis=0)) * scales.repeat(size, axis=0)).T


def compressed_tensors(name: str, module: dict[str, torch.Tensor], quantization: dict) -> np.ndarray:
    """By the one group of the config: the formats of these tests have no other."""
    (group,) = quantization["config_groups"].values()
    bits, (out, n) = group["weights"]["num_bits"], module["weight_shape"].tolist()

    def stream(row: np.ndarray, count: int) -> np.ndarray:
        digits = np.unpackbits(row.astype("<u4").view(np.uint8), bitorder="little")[: count * bits]
        return digits.reshape(count, bits).astype(np.int64) @ (1 << np.arange(bits))

    codes = np.stack([stream(row, n) for row in words(module["weight_packed"])])  # [out, in]
    scales = floats(module["weight_scale"])
    zeros = np.full(scales.shape, 2 ** (bits - 1))
    if "weight_zero_point" in module:
        zeros = np.stack([stream(row, out) for row in words(module["weight_zero_point"]).T], axis=1)
    size = n // scales.shape[1]
    return (codes - zeros.repeat(size, axis=1)) * scales.repeat(size, axis=1)
