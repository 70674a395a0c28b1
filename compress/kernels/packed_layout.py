"""The layout of packed weights, read and written in torch: what compress/kernels/cpu/layout.h describes.

Slow and obvious: the oracle of the compiled packer, and what runs where there is none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

TILE = 16  # rows
MAX_BLOCK = 128  # inputs that share an activation scale
CHUNK = {8: 4, 4: 8, 2: 16, 3: 32}  # inputs to a row's four bytes (three times four for 3 bits)
LOW_AT, HIGH_AT = (0, 1, 3, 5), (2, 4, 6, 7)  # of 3 bits: where the third bit of a field lies
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of scales, by the number that C gives them


@dataclass(frozen=True)
class Layout:
    """Sizes of a packed weight. `bits` are those of a code in the buffer: 2, 3, 4 or 8."""

    bits: int
    group_size: int
    out_features: int
    in_features: int
    zero_point: int  # of all; -1: one per row and group, in the buffer
    scale_dtype: int  # index into DTYPES

    @property
    def n_tiles(self) -> int:
        return -(-self.out_features // TILE)

    @property
    def n_groups(self) -> int:
        return self.in_features // self.group_size

    @property
    def block(self) -> int:
        return min(self.group_size, MAX_BLOCK)

    @property
    def padded_block(self) -> int:
        return -(-self.block // CHUNK[self.bits]) * CHUNK[self.bits]

    @property
    def blocks_per_group(self) -> int:
        return -(-self.group_size // self.block)

    @property
    def n_blocks(self) -> int:
        return self.n_groups * self.blocks_per_group

    @property
    def n_scales(self) -> int:
        return self.n_tiles * self.n_groups * TILE

    @property
    def code_bytes(self) -> int:
        planes = 3 if self.bits == 3 else 1
        return self.n_tiles * self.n_blocks * self.padded_block // CHUNK[self.bits] * 64 * planes

    @property
    def zeros_at(self) -> int:
        return _up(self.code_bytes + self.n_scales * DTYPES[self.scale_dtype].itemsize)

    @property
    def n_bytes(self) -> int:
        return _up(self.zeros_at + (self.n_scales if self.zero_point < 0 else 0))


def stored_bits(bits: int) -> int:
    """Bits of a code in the buffer, for codes of `bits` bits."""
    return next(width for width in (2, 3, 4, 8) if width >= bits)


def blocks(x: Tensor, layout: Layout) -> Tensor:
    """[..., in_features] -> [..., n_blocks, padded_block], padded with zeros."""
    grouped = x.unflatten(-1, (layout.n_groups, layout.group_size))
    grouped = functional.pad(grouped, (0, layout.blocks_per_group * layout.block - layout.group_size))
    cut = grouped.unflatten(-1, (layout.blocks_per_group, layout.block)).flatten(-3, -2)
    return functional.pad(cut, (0, layout.padded_block - layout.block))


def _unblocked(x: Tensor, layout: Layout) -> Tensor:
    """The inverse of `blocks`."""
    grouped = x[..., : layout.block].unflatten(-2, (layout.n_groups, layout.blocks_per_group)).flatten(-2)
    return grouped[..., : layout.group_size].flatten(-2)


def written(codes: Tensor, scale: Tensor, zero_points: Tensor | None, layout: Layout, buffer: Tensor) -> None:
    """Fill `buffer` uint8 [n_bytes] from codes and zero points, integers [out, in] and [out, groups], and scale."""
    rows = (0, 0, 0, layout.n_tiles * TILE - layout.out_features)
    cut = blocks(functional.pad(codes.to(torch.uint8), rows), layout)  # [rows, blocks, padded_block]
    chunk = CHUNK[layout.bits]
    cut = cut.unflatten(-1, (-1, chunk // 4, 4)).unflatten(0, (-1, TILE))  # [tiles, 16, blocks, chunks, fields, 4]
    fields = cut.permute(4, 0, 2, 3, 1, 5)  # [fields, tiles, blocks, chunks, 16, 4]
    planes = torch.stack(_planes(fields, layout.bits), dim=3)  # [tiles, blocks, chunks, planes, 16, 4]
    buffer.zero_()
    buffer[: layout.code_bytes] = planes.flatten()
    dtype = DTYPES[layout.scale_dtype]
    _table(buffer, layout, layout.code_bytes, dtype).copy_(_tiled(functional.pad(scale.to(dtype), rows)))
    if zero_points is not None:
        table = _table(buffer, layout, layout.zeros_at, torch.uint8)
        table.copy_(_tiled(functional.pad(zero_points.to(torch.uint8), rows)))


def read(buffer: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor | None]:
    """What `written` wrote: codes uint8 [out, in], scale, zero points uint8 [out, groups] or None."""
    n_planes = 3 if layout.bits == 3 else 1
    planes = buffer[: layout.code_bytes].view(layout.n_tiles, layout.n_blocks, -1, n_planes, TILE, 4)
    fields = torch.stack(_fields(planes.unbind(3), layout.bits))  # [fields, tiles, blocks, chunks, 16, 4]
    cut = fields.permute(1, 4, 2, 3, 0, 5).flatten(3).flatten(0, 1)  # [rows, blocks, padded_block]
    n = layout.out_features
    scale = _rows(_table(buffer, layout, layout.code_bytes, DTYPES[layout.scale_dtype]))[:n]
    zero_points = None
    if layout.zero_point < 0:
        zero_points = _rows(_table(buffer, layout, layout.zeros_at, torch.uint8))[:n]
    return _unblocked(cut, layout)[:n], scale, zero_points


def _planes(fields: Tensor, bits: int) -> list[Tensor]:
    if bits != 3:
        plane = fields[0].clone()
        for i in range(1, len(fields)):
            plane |= fields[i] << (i * bits)
        return [plane]
    a, b, c = (torch.zeros_like(fields[0]) for _ in range(3))
    for i in range(4):
        a |= (fields[i] >> 1) << (2 * i)
        c |= (fields[i] & 1) << LOW_AT[i]
        b |= (fields[4 + i] & 3) << (2 * i)
        c |= (fields[4 + i] >> 2) << HIGH_AT[i]
    return [a, b, c]


def _fields(planes: tuple[Tensor, ...], bits: int) -> list[Tensor]:
    if bits != 3:
        return [planes[0] >> (i * bits) & (2**bits - 1) for i in range(8 // bits)]
    a, b, c = planes
    first = [((a >> 2 * i & 3) << 1) | (c >> LOW_AT[i] & 1) for i in range(4)]
    return first + [(b >> 2 * i & 3) | ((c >> HIGH_AT[i] & 1) << 2) for i in range(4)]


def _tiled(table: Tensor) -> Tensor:
    return table.unflatten(0, (-1, TILE)).transpose(1, 2)  # [tiles, groups, 16]


def _rows(table: Tensor) -> Tensor:
    return table.transpose(1, 2).flatten(0, 1)  # [rows, groups]


def _table(buffer: Tensor, layout: Layout, start: int, dtype: torch.dtype) -> Tensor:
    stretch = buffer[start : start + layout.n_scales * dtype.itemsize]
    return stretch.view(dtype).view(layout.n_tiles, layout.n_groups, TILE)


def _up(n_bytes: int) -> int:
    return -(-n_bytes // 64) * 64
