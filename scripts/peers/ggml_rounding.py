"""K-quants of llama.cpp, by ggml's own code through ctypes. Run by scripts/bench_quality.py. Writes a dense checkpoint.

    g++ -shared -o libggml-quants.so -Wl,--whole-archive libggml-base.a -Wl,--no-whole-archive -lpthread -lm

makes the library from a static build of ggml (position-independent code). What llama.cpp does where a row is no multiple of
256 is done here: the fallback types of its quantize tool. `--rows`: an importance matrix is made of them, the mean squares of
each layer's inputs, as llama-imatrix does.
"""

from __future__ import annotations

import argparse
import ctypes
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TYPES = {"q4_0": 2, "q5_0": 6, "q8_0": 8, "q2_K": 10, "q3_K": 11, "q4_K": 12, "q5_K": 13, "iq4_nl": 20}  # ggml.h
BITS = {"q4_0": 4.5, "q5_0": 5.5, "q8_0": 8.5, "q2_K": 2.625, "q3_K": 3.4375, "q4_K": 4.5, "q5_K": 5.5, "iq4_nl": 4.5}
FALLBACK = {"q2_K": "iq4_nl", "q3_K": "iq4_nl", "q4_K": "q5_0", "q5_K": "q8_0"}  # rows that 256 does not divide
SUPER_BLOCK = 256


class Traits(ctypes.Structure):
    """ggml_type_traits, as far as it is read."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    ]


def rounded(library: ctypes.CDLL, kind: str, weight: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    """`weight` [out, in] float32 as ggml stores it in `kind`."""
    out_features, in_features = weight.shape
    traits: Traits = library.ggml_get_type_traits(TYPES[kind]).contents
    stored = ctypes.create_string_buffer(weight.numel() // traits.blck_size * traits.type_size)
    source = weight.contiguous()
    pointer = None if importance is None else ctypes.c_void_p(importance.contiguous().data_ptr())
    library.ggml_quantize_chunk(
        TYPES[kind], ctypes.c_void_p(source.data_ptr()), stored, 0, out_features, in_features, pointer
    )
    found = torch.empty_like(source)
    traits.to_float(ctypes.cast(stored, ctypes.c_void_p), ctypes.c_void_p(found.data_ptr()), weight.numel())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", required=True, help="libggml-quants.so, made as above")
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=Path, help="JSON: token ids by row")
    parser.add_argument("--out", required=True)
    parser.add_argument("--kind", choices=sorted(TYPES), required=True)
    options = parser.parse_args()
    library = ctypes.CDLL(options.library)
    library.ggml_get_type_traits.restype = ctypes.POINTER(Traits)
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p,
    ]  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    linears = {n: m for n, m in model.model.layers.named_modules() if isinstance(m, torch.nn.Linear)}
    squares = {name: torch.zeros(module.in_features) for name, module in linears.items()}
    if options.rows:

        def watch(name: str):  # type: ignore[no-untyped-def]
            def see(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
                squares[name] += args[0].flatten(0, 1).square().sum(0)

            return see

        hooks = [module.register_forward_pre_hook(watch(name)) for name, module in linears.items()]
        with torch.no_grad():
            for part in torch.tensor(json.loads(options.rows.read_text())).split(16):
                model(part, use_cache=False)
        for hook in hooks:
            hook.remove()
    bits, weights = 0.0, 0
    for name, module in linears.items():
        kind = options.kind
        if module.in_features % SUPER_BLOCK and kind in FALLBACK:
            kind = FALLBACK[kind]
        with torch.no_grad():
            importance = squares[name] if options.rows else None
            module.weight.copy_(rounded(library, kind, module.weight, importance))
        bits, weights = bits + BITS[kind] * module.weight.numel(), weights + module.weight.numel()
    model.save_pretrained(options.out)
    AutoTokenizer.from_pretrained(options.model).save_pretrained(options.out)
    print(
        "SETTINGS " + json.dumps({"kind": options.kind, "bits_per_weight": bits / weights, "rows": bool(options.rows)})
    )


if __name__ == "__main__":
    main()
