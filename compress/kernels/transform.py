"""The Hadamard transform of activations on the CPU by compiled kernels; `hadamard_transform` of ops.py takes it from here."""

from __future__ import annotations

import ctypes
import math
from functools import lru_cache

import torch
from torch import Tensor

from compress.kernels import native
from compress.linalg.hadamard import core, transformed
from compress.linalg.hadamard_orders import factors


def transformed_on_cpu(x: Tensor, block_size: int, transposed: bool) -> Tensor:
    """x H, or x H^T, as `compress.linalg.hadamard.transformed`, which does what has no kernel (float64)."""
    dtype, n = native.DTYPES.get(x.dtype), x.shape[-1]
    orders = factors(block_size)
    library = None if dtype is None or orders is None or n % block_size else native.library()
    if library is None or dtype is None:
        return transformed(x, block_size, transposed)
    flat = x if x.dim() == 2 and x.stride(1) == 1 else x.reshape(-1, n).contiguous()
    out = torch.empty(x.shape, dtype=x.dtype)
    numbers, cores, power = _factors_of(block_size, transposed)
    threads = torch.get_num_threads()
    workspace = torch.empty(library.ck_hadamard_workspace(block_size, threads), dtype=torch.uint8)
    status = library.ck_hadamard(
        flat.data_ptr(), dtype, len(flat), n, flat.stride(0), numbers, len(numbers), cores.data_ptr(), power,
        1 / math.sqrt(block_size), out.data_ptr(), n, workspace.data_ptr(), workspace.numel(), threads,
    )  # fmt: skip
    native.check(status, "hadamard_transform")
    return out


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _factors_of(block_size: int, transposed: bool) -> tuple[ctypes.Array[ctypes.c_int64], Tensor, int]:
    """Orders of the cores, the cores one after the other in float32 as they act from the right, and the power of two."""
    orders = factors(block_size)
    assert orders is not None, block_size
    matrices = [core(order).T if transposed else core(order) for order in orders[:-1]]
    entries = torch.cat([torch.zeros(1), *(m.float().flatten() for m in matrices)])[1:].contiguous()
    return (ctypes.c_int64 * len(matrices))(*orders[:-1]), entries, orders[-1]
