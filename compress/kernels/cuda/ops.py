"""`packed_linear`, `packed_low_rank_linear` and `hadamard_transform` on NVIDIA GPUs: the kernels where they may run, else the
references.

A weight that is prepared on a GPU lies in the GPU's layout (layout.py), one that is prepared on the CPU in the CPU's. Activations
are never rounded on a GPU: `activations=8` is a permission that these kernels do not use.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.weak import WeakIdKeyDictionary

from compress.errors import RecipeError
from compress.kernels.cuda import gpus, hadamard, native
from compress.kernels.cuda.layout import DTYPES, CudaLayout, pack_weight, read_weight, refused
from compress.kernels.cuda.linear import LowRank, linear
from compress.kernels.packed_layout import Layout
from compress.linalg.hadamard import transformed


def unusable(device: torch.device) -> str | None:
    """Why the kernels do not run on this GPU, and what to do; None: they do."""
    return _unusable(device.index or 0, os.environ.get("COMPRESS_CUDA_KERNELS", ""))


@lru_cache(maxsize=64)
def _unusable(index: int, asked: str) -> str | None:
    why = native.absent()
    if why is not None:
        return why
    capability = torch.cuda.get_device_capability(index)
    return gpus.unusable(torch.cuda.get_device_name(index), capability, native.architectures())


def can_prepare(scale: Tensor, bits: int, group_size: int, in_features: int) -> bool:
    """Whether the kernels run such a weight on the GPU where it is."""
    return (
        scale.is_cuda and unusable(scale.device) is None and refused(bits, group_size, in_features, scale.dtype) is None
    )


def cuda_layout(layout: Layout) -> CudaLayout:
    """The GPU's layout of a weight of these sizes."""
    return CudaLayout(
        layout.bits,
        layout.group_size,
        layout.out_features,
        layout.in_features,
        layout.zero_point >= 0,
        layout.scale_dtype,
    )


def packed_on_gpu(codes: Tensor, scale: Tensor, zero_points: Tensor | None, layout: Layout) -> Tensor:
    """The buffer, uint8 on the device of `codes`. Codes uint8 [out, in] with `layout.zero_point`, or `zero_points`.

    Raises: RecipeError if the GPU has no layout for it.
    """
    if zero_points is None:
        codes = codes + _shift(layout)
    buffer, written = pack_weight(codes, scale, zero_points, layout.bits, layout.group_size)
    assert written == cuda_layout(layout), (written, layout)
    return buffer


def read_on_gpu(buffer: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor | None]:
    """What `packed_on_gpu` was given: codes uint8 [out, in], scale, zero points uint8 or None."""
    codes, scale, zero_points = read_weight(buffer, cuda_layout(layout))
    return (codes, scale, zero_points) if zero_points is not None else (codes - _shift(layout), scale, None)


def _shift(layout: Layout) -> int:
    """What codes with one zero point are raised by, so that it becomes the middle code."""
    return 2 ** (layout.bits - 1) - layout.zero_point


def linear_on_gpu(
    x: Tensor,
    buffer: Tensor,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    in_features: int,
    zero_point: int,
    scale_dtype: int,
    activations: int,
) -> Tensor:
    """`packed_linear` for the dispatch key CUDA."""
    layout = Layout(bits, group_size, out_features, in_features, zero_point, scale_dtype)
    library = native.library()
    if library is not None and x.dtype in DTYPES and unusable(x.device) is None:
        return linear(library, x, buffer, cuda_layout(layout), bias)
    if x.shape[-1] != in_features:
        raise RecipeError(f"packed_linear: activations have {x.shape[-1]} features, the weight takes {in_features}")
    codes, scale, zero_points = read_on_gpu(buffer, layout)
    zero = layout.zero_point if zero_points is None else zero_points.float().unsqueeze(-1)
    steps = codes.float().unflatten(-1, (scale.shape[1], -1)) - zero
    weight = (steps * scale.float().unsqueeze(-1)).flatten(-2)
    return functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def low_rank_linear_on_gpu(
    x: Tensor, buffer: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, *sizes: int
) -> Tensor:
    """`packed_low_rank_linear` for the dispatch key CUDA; the sizes of `packed_linear`."""
    layout = Layout(*sizes[:-1])
    library = native.library()
    if library is not None and x.dtype in DTYPES and unusable(x.device) is None:
        if left.shape != (layout.out_features, right.shape[0]) or right.shape[1] != layout.in_features:
            raise RecipeError(
                f"packed_low_rank_linear: left {tuple(left.shape)} and right {tuple(right.shape)} do not fit a weight of "
                f"{(layout.out_features, layout.in_features)} on {x.device}"
            )
        return linear(library, x, buffer, cuda_layout(layout), bias, _low_rank(left, right, x.dtype))
    out = linear_on_gpu(x, buffer, bias, *sizes)
    return out + functional.linear(functional.linear(x, right.to(x.dtype)), left.to(x.dtype))


# By left factor: its and the right one's state, what was made of them, and the right one, whose id is part of the state.
_LOW_RANK: MutableMapping[Tensor, tuple[object, LowRank, Tensor]] = WeakIdKeyDictionary()


def _low_rank(left: Tensor, right: Tensor, dtype: torch.dtype) -> LowRank:
    """The factors as the kernels read them; made once, and again when one was changed in place or is another."""
    version = tuple((id(t), 0 if t.is_inference() else t._version) for t in (left, right)), dtype
    kept = _LOW_RANK.get(left)
    if kept is None or kept[0] != version:
        kept = version, LowRank.of(left.detach().to(dtype), right.detach().to(dtype).contiguous()), right
        if not _capturing(left):
            _LOW_RANK[left] = kept
    return kept[1]


def _capturing(tensor: Tensor) -> bool:
    """Within the capture of a CUDA graph: what is computed there is not in memory before the graph runs."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def transformed_on_gpu(x: Tensor, block_size: int, transposed: bool) -> Tensor:
    """`hadamard_transform` for the dispatch key CUDA."""
    library = native.library()
    if library is not None and unusable(x.device) is None:
        largest = _largest_block(x.device.index)
        if hadamard.refused(x, block_size, largest) is None:
            return hadamard.transform(library, x, block_size, transposed)
    return transformed(x, block_size, transposed)


@lru_cache(maxsize=64)
def _largest_block(index: int) -> int:
    library = native.library()
    assert library is not None
    with torch.cuda.device(index):
        return int(library.cc_hadamard_largest())
