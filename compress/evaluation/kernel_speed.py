"""How fast the compiled operations are, beside what this processor can do, and whether they equal their references.

    limit = max(bytes / bytes read per second, operations / operations per second of the unit that does them)

Bytes are those of the weight with its scales and of the activations in and out. Both rates are measured on the spot, on the same
threads: reading memory in pages of 2 MB (and of 4 KB, to show the difference), and each arithmetic unit alone, without memory.
Weights are in as many copies as take `megabytes` together, used in turn, so that they come from memory.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from compress.errors import RecipeError
from compress.kernels import native
from compress.kernels.buffers import allocate
from compress.kernels.low_rank import low_rank_linear
from compress.kernels.ops import hadamard_transform
from compress.kernels.packed import PackedWeight, _reference, packed_linear, prepare
from compress.kernels.sparse import kept_entries, pack_positions, sparse_linear
from compress.linalg.hadamard import transformed
from compress.linalg.hadamard_orders import factors, largest_block
from compress.pipeline.progress import Progress, Silent

UNITS = {"float32": 0, "bfloat16": 1, "int8": 2}  # CK_UNIT_*
CHECKED_ROWS, CHECKED_TOKENS = 37, 19  # of the product that is compared with the reference: neither is a whole tile
LEAST, MOST, ROUND = 3, 50, 0.03  # calls of a round, and its seconds as far as these admit
MEGABYTE = 1 << 20
UNIT_ROUNDS = 100_000
HALVES = 2 * 2.0**-7  # error of results that were rounded to bfloat16, relative to the largest
SPARSE = ((2, 4), (0, 0))


@dataclass(frozen=True)
class KernelSettings:
    """What is timed: every operation with every number of bits, group size, shape, number of tokens and of threads."""

    shapes: tuple[tuple[int, int], ...] = ((4096, 4096),)  # [out, in]
    tokens: tuple[int, ...] = (1, 16)
    bits: tuple[int, ...] = (2, 3, 4, 8)
    group_sizes: tuple[int, ...] = (128,)
    threads: tuple[int, ...] = (1,)
    repeats: int = 5
    megabytes: int = 256


@dataclass(frozen=True)
class Operation:
    """An operation at one size, ready to be timed. `check` gives its largest error against the reference, and the bound."""

    name: str
    bits: int | None
    group_size: int | None
    unit: str
    nbytes: int  # of a copy of the weight, with its scales
    traffic: int  # of the activations
    operations: int
    copies: int
    run: Callable[[int], object]
    check: Callable[[], tuple[float, float]]


def measure_kernels(settings: KernelSettings, progress: Progress | None = None) -> dict[str, Any]:
    """Time the compiled operations.

    Returns: a dictionary for JSON: "settings", "machine", "limits" (per number of threads), "results".
    Raises: RecipeError if there are no compiled kernels, or no such operation.
    """
    why = native.absent()
    if why is not None:
        raise RecipeError(f"no compiled kernels to time: {why}")
    progress = progress or Silent()
    n_cases = len(settings.threads) * len(settings.shapes) * len(settings.tokens)
    progress.begin("time kernels", n_cases, "size")
    before = torch.get_num_threads()
    limits, results = {}, []
    try:
        for threads in settings.threads:
            torch.set_num_threads(threads)
            limits[threads] = measure_limits(threads, settings.megabytes)
            for shape in settings.shapes:
                for tokens in settings.tokens:
                    for operation in _operations(shape, tokens, settings):
                        found = _timed(operation, settings.repeats, limits[threads])
                        results.append({"shape": list(shape), "tokens": tokens, "threads": threads, **found})
                    progress.advance(1, f"{shape[0]} x {shape[1]}, {tokens} tokens")
    finally:
        torch.set_num_threads(before)
    progress.end()
    about = {"isa": native.current_isa(), "torch": torch.__version__, "stale": native.stale()}
    return {"settings": asdict(settings), "machine": about, "limits": limits, "results": results}


def measure_limits(threads: int, megabytes: int) -> dict[str, float | None]:
    """Bytes and operations per second, the best of a few tries: "read_2m", "read_4k", and each of UNITS (None: there is none)."""
    library = native.library()
    assert library is not None
    n_bytes, mixed = megabytes * MEGABYTE, ctypes.c_uint64()
    small = torch.zeros(n_bytes + 64, dtype=torch.uint8)
    found: dict[str, float | None] = {}
    for name, buffer in (
        ("read_2m", allocate(n_bytes).zero_()),
        ("read_4k", small[-small.data_ptr() % 64 :][:n_bytes]),
    ):
        chunk = min(n_bytes, 8 * MEGABYTE) // 64 * 64
        places = range(0, n_bytes - chunk + 1, chunk)

        def read(place: int, buffer: Tensor = buffer, chunk: int = chunk) -> None:
            status = library.ck_roofline_read(buffer.data_ptr() + place, chunk, threads, ctypes.byref(mixed))
            native.check(status, "reading memory")

        seconds = sorted(_seconds(partial(read, place)) for _ in range(3) for place in places)
        found[name] = chunk / seconds[len(seconds) // 10]  # the very best ones may have come from a cache
    for name, unit in UNITS.items():

        def compute(unit: int = unit) -> int:
            done: int = library.ck_roofline_compute(unit, UNIT_ROUNDS, threads)
            return done

        done = compute()
        found[name] = done / min(_seconds(compute) for _ in range(7)) if done > 0 else None
    return found


def _operations(shape: tuple[int, int], tokens: int, settings: KernelSettings) -> Iterator[Operation]:
    for bits in settings.bits:
        for group_size in settings.group_sizes:
            for activations in (8, 16):
                yield _linear(shape, tokens, bits, group_size, activations, settings.megabytes)
    yield _hadamard(shape[1], tokens, settings.megabytes)
    yield _low_rank(shape, tokens, settings.megabytes)
    for n, m in SPARSE:
        yield _sparse(shape, tokens, n, m, settings.megabytes)


def _linear(
    shape: tuple[int, int], tokens: int, bits: int, group_size: int, activations: int, megabytes: int
) -> Operation:
    out, n = shape
    dtype = torch.float32 if activations == 8 else torch.bfloat16
    first = random_weight(out, n, bits, group_size)
    copies = max(2, -(-megabytes * MEGABYTE // first.nbytes))
    weights = [first, *(replace(first, buffer=allocate(first.nbytes).copy_(first.buffer)) for _ in range(copies - 1))]
    x = torch.randn(tokens, n, generator=torch.Generator().manual_seed(1)).to(dtype)
    unit = "int8" if activations == 8 else "bfloat16"
    return Operation(
        f"linear W{bits}A{activations}", bits, group_size, unit, first.nbytes, tokens * (n + out) * x.element_size(),
        2 * tokens * out * n, copies, lambda copy: packed_linear(x, weights[copy], activations=activations),
        lambda: _linear_error(n, bits, group_size, activations, dtype),
    )  # fmt: skip


def random_weight(out: int, in_features: int, bits: int, group_size: int) -> PackedWeight:
    """Random codes, scales of about 1 / sqrt(in_features)."""
    generator = torch.Generator().manual_seed(out)
    words = torch.randint(-(2**31), 2**31, (out, -(-in_features * bits // 32)), generator=generator, dtype=torch.int64)
    n_groups = 1 if group_size == -1 else in_features // group_size
    scale = (torch.rand(out, n_groups, generator=generator) + 0.5) / in_features**0.5 / 2 ** (bits - 1)
    return prepare(words.int(), scale.half(), None, bits, group_size, in_features)


def _linear_error(
    in_features: int, bits: int, group_size: int, activations: int, dtype: torch.dtype
) -> tuple[float, float]:
    weight = random_weight(CHECKED_ROWS, in_features, bits, group_size)
    x = torch.randn(CHECKED_TOKENS, in_features, generator=torch.Generator().manual_seed(2)).to(dtype)
    found = packed_linear(x, weight, activations=activations)
    w = weight.layout
    expected = _reference(
        x.float(),
        weight.buffer,
        None,
        w.bits,
        w.group_size,
        w.out_features,
        w.in_features,
        w.zero_point,
        w.scale_dtype,
        activations,
    )
    return _error(found, expected), 2 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5


def _hadamard(in_features: int, tokens: int, megabytes: int) -> Operation:
    block = largest_block(in_features)
    x = torch.randn(tokens, in_features, generator=torch.Generator().manual_seed(1))
    copies = max(2, -(-megabytes * MEGABYTE // x.nbytes)) if tokens > 64 else 2
    inputs = [x.clone() for _ in range(copies)]
    orders = factors(block)
    assert orders is not None
    work = sum(2 * order for order in orders[:-1]) + orders[-1].bit_length() - 1  # per value

    def check() -> tuple[float, float]:
        return _error(hadamard_transform(x, block), transformed(x.double(), block)), 1e-5

    return Operation(
        "hadamard", None, None, "float32", 0, 2 * x.nbytes, work * x.numel(), copies,
        lambda copy: hadamard_transform(inputs[copy], block), check,
    )  # fmt: skip


def _low_rank(shape: tuple[int, int], tokens: int, megabytes: int) -> Operation:
    """A pair with a quarter of the weights, in bfloat16."""
    out, n = shape
    rank = max(1, out * n // (out + n) // 4)
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(size, generator=generator).bfloat16() for size in ((out, rank), (rank, n)))
    x = torch.randn(tokens, n, generator=generator).bfloat16()
    nbytes = left.nbytes + right.nbytes
    pairs = [(left.clone(), right.clone()) for _ in range(max(2, -(-megabytes * MEGABYTE // nbytes)))]

    def check() -> tuple[float, float]:
        found = low_rank_linear(x, left, right)
        return _error(found, x.float() @ right.float().T @ left.float().T), HALVES

    return Operation(
        "low rank 0.25", 16, None, "bfloat16", nbytes, 2 * tokens * (n + out), 2 * tokens * rank * (n + out), len(pairs),
        lambda copy: low_rank_linear(x, *pairs[copy]), check,
    )  # fmt: skip


def _sparse(shape: tuple[int, int], tokens: int, n: int, m: int, megabytes: int) -> Operation:
    """Half of the weights in bfloat16, two of four or anywhere."""
    out, columns = shape
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(out, columns, generator=generator)
    mask = scores.unflatten(1, (-1, m)).argsort(-1).argsort(-1).lt(n).flatten(1) if m else scores < 0.5
    weight = torch.randn(out, columns, generator=generator).bfloat16()
    values, positions = kept_entries(weight, mask, n, m), pack_positions(mask, n, m)
    x = torch.randn(tokens, columns, generator=generator).bfloat16()
    nbytes = values.nbytes + positions.nbytes
    copies = [(values.clone(), positions.clone()) for _ in range(max(2, -(-megabytes * MEGABYTE // nbytes)))]

    def run(copy: int) -> Tensor:
        return sparse_linear(x, *copies[copy], None, None, 0, n, m, columns)

    def check() -> tuple[float, float]:
        return _error(run(0), x.float() @ (weight * mask).float().T), HALVES

    return Operation(
        f"sparse {n}:{m}" if m else "sparse, half", 16, None, "bfloat16", nbytes, 2 * tokens * (columns + out),
        2 * tokens * int(mask.sum()), len(copies), run, check,
    )  # fmt: skip


def _error(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def _timed(operation: Operation, repeats: int, limits: dict[str, float | None]) -> dict[str, Any]:
    error, bound = operation.check()
    taken: list[float] = []
    with torch.inference_mode():
        once = _seconds(lambda: operation.run(0))
        calls = min(max(int(ROUND / max(once, 1e-7)), LEAST), MOST)
        for number in range(repeats):
            order = range(number * calls, (number + 1) * calls)
            taken.append(median(_seconds(partial(operation.run, call % operation.copies)) for call in order))
    read = limits["read_2m"]
    peak = limits[operation.unit] or limits["float32"]
    assert read is not None and peak is not None
    by_bytes, by_work = (operation.nbytes + operation.traffic) / read, operation.operations / peak
    seconds_ = median(taken)
    return {
        "operation": operation.name, "bits": operation.bits, "group_size": operation.group_size,
        "microseconds": 1e6 * seconds_, "min": 1e6 * min(taken), "max": 1e6 * max(taken),
        "weight_bytes": operation.nbytes, "bytes_per_second": (operation.nbytes + operation.traffic) / seconds_,
        "operations_per_second": operation.operations / seconds_, "bound_by": "memory" if by_bytes > by_work else operation.unit,
        "fraction_of_limit": max(by_bytes, by_work) / seconds_, "error": error, "error_bound": bound,
        "equals_reference": error <= bound,
    }  # fmt: skip


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
