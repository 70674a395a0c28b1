"""What scripts/bench_peers.py times: one linear layer, in several copies of its weight that take turns, by each library.

A contender says how many bytes one copy has (scales included) and what its activations are inside the product: 8 (quantized
to int8 within what is timed), 16 or 32 bits. `beside` names ours of the same kind.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from native_peers import HUGE, TYPES, Driver
from torch import Tensor
from torch.nn import functional

ROWS = 64  # different rows of the weight; they repeat, since preparing more would take longer than timing
GROUP = 128
TORCH = ("torch fp32", "torch bf16", "torch int4pack", "torch int8pack", "torch quantize_dynamic")


@dataclass(frozen=True)
class Case:
    """y [tokens, out] = x [tokens, in] W^T on a number of threads."""

    out: int
    in_features: int
    tokens: int
    threads: int


@dataclass
class Contender:
    """`run(copy)` is what is timed; `output(copy)` runs it and gives y in float32."""

    name: str
    beside: str
    activations: int
    nbytes: int
    copies: int
    run: Callable[[int], object]
    output: Callable[[int], Tensor]
    close: Callable[[], None] = field(default=lambda: None)


class Data:
    """Weight and activations of a case; `rotate`: bytes that the copies of a weight have together at least; `only`: patterns of
    the names of peers that are wanted."""

    def __init__(self, case: Case, rotate: int, only: Sequence[str] = ("*",)):
        generator = torch.Generator().manual_seed(0)
        self.case, self.rotate, self.only = case, rotate, only
        self.rows = torch.randn(ROWS, case.in_features, generator=generator) / case.in_features**0.5
        self.x = torch.randn(case.tokens, case.in_features, generator=generator)
        self.weight = self.rows.repeat(case.out // ROWS, 1)  # [out, in]

    def wanted(self, name: str) -> bool:
        return any(fnmatch.fnmatch(name, pattern) for pattern in self.only)

    def copies(self, nbytes: int) -> int:
        return max(2, -(-self.rotate // nbytes))

    def codes(self, bits: int) -> tuple[Tensor, Tensor]:
        """Round to nearest in groups: int32 codes [out, in] with the zero at 2^(bits-1), float32 scales [out, groups]."""
        grouped = self.rows.unflatten(1, (-1, GROUP))
        if bits == 2:
            scale = grouped.std(-1, keepdim=True)
        else:
            scale = grouped.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
        codes = (grouped / scale).round().add(2 ** (bits - 1)).clamp(0, 2**bits - 1).int()
        repeats = (self.case.out // ROWS, 1)
        return codes.flatten(1).repeat(repeats), scale.squeeze(-1).repeat(repeats)


def torch_peers(data: Data) -> Iterator[Contender]:
    """What torch has: dense products, and its three products with packed integer weights."""
    if not any(data.wanted(name) for name in TORCH):
        return
    case, x = data.case, data.x
    half = x.bfloat16()
    out, n = case.out, case.in_features

    def dense(name: str, beside: str, weight: Tensor, x: Tensor) -> Contender:
        copies = data.copies(weight.nbytes)
        weights = [weight.clone() for _ in range(copies)]
        bits = weight.element_size() * 8

        def run(copy: int) -> Tensor:
            return functional.linear(x, weights[copy])

        return Contender(name, beside, bits, weight.nbytes, copies, run, lambda copy: run(copy).float())

    yield dense("torch fp32", "compress W4A8", data.weight, x)
    yield dense("torch bf16", "compress W4A16", data.weight.bfloat16(), half)

    codes, scale = data.codes(4)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
    scales = (
        torch.stack([scale.T, torch.zeros_like(scale.T)], -1).bfloat16().contiguous()
    )  # [groups, out, 2], zero in the middle
    nbytes = packed.nbytes + scales.nbytes
    pairs = [(packed.clone(), scales.clone()) for _ in range(data.copies(nbytes))]

    def int4pack(copy: int) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(half, pairs[copy][0], GROUP, pairs[copy][1])

    yield Contender(
        "torch int4pack", "compress W4A16", 16, nbytes, len(pairs), int4pack, lambda copy: int4pack(copy).float()
    )

    per_row = data.weight.abs().amax(1) / 127
    eight = (data.weight / per_row[:, None]).round().to(torch.int8)
    per_row = per_row.bfloat16()
    weights = [eight.clone() for _ in range(data.copies(eight.nbytes))]

    def int8pack(copy: int) -> Tensor:
        return torch.ops.aten._weight_int8pack_mm(half, weights[copy], per_row)

    yield Contender(
        "torch int8pack", "compress W8A16", 16, eight.nbytes + per_row.nbytes, len(weights), int8pack,
        lambda copy: int8pack(copy).float(),
    )  # fmt: skip

    layer = torch.nn.Linear(n, out, bias=False)
    layer.weight.data = data.weight
    dynamic = [
        torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(layer), {torch.nn.Linear}, dtype=torch.qint8)
        for _ in range(data.copies(eight.nbytes))
    ]
    yield Contender(
        "torch quantize_dynamic", "compress W8A8", 8, eight.nbytes, len(dynamic), lambda copy: dynamic[copy](x),
        lambda copy: dynamic[copy](x),
    )  # fmt: skip


def native_peers(data: Data, peer: str, library: Path) -> Iterator[Contender]:
    """ggml or ik_llama.cpp, each type on the pages it gets by itself and on pages of 2M."""
    driver, case = Driver(library), data.case
    rows, x = data.rows.numpy(), data.x.numpy()
    for name, (bits, repack) in TYPES[peer].items():
        for huge in (False, True):
            called, kind = f"{peer} {name}{HUGE if huge else ''}", name.split()[0]
            if not data.wanted(called):
                continue
            handle = driver.open(kind, rows, case.out, case.tokens, 1, case.threads, repack, huge)
            if handle is None:
                continue
            nbytes = driver.nbytes(handle)
            driver.close(handle)
            copies = data.copies(nbytes)
            handle = driver.open(kind, rows, case.out, case.tokens, copies, case.threads, repack, huge)
            assert handle is not None
            driver.set_input(handle, x)

            def output(copy: int, handle: int = handle) -> Tensor:
                driver.run(handle, copy)
                return torch.from_numpy(driver.output(handle, copy, case.tokens, case.out))

            yield Contender(
                called, f"compress W{bits}A8" if bits < 16 else "compress W4A16",
                8 if bits < 16 else 16, nbytes, copies,
                partial(driver.run, handle), output, partial(driver.close, handle),
            )  # fmt: skip


def onnxruntime_peers(data: Data) -> Iterator[Contender]:
    """MatMulNBits with 4 bits in blocks of 32 and of 128, activations in int8 (accuracy level 4)."""
    import onnx  # type: ignore[import-not-found]
    import onnxruntime  # type: ignore[import-not-found]
    from onnx import TensorProto, helper, numpy_helper

    case = data.case
    for block in (32, 128):
        called = f"onnxruntime MatMulNBits g{block}"
        if not data.wanted(called):
            continue
        grouped = data.rows.unflatten(1, (-1, block))
        scale = grouped.abs().amax(-1, keepdim=True) / 7
        codes = (grouped / scale).round().add(8).clamp(0, 15).byte().repeat(case.out // ROWS, 1, 1).numpy()
        packed = codes[..., 0::2] | codes[..., 1::2] << 4  # [out, blocks, block / 2]
        scales = scale.squeeze(-1).repeat(case.out // ROWS, 1).flatten().numpy()
        node = helper.make_node(
            "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", K=case.in_features, N=case.out, bits=4,
            block_size=block, accuracy_level=4,
        )  # fmt: skip
        graph = helper.make_graph(
            [node], "one", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, case.in_features])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, case.out])],
            [numpy_helper.from_array(packed, "w"), numpy_helper.from_array(scales, "s")],
        )  # fmt: skip
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
        onnx.checker.check_model(model, check_custom_domain=False)
        content, nbytes = model.SerializeToString(), packed.nbytes + scales.nbytes
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = case.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry(
            "session.force_spinning_stop", "1"
        )  # many sessions: those that ran must not spin
        sessions = [onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])
                    for _ in range(data.copies(nbytes))]  # fmt: skip
        feed = {"x": data.x.numpy()}

        def run(copy: int, sessions: list[Any] = sessions, feed: dict[str, np.ndarray] = feed) -> np.ndarray:
            found: np.ndarray = sessions[copy].run(None, feed)[0]
            return found

        yield Contender(
            called, "compress W4A8", 8, nbytes, len(sessions), run,
            lambda copy, run=run: torch.from_numpy(run(copy)),  # type: ignore[misc]
        )  # fmt: skip


def openvino_peers(data: Data) -> Iterator[Contender]:
    """4 bits in groups of 128, decompressed inside the product; activations in int8, OpenVINO's default on CPU."""
    import openvino  # type: ignore[import-not-found]
    from openvino import opset13 as ops

    called = "openvino u4 g128"
    if not data.wanted(called):
        return
    case, core = data.case, openvino.Core()
    codes, scale = data.codes(4)
    shape = [case.out, case.in_features // GROUP, GROUP]
    flat = codes.byte().numpy().reshape(-1)
    packed = flat[0::2] | flat[1::2] << 4
    halves = scale.half().numpy()
    nbytes = packed.nbytes + halves.nbytes
    settings = {
        "INFERENCE_NUM_THREADS": case.threads,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
    }
    x = data.x.numpy()
    requests = []
    for _ in range(data.copies(nbytes)):
        given = ops.parameter([-1, case.in_features], openvino.Type.f32)
        weight = ops.constant(openvino.Tensor(packed, openvino.Shape(shape), openvino.Type.u4))
        middle = ops.constant(np.array(8, np.float16).reshape(1, 1, 1))
        steps = ops.subtract(ops.convert(weight, "f16"), middle)
        dense = ops.reshape(ops.multiply(steps, ops.constant(halves[..., None])), [case.out, case.in_features], False)
        product = ops.matmul(given, ops.convert(dense, "f32"), False, True)
        request = core.compile_model(openvino.Model([product], [given]), "CPU", settings).create_infer_request()
        request.set_input_tensor(openvino.Tensor(x, shared_memory=True))
        requests.append(request)

    def output(copy: int, kept: object = (packed, x)) -> Tensor:  # their memory is used, not copied
        requests[copy].infer()
        return torch.from_numpy(requests[copy].get_output_tensor().data.copy())

    yield Contender(called, "compress W4A8", 8, nbytes, len(requests), lambda copy: requests[copy].infer(), output)


def ours(data: Data, kinds: set[str]) -> Iterator[Contender]:
    """Our kernels, of the kinds asked for: "compress W4A8" and the like. Activations come as float32, as bfloat16 for A16."""
    from compress.kernels.packed import packed_linear, prepare
    from compress.kernels.packing import pack

    for kind in sorted(kinds):
        bits, activations = (int(part) for part in kind.removeprefix("compress W").split("A"))
        codes, scale = data.codes(bits)
        words, scale = pack(codes, bits), scale.half()
        first = prepare(words, scale, None, bits, GROUP, data.case.in_features)
        weights = [first] + [
            prepare(words, scale, None, bits, GROUP, data.case.in_features)
            for _ in range(data.copies(first.nbytes) - 1)
        ]
        x = data.x if activations == 8 else data.x.bfloat16()

        def run(copy: int, x: Tensor = x, weights: list[Any] = weights, activations: int = activations) -> Tensor:
            return packed_linear(x, weights[copy], activations=activations)

        yield Contender(
            kind, kind, activations, first.nbytes, len(weights), run,
            lambda copy, run=run: run(copy).float(),  # type: ignore[misc]
        )  # fmt: skip
