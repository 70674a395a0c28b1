"""Every operation of the CUDA kernels against its reference, on fresh random data: what `scripts/gpu_check.py` runs on a GPU.

It knows a device and a library only, so the tests run it on the CPU with the emulated library. Every output buffer is poisoned
with NaN by torch before a kernel writes it, and every result is computed twice: it must come out bit for bit the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from compress.kernels.cuda import gpus
from compress.kernels.cuda.hadamard import transform
from compress.kernels.cuda.layout import pack_weight
from compress.kernels.cuda.linear import LowRank, dequantize, linear
from compress.kernels.packing import dequantize as reference_dequantize
from compress.linalg.hadamard import transformed

# Relative Frobenius error: rounding the output to 16 bits, and sums of exact products in float32. The path that dequantises
# rounds the weight too, and the library may sum in 16 bits what it splits.
BOUNDS = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


@dataclass(frozen=True)
class Case:
    """One call. `op`: linear, low_rank, dequantize or hadamard; of the last, n_in is the width and `bits` the block."""

    op: str
    n_out: int
    n_in: int
    bits: int
    group: int
    symmetric: bool
    dtype: torch.dtype
    tokens: int
    path: gpus.Path | None
    splits: int | None = None

    def __str__(self) -> str:
        kind = "symmetric" if self.symmetric else "asymmetric"
        way = "" if self.path is None else f" {self.path}" + (f"/{self.splits}" if self.splits else "")
        if self.op == "hadamard":
            return f"hadamard {self.tokens}x{self.n_in} blocks of {self.bits} {self.dtype}"
        return f"{self.op}{way} {self.tokens}x({self.n_out},{self.n_in}) w{self.bits} g{self.group} {kind} {self.dtype}"


@dataclass(frozen=True)
class Outcome:
    """Of a case: the relative error, what is allowed, whether two runs agree bit for bit, or what was raised."""

    case: str
    error: float
    bound: float
    repeats: bool
    raised: str = ""

    @property
    def passed(self) -> bool:
        return not self.raised and self.repeats and self.error <= self.bound  # a NaN fails

    def to_dict(self) -> dict[str, object]:
        return {**asdict(self), "passed": self.passed}


def cases(small: bool) -> Iterator[Case]:
    """All widths, groups, kinds and dtypes, every path, numbers of tokens around every edge; `small`: shapes for sanitizers."""
    shapes = [(65, 192), (128, 512)] if small else [(65, 192), (1000, 1024), (4096, 4096), (130, 14336)]
    tokens = {"decode": (1, 7, 8, 9, 16), "tensor": (17, 32, 33, 64, 65), "dequantize": (128,)}
    turn = 0
    for bits in (2, 3, 4, 8):
        for dtype in (torch.float16, torch.bfloat16):
            for symmetric in (True, False):
                for group in (32, 64, 128, -1):
                    n_out, n_in = shapes[turn % len(shapes)]
                    turn += 1
                    if group == 128 and n_in % 128:
                        n_in += 64
                    common = (n_out, n_in, bits, group, symmetric, dtype)
                    yield Case("dequantize", *common, 0, None)
                    for path in ("decode", "tensor", "dequantize"):
                        counts = tokens[path]
                        picked = (counts[turn % len(counts)],) if small else counts
                        for count in picked:
                            yield Case("linear", *common, count, path)  # type: ignore[arg-type]
                    yield Case("linear", *common, 5, "decode", 1 + turn % 8)
                    yield Case("linear", *common, 40, "tensor", 1 + turn % 4)
            yield Case("low_rank", 200, 512, bits, 128, False, dtype, 3, "decode", 2)
            yield Case("low_rank", 200, 512, bits, 64, True, dtype, 50, "tensor", 2)
            yield Case("linear", 70, 77, bits, -1, True, dtype, 4, "decode")
    for dtype in (torch.float16, torch.bfloat16):
        for n, block in (
            ((64, 64), (448, 448), (1040, 1040))
            if small
            else ((4096, 4096), (14336, 14336), (11008, 256), (1040, 1040))
        ):
            yield Case("hadamard", n, n, block, 0, True, dtype, 3, None)


@contextmanager
def poisoned() -> Iterator[None]:
    """New tensors begin as NaN, so that an output that nobody wrote is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def run_case(library: Any, case: Case, device: torch.device, generator: torch.Generator) -> Outcome:
    """One case on fresh data; `generator` is on the CPU."""
    bound = BOUNDS[case.dtype] * (2 if case.op == "low_rank" or case.path == "dequantize" else 1)
    try:
        with poisoned():
            call, wanted = _prepared(library, case, device, generator)
            first, second = call(), call()
        error = float((first.double() - wanted).norm() / wanted.norm().clamp(min=1e-30))
        if case.op == "dequantize":
            bound = 0.0
        return Outcome(str(case), error, bound, torch.equal(first, second))
    except Exception as raised:  # a case that fails must not hide the others
        return Outcome(str(case), float("nan"), bound, False, f"{type(raised).__name__}: {raised}")


def _prepared(
    library: Any, case: Case, device: torch.device, generator: torch.Generator
) -> tuple[Callable[[], Tensor], Tensor]:
    """What to call, and what should come out, in float64."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(case.dtype).to(device)

    if case.op == "hadamard":
        x = normal(case.tokens, case.n_in)
        return lambda: transform(library, x, case.bits, False), transformed(x.double(), case.bits)
    n_groups = 1 if case.group == -1 else case.n_in // case.group
    codes = torch.randint(0, 2**case.bits, (case.n_out, case.n_in), generator=generator, dtype=torch.uint8).to(device)
    scale = (torch.rand(case.n_out, n_groups, generator=generator) * 0.02 + 0.01).to(case.dtype).to(device)
    zeros = None
    if not case.symmetric:
        shape = (case.n_out, n_groups)
        zeros = torch.randint(0, 2**case.bits, shape, generator=generator, dtype=torch.uint8).to(device)
    buffer, layout = pack_weight(codes, scale, zeros, case.bits, case.group)
    if case.op == "dequantize":
        wanted = reference_dequantize(codes, scale, zeros, case.bits)
        return lambda: dequantize(library, buffer, layout, case.dtype), wanted.double()
    weight = reference_dequantize(codes, scale.double(), zeros, case.bits)
    x, bias = normal(case.tokens, case.n_in), normal(case.n_out)
    wanted = x.double() @ weight.T + bias.double()
    low_rank = None
    if case.op == "low_rank":
        right, left = normal(72, case.n_in) * 0.05, normal(case.n_out, 72) * 0.05
        low_rank = LowRank.of(left, right)
        wanted += (x @ right.T).double() @ left.double().T
    return lambda: linear(library, x, buffer, layout, bias, low_rank, case.path, case.splits), wanted
