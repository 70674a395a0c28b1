"""Linears with integer weights, repacked for speed: made at load from the tensors that are stored, and never stored.

    weight = prepare(weight_packed, weight_scale, zero_points, bits, group_size, in_features)
    y = packed_linear(x, weight, bias)                       # activations=16: keep them as they are

    y = x @ W.T + bias,   W = (codes - zero_point) * scale   in float32, not rounded to the dtype of the scale

activations=8: x is rounded to integers -127 .. 127 with a scale per token and block of inputs (its group, at most 128
inputs), amax / 127. Sums over a block are exact integers; the rounding error of an input is at most half its block's scale:
relative to the block's largest input 1 / 254, so that Gaussian ones add about 0.6 % to the output (docs/kernels.md).

On the CPU compiled kernels run (compress/kernels/cpu), on NVIDIA GPUs those of `cuda/` where they may (compress/kernels/cuda),
elsewhere, or where they were not built, the references. A weight lies in the layout of the device that it was prepared on.
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
from compress.kernels import native
from compress.kernels.buffers import allocate
from compress.kernels.cuda.ops import linear_on_gpu, packed_on_gpu, read_on_gpu
from compress.kernels.ops import LIBRARY, row_tiles
from compress.kernels.packed_layout import DTYPES, Layout, blocks, read, stored_bits, written
from compress.kernels.packing import unpack

SMALLEST = 2.0**-100  # a block of activations with nothing above counts as zero: its scale could not be inverted

LIBRARY.define(
    "packed_linear(Tensor x, Tensor buffer, Tensor? bias, int bits, int group_size, int out_features, int in_features, "
    "int zero_point, int scale_dtype, int activations) -> Tensor"
)


@dataclass(frozen=True)
class PackedWeight:
    """A repacked weight. `buffer` uint8 is laid out for the kernels of its device, from the sizes in `layout`."""

    buffer: Tensor
    layout: Layout

    @property
    def nbytes(self) -> int:
        return self.buffer.numel()

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """What was packed: codes uint8 [out, in], scale, zero points uint8 [out, groups] or None."""
        return _read(self.buffer, self.layout)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight it stands for, [out_features, in_features]."""
        return _dense(self.buffer, self.layout).to(dtype)


def prepare(
    weight_packed: Tensor,
    scale: Tensor,
    zero_points: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    n_threads: int | None = None,
) -> PackedWeight:
    """Repack a weight from the layout in which it is stored.

    Args:
        weight_packed: int32 [out, ceil(in_features * bits / 32)], as `compress.kernels.packing.pack` makes it.
        scale: [out, groups], float32, bfloat16 or float16; kept in this dtype.
        zero_points: integers 0 .. 2^bits - 1, [out, groups]; None: 2^(bits-1) everywhere.
        bits: 1 to 8; codes of 1 bit take 2 in the buffer, those of 5 to 7 take 8.
        group_size: inputs that share a scale; -1: all.

    Raises: RecipeError if the shapes do not belong together.
    """
    layout = _layout(weight_packed, scale, zero_points, bits, group_size, in_features)
    if weight_packed.is_cuda:
        return PackedWeight(packed_on_gpu(unpack(weight_packed, bits, in_features), scale, zero_points, layout), layout)
    packed = PackedWeight(allocate(layout.n_bytes), layout)
    library = native.library()
    if library is None:
        written(unpack(weight_packed, bits, in_features), scale, zero_points, layout, packed.buffer)
        return packed
    words, scale = weight_packed.contiguous(), scale.contiguous()
    zeros = None if zero_points is None else zero_points.to(torch.uint8).contiguous()
    status = library.ck_weight_pack(
        _weight(layout), words.data_ptr(), words.shape[1], bits, scale.data_ptr(),
        None if zeros is None else zeros.data_ptr(), packed.buffer.data_ptr(), packed.buffer.numel(),
        n_threads or torch.get_num_threads(),
    )  # fmt: skip
    native.check(status, "packing a weight")
    return packed


def _layout(
    weight_packed: Tensor, scale: Tensor, zero_points: Tensor | None, bits: int, group_size: int, in_features: int
) -> Layout:
    if not 1 <= bits <= 8:
        raise RecipeError(f"bits={bits}: codes have 1 to 8")
    group = in_features if group_size == -1 else group_size
    if group < 1 or in_features < 1 or in_features % group:
        raise RecipeError(f"group_size={group_size} does not divide in_features={in_features}")
    n_out, n_groups = weight_packed.shape[0], in_features // group
    wanted = (n_out, -(-in_features * bits // 32))
    if weight_packed.dtype != torch.int32 or tuple(weight_packed.shape) != wanted:
        raise RecipeError(f"weight_packed is {weight_packed.dtype} {tuple(weight_packed.shape)}, not int32 {wanted}")
    if scale.dtype not in DTYPES or tuple(scale.shape) != (n_out, n_groups):
        raise RecipeError(f"scale is {scale.dtype} {tuple(scale.shape)}, not a 16- or 32-bit float {(n_out, n_groups)}")
    if zero_points is not None and zero_points.shape != scale.shape:
        raise RecipeError(f"zero_points are {tuple(zero_points.shape)}, not {tuple(scale.shape)}")
    devices = {t.device for t in (weight_packed, scale, zero_points) if t is not None}
    if len(devices) > 1 or weight_packed.device.type not in ("cpu", "cuda"):
        raise RecipeError(f"weights are repacked on the CPU or on one GPU, not on {' and '.join(map(str, devices))}")
    zero_point = -1 if zero_points is not None else 2 ** (bits - 1)
    return Layout(stored_bits(bits), group, n_out, in_features, zero_point, DTYPES.index(scale.dtype))


def packed_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, activations: int = 8) -> Tensor:
    """A linear layer with a repacked weight.

    Args:
        x: [..., in_features], float32, bfloat16 or float16; any strides, may be empty.
        bias: [out_features].
        activations: 8: rounded inside; 16: kept as they are.

    Returns: [..., out_features] in the dtype of x.
    """
    w = weight.layout
    return torch.ops.compress.packed_linear(
        x, weight.buffer, bias, w.bits, w.group_size, w.out_features, w.in_features, w.zero_point, w.scale_dtype,
        activations,
    )  # fmt: skip


class Product:
    """out = x W^T + bias for one token, from a buffer into a buffer: what a decoding loop calls again and again.

    Args:
        weight: on the CPU.
        bias: [out_features].
        activations: as of `packed_linear`.
        x: [in_features], where the caller puts the token.
        out: [out_features], in the dtype of x; overwritten by every call.

    Raises: RecipeError if there are no compiled kernels, or sizes and dtypes do not fit.
    """

    def __init__(self, weight: PackedWeight, bias: Tensor | None, activations: int, x: Tensor, out: Tensor):
        library, w = native.library(), weight.layout
        if library is None:
            raise RecipeError(f"packed_linear: {native.absent()}")
        if (
            x.dtype not in native.DTYPES
            or out.dtype != x.dtype
            or (x.shape, out.shape) != ((w.in_features,), (w.out_features,))
        ):
            raise RecipeError(
                f"packed_linear: {x.dtype} {tuple(x.shape)} and {out.dtype} {tuple(out.shape)} do not fit {w}"
            )
        self.x, self.out = x, out
        self._call, sizes = library.ck_linear, _weight(w)
        n_bytes = library.ck_linear_workspace(sizes, 1, activations)
        native.check(n_bytes, "packed_linear")
        workspace = torch.empty(n_bytes, dtype=torch.uint8)
        bias = None if bias is None else bias.detach().contiguous()
        self._kept = (weight.buffer, bias, workspace)  # what the arguments point to
        self._arguments = (
            sizes, weight.buffer.data_ptr(), weight.buffer.numel(), x.data_ptr(), native.DTYPES[x.dtype], 1, w.in_features,
            None if bias is None else bias.data_ptr(), 0 if bias is None else native.DTYPES[bias.dtype], out.data_ptr(),
            w.out_features, activations, workspace.data_ptr(), n_bytes, torch.get_num_threads(),
        )  # fmt: skip

    def __call__(self) -> Tensor:
        native.check(self._call(*self._arguments), "packed_linear")
        return self.out


def _cpu(
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
    library = native.library()
    if library is None:
        return _reference(
            x, buffer, bias, bits, group_size, out_features, in_features, zero_point, scale_dtype, activations
        )
    dtype = native.DTYPES.get(x.dtype)
    if dtype is None or x.shape[-1] != in_features or buffer.dtype != torch.uint8 or not buffer.is_contiguous():
        raise RecipeError(_refusal(x, buffer, in_features))
    flat = x if x.dim() == 2 and x.stride(1) == 1 else x.reshape(-1, in_features).contiguous()
    n_tokens = flat.shape[0]
    out = torch.empty((*x.shape[:-1], out_features), dtype=x.dtype)
    weight = _weight_of(bits, group_size, out_features, in_features, zero_point, scale_dtype)
    if bias is not None:
        if bias.dtype not in native.DTYPES or bias.shape != (out_features,):
            raise RecipeError(f"bias is {bias.dtype} {tuple(bias.shape)}, not a 16- or 32-bit float [{out_features}]")
        bias = bias.detach().contiguous()
    n_bytes = library.ck_linear_workspace(weight, n_tokens, activations)
    native.check(n_bytes, "packed_linear")
    workspace = torch.empty(n_bytes, dtype=torch.uint8)  # torch aligns to 64 bytes
    status = library.ck_linear(
        weight, buffer.data_ptr(), buffer.numel(), flat.data_ptr(), dtype, n_tokens, flat.stride(0),
        None if bias is None else bias.data_ptr(), 0 if bias is None else native.DTYPES[bias.dtype], out.data_ptr(),
        out_features, activations, workspace.data_ptr(), n_bytes, torch.get_num_threads(),
    )  # fmt: skip
    native.check(status, "packed_linear")
    return out


def _refusal(x: Tensor, buffer: Tensor, in_features: int) -> str:
    if x.dtype not in native.DTYPES:
        return f"packed_linear: activations are {x.dtype}, and there are kernels for float32, bfloat16 and float16"
    if x.shape[-1] != in_features:
        return f"packed_linear: activations have {x.shape[-1]} features, the weight takes {in_features}"
    return f"packed_linear: the buffer is {buffer.dtype} with strides {buffer.stride()}, not contiguous bytes"


@lru_cache(maxsize=4096)
def _weight_of(
    bits: int, group_size: int, out_features: int, in_features: int, zero_point: int, scale_dtype: int
) -> Any:
    """A pointer to the ck_weight of these sizes."""
    symmetric = zero_point >= 0
    weight = native.Weight(
        native.LAYOUT_VERSION, bits, int(symmetric), max(zero_point, 0), scale_dtype, 0, out_features, in_features,
        group_size,
    )  # fmt: skip
    return ctypes.pointer(weight)


def _weight(layout: Layout) -> Any:
    return _weight_of(
        layout.bits, layout.group_size, layout.out_features, layout.in_features, layout.zero_point, layout.scale_dtype
    )


def _reference(
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
    layout = Layout(bits, group_size, out_features, in_features, zero_point, scale_dtype)
    flat = x.reshape(-1, in_features).float()
    if activations == 16:
        out = functional.linear(flat, _dense(buffer, layout))
    else:
        out = _rounded_product(flat, buffer, layout)
    if bias is not None:
        out = out + bias.float()
    return out.to(x.dtype).view(*x.shape[:-1], out_features)


def _rounded_product(x: Tensor, buffer: Tensor, layout: Layout) -> Tensor:
    """x float32 [tokens, in], rounded to 8 bits; the products of integers are exact in float32."""
    q, a_scale = rounded_activations(x, layout)  # [tokens, blocks, padded_block], [tokens, blocks]
    codes, scale, zero_points = read(buffer, layout)
    out = x.new_empty(len(x), layout.out_features)
    for rows in row_tiles(layout.out_features, layout.in_features):
        zero = layout.zero_point if zero_points is None else zero_points[rows].float().unsqueeze(-1)
        steps = (codes[rows].float().unflatten(-1, (layout.n_groups, -1)) - zero).flatten(-2)
        sums = torch.einsum("tbk,obk->tbo", q, blocks(steps, layout))
        per_block = scale[rows].float().repeat_interleave(layout.blocks_per_group, dim=1)  # [rows, blocks]
        out[:, rows] = (sums * (per_block.T * a_scale.unsqueeze(-1))).sum(1)
    return out


def rounded_activations(x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """x float32 [tokens, in] -> whole numbers -127 .. 127 as float [tokens, blocks, padded_block], scale [tokens, blocks]."""
    cut = blocks(x, layout)
    largest = cut.abs().amax(-1)  # a NaN wins
    small = largest < SMALLEST
    inverse = torch.where(small, 0, torch.tensor(127.0) / largest)  # a number / tensor would be rounded twice
    scale = torch.where(small, 0, largest / 127)
    finite = largest < float("inf")
    q = torch.where(finite.unsqueeze(-1), (cut * inverse.unsqueeze(-1)).round(), 0)
    return q, torch.where(finite, scale, float("nan"))


def _dense(buffer: Tensor, layout: Layout) -> Tensor:
    codes, scale, zero_points = _read(buffer, layout)
    zero = layout.zero_point if zero_points is None else zero_points.float().unsqueeze(-1)
    steps = codes.float().unflatten(-1, (layout.n_groups, -1)) - zero
    return (steps * scale.float().unsqueeze(-1)).flatten(-2)


def _read(buffer: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor | None]:
    return read_on_gpu(buffer, layout) if buffer.is_cuda else read(buffer, layout)


def _meta(
    x: Tensor, buffer: Tensor, bias: Tensor | None, bits: int, group_size: int, out_features: int, *_: Any
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, buffer, bias, *sizes, ctx.activations = inputs
    ctx.layout = Layout(*sizes)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(buffer)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of input and bias, as if the input were not rounded; the weight is a constant."""
    (buffer,) = ctx.saved_tensors
    grad_x = (grad.float() @ _dense(buffer, ctx.layout)).to(grad.dtype) if ctx.needs_input_grad[0] else None
    n_out = ctx.layout.out_features
    grad_bias = grad.reshape(-1, n_out).sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
    return grad_x, None, grad_bias, None, None, None, None, None, None, None


LIBRARY.impl("packed_linear", _reference, "CompositeExplicitAutograd")
LIBRARY.impl("packed_linear", _cpu, "CPU")
LIBRARY.impl("packed_linear", linear_on_gpu, "CUDA")
LIBRARY.impl("packed_linear", _meta, "Meta")
torch.library.register_autograd("compress::packed_linear", _backward, setup_context=_remember, lib=LIBRARY)
