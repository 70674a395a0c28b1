"""Calls of the linear kernels. Pointers, sizes, strides and the stream go down; memory comes from torch.

Nothing here waits for the GPU, and all memory comes from torch's allocator on the current stream: a call can be captured in
a CUDA graph. Every function takes the library, so that tests can pass the one that runs on the CPU (cuda/emulate).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from compress.errors import RecipeError
from compress.kernels.cuda import gpus, native
from compress.kernels.cuda.layout import DTYPES, CudaLayout, pack_left


@dataclass(frozen=True)
class LowRank:
    """A low-rank part x right^T left^T beside the quantized weight."""

    right: Tensor  # [rank, in]
    left: Tensor  # [out, rank]
    fragments: Tensor  # `left` as `pack_left` makes it

    @classmethod
    def of(cls, left: Tensor, right: Tensor) -> LowRank:
        """From factors in the dtype of the activations."""
        return cls(right, left, pack_left(left))


@lru_cache(maxsize=64)
def _gpu(index: int) -> tuple[str, int]:
    properties = torch.cuda.get_device_properties(index)
    return properties.name, properties.multi_processor_count


def linear(
    library: Any,
    x: Tensor,
    buffer: Tensor,
    layout: CudaLayout,
    bias: Tensor | None = None,
    low_rank: LowRank | None = None,
    path: gpus.Path | None = None,
    splits: int | None = None,
) -> Tensor:
    """x W^T + (x right^T) left^T + bias.

    Args:
        x: [..., in], float16 or bfloat16, any strides, may be empty.
        buffer, layout: of `pack_weight`.
        bias: [out].
        path, splits: which kernel, and into how many parts the inputs are cut; None: as the table of the GPU says.

    Raises: RecipeError naming op, shape and device.
    """
    what = f"packed_linear {tuple(x.shape)} x ({layout.out_features}, {layout.in_features}) on {x.device}"
    if x.dtype not in DTYPES:
        raise RecipeError(f"{what}: activations are {x.dtype}, and there are kernels for bfloat16 and float16")
    if x.shape[-1] != layout.in_features:
        raise RecipeError(f"{what}: the last axis is not the weight's {layout.in_features} inputs")
    if buffer.dtype != torch.uint8 or buffer.shape != (layout.n_bytes,) or buffer.device != x.device:
        raise RecipeError(f"{what}: the buffer is {buffer.dtype} {tuple(buffer.shape)} on {buffer.device}")
    if bias is not None and (bias.shape != (layout.out_features,) or bias.device != x.device):
        raise RecipeError(f"{what}: the bias is {tuple(bias.shape)} on {bias.device}")
    if low_rank is not None and {low_rank.right.device, low_rank.fragments.device} != {x.device}:
        raise RecipeError(f"{what}: the low-rank part is on {low_rank.right.device}")
    flat = x.reshape(-1, layout.in_features)
    n_tokens = flat.shape[0]
    if n_tokens == 0:
        return x.new_empty(*x.shape[:-1], layout.out_features)
    name, multiprocessors = _gpu(x.device.index) if x.is_cuda else ("emulation", 1)
    choose = gpus.choice(name)
    path = path or choose.path(n_tokens)
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    if path == "dequantize":
        out = functional.linear(flat, dequantize(library, buffer, layout, x.dtype), bias)
        if low_rank is not None:
            out += functional.linear(functional.linear(flat, low_rank.right), low_rank.left)
        return out.view(*x.shape[:-1], layout.out_features)
    if splits is None:
        splits = gpus.splits(layout.row_blocks, layout.input_blocks, multiprocessors, path, choose)
    out = torch.empty(n_tokens, layout.out_features, dtype=x.dtype, device=x.device)
    weight = _weight(layout)
    n_bytes = library.cc_linear_workspace(weight, n_tokens, splits)
    native.check(library, min(n_bytes, 0), what)
    workspace = torch.empty(n_bytes, dtype=torch.uint8, device=x.device)
    flat = _readable(flat)
    hidden = None if low_rank is None else _readable(functional.linear(flat[:, : layout.in_features], low_rank.right))
    operands = native.Operands(
        _pointer(flat), _pointer(out), _pointer(bias), _pointer(hidden),
        _pointer(None if low_rank is None else low_rank.fragments),
        _pointer(workspace), n_bytes, n_tokens, flat.stride(0), layout.out_features,
        0 if hidden is None else hidden.stride(0), -(-layout.in_features // 8) * 8,
        0 if hidden is None else -(-hidden.shape[1] // 8) * 8, DTYPES[x.dtype], splits,
    )  # fmt: skip
    run = library.cc_linear_decode if path == "decode" else library.cc_linear_tensor
    with on_device(x):
        status = run(weight, buffer.data_ptr(), buffer.numel(), operands, stream_of(x))
    native.check(library, status, what)
    return out.view(*x.shape[:-1], layout.out_features)


def dequantize(library: Any, buffer: Tensor, layout: CudaLayout, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] in `dtype`, rounded to the dtype of its scales first."""
    stride = -(-layout.in_features // 8) * 8
    out = torch.empty(layout.out_features, stride, dtype=dtype, device=buffer.device)
    with on_device(buffer):
        status = library.cc_dequantize(
            _weight(layout), buffer.data_ptr(), buffer.numel(), out.data_ptr(), stride, DTYPES[dtype], stream_of(buffer)
        )
    what = f"dequantising ({layout.out_features}, {layout.in_features}) on {buffer.device}"
    native.check(library, status, what)
    return out[:, : layout.in_features]


@lru_cache(maxsize=4096)
def _weight(layout: CudaLayout) -> Any:
    return ctypes.pointer(
        native.Weight(
            native.LAYOUT_VERSION, layout.bits, int(layout.symmetric), layout.scale_dtype, layout.out_features,
            layout.in_features, layout.group_size, 0,
        )
    )  # fmt: skip


def _readable(x: Tensor) -> Tensor:
    """x [tokens, n] as the kernels read it: rows of 16-byte pieces, zeros behind n; a copy only where it must be."""
    if x.shape[1] % 8:
        return functional.pad(x, (0, -x.shape[1] % 8))
    if x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.stride(0) >= x.shape[1] and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


def on_device(tensor: Tensor) -> Any:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else _Nothing()


def stream_of(tensor: Tensor) -> int | None:
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else None


class _Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...
