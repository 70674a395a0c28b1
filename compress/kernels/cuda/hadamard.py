"""Calls of the Hadamard kernel, and the signs of the cores as it reads them."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from compress.errors import RecipeError
from compress.kernels.cuda import native
from compress.kernels.cuda.layout import DTYPES
from compress.kernels.cuda.linear import on_device, stream_of
from compress.kernels.packing import pack
from compress.linalg.hadamard import core
from compress.linalg.hadamard_orders import factors


def refused(x: Tensor, block_size: int, largest: int) -> str | None:
    """Why the kernel cannot do it; None: it can. `largest`: block that the GPU's shared memory holds."""
    if x.dtype not in DTYPES:
        return f"activations are {x.dtype}, and there are kernels for bfloat16 and float16"
    if block_size > largest:
        return f"blocks of {block_size} do not fit this GPU's shared memory, which holds {largest}"
    return None


def transform(library: Any, x: Tensor, block_size: int, transposed: bool) -> Tensor:
    """x H, or x H^T, along the last axis; H block-diagonal with blocks of `block_size`.

    Raises: RecipeError naming op, shape and device.
    """
    n = x.shape[-1]
    what = f"hadamard_transform {tuple(x.shape)} in blocks of {block_size} on {x.device}"
    orders = factors(block_size) if n % block_size == 0 else None
    if orders is None:
        raise RecipeError(f"{what}: there is no such Hadamard matrix")
    flat = x.reshape(-1, n)
    if flat.stride(1) != 1 or flat.stride(0) < n:
        flat = flat.clone(memory_format=torch.contiguous_format)
    out = torch.empty(flat.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out.view(x.shape)
    cores = orders[:-1]
    signs = _signs(block_size, x.device)
    with on_device(x):
        status = library.cc_hadamard(
            flat.data_ptr(), flat.stride(0), out.data_ptr(), n, flat.shape[0], n // block_size,
            orders[-1].bit_length() - 1, len(cores), (ctypes.c_int32 * max(len(cores), 1))(*cores),
            signs.data_ptr() if cores else None, int(transposed), DTYPES.get(x.dtype, 0), stream_of(x),
        )  # fmt: skip
    native.check(library, status, what)
    return out.view(x.shape)


@lru_cache(maxsize=64)
def _signs(block_size: int, device: torch.device) -> Tensor:
    """Words int32, core after core: bit j of a row's words is set where the core has -1 in column j."""
    orders = factors(block_size)
    assert orders is not None
    words = [pack((core(order) < 0).to(torch.uint8), 1).flatten() for order in orders[:-1]]
    return torch.cat([*words, torch.zeros(1, dtype=torch.int32)]).to(device)
