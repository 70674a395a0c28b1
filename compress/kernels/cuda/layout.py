"""The layout of packed weights on NVIDIA GPUs: what cuda/layout.h describes, built and inverted in torch on any device.

Every permutation that the kernels know is here once: `_fragments` says which code lies in which lane's registers,
`_words` how a step's 32 codes of a lane fill their words. `read` inverts both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from compress.errors import RecipeError

BLOCK = 64  # rows, and inputs, of a block
TILES, STEPS, LANES = 4, 4, 32
ALIGNMENT = 128
BITS = (2, 3, 4, 8)
DTYPES = {torch.bfloat16: 1, torch.float16: 2}  # of scales and activations, by the number that C gives them
FLOATS = {number: dtype for dtype, number in DTYPES.items()}


@dataclass(frozen=True)
class CudaLayout:
    """Sizes of a packed weight. `bits` are those of a code in the buffer; `group_size` is never -1."""

    bits: int
    group_size: int
    out_features: int
    in_features: int
    symmetric: bool  # every zero point is 2^(bits-1)
    scale_dtype: int  # as in DTYPES

    @property
    def row_blocks(self) -> int:
        return -(-self.out_features // BLOCK)

    @property
    def input_blocks(self) -> int:
        return -(-self.in_features // BLOCK)

    @property
    def n_groups(self) -> int:
        """As stored: an odd number of groups of 32 gets one more."""
        n = self.in_features // self.group_size
        return n + n % 2 if self.group_size == BLOCK // 2 < self.in_features else n

    @property
    def code_bytes(self) -> int:
        return self.row_blocks * self.input_blocks * self.bits * LANES * 16

    @property
    def zeros_at(self) -> int:
        return self.code_bytes + self.row_blocks * self.n_groups * BLOCK * 2

    @property
    def n_bytes(self) -> int:
        end = self.zeros_at + (0 if self.symmetric else self.row_blocks * self.n_groups * BLOCK)
        return -(-end // ALIGNMENT) * ALIGNMENT


def refused(bits: int, group_size: int, in_features: int, scale_dtype: torch.dtype) -> str | None:
    """Why the kernels cannot take such a weight; None: they can."""
    group = in_features if group_size == -1 else group_size
    if not 1 <= bits <= 8:
        return f"bits={bits}: codes have 1 to 8"
    if group < 1 or in_features % group:
        return f"group_size={group_size} does not divide in_features={in_features}"
    if group not in (in_features, BLOCK // 2) and group % BLOCK:
        return f"group_size={group_size} is neither 32, a multiple of 64, nor the whole row"
    if scale_dtype not in DTYPES:
        return f"scales are {scale_dtype}, and there are kernels for bfloat16 and float16"
    return None


def pack_weight(
    codes: Tensor, scale: Tensor, zero_points: Tensor | None, bits: int, group_size: int
) -> tuple[Tensor, CudaLayout]:
    """The packed buffer, uint8 on the device of `codes`.

    Args:
        codes: integers 0 .. 2^bits - 1, [out, in].
        scale: bfloat16 or float16 [out, groups].
        zero_points: integers 0 .. 2^bits - 1, [out, groups]; None: 2^(bits-1) everywhere.
        bits: 1 to 8; those that have no layout of their own take the next one that has.

    Raises: RecipeError if there are no kernels for it.
    """
    n_out, n_in = codes.shape
    why = refused(bits, group_size, n_in, scale.dtype)
    if why is not None:
        raise RecipeError(f"packing a weight for the GPU: {why}")
    stored = next(width for width in BITS if width >= bits)
    group = n_in if group_size == -1 else group_size
    layout = CudaLayout(stored, group, n_out, n_in, zero_points is None, DTYPES[scale.dtype])
    assert scale.shape == (n_out, n_in // group), (scale.shape, layout)
    codes = codes.to(torch.uint8)
    if zero_points is None:
        codes = codes + (2 ** (stored - 1) - 2 ** (bits - 1))  # the middle code is where the kernels expect it
    buffer = torch.zeros(layout.n_bytes, dtype=torch.uint8, device=codes.device)
    padding = (0, layout.input_blocks * BLOCK - n_in, 0, layout.row_blocks * BLOCK - n_out)
    middle = 2 ** (stored - 1)
    words = _vectors(_words(_fragments(functional.pad(codes, padding, value=middle)), stored))
    buffer[: layout.code_bytes] = words.flatten().view(torch.uint8)
    table(buffer, layout, layout.code_bytes, scale.dtype).copy_(_rows_to_lanes(_padded(scale, layout)))
    if zero_points is not None:
        zeros = _padded(zero_points.to(torch.uint8), layout)
        table(buffer, layout, layout.zeros_at, torch.uint8).copy_(_rows_to_lanes(zeros))
    return buffer, layout


def read_weight(buffer: Tensor, layout: CudaLayout) -> tuple[Tensor, Tensor, Tensor | None]:
    """What `pack_weight` wrote: codes uint8 [out, in] of `layout.bits` bits, scale, zero points uint8 or None."""
    n_out, n_in, n_groups = layout.out_features, layout.in_features, layout.in_features // layout.group_size
    words = (
        buffer[: layout.code_bytes]
        .view(torch.int32)
        .view(layout.row_blocks, layout.input_blocks, layout.bits, LANES, 4)
    )
    codes = _unfragmented(_unworded(_unvectored(words), layout.bits))[:n_out, :n_in]
    scale = _lanes_to_rows(table(buffer, layout, layout.code_bytes, FLOATS[layout.scale_dtype]))[:n_out, :n_groups]
    if layout.symmetric:
        return codes, scale, None
    return codes, scale, _lanes_to_rows(table(buffer, layout, layout.zeros_at, torch.uint8))[:n_out, :n_groups]


def pack_left(left: Tensor) -> Tensor:
    """The left factor of a low-rank part, 16-bit floats [out, rank], as fragments [row block][rank block][step][m][lane][8]."""
    n_out, rank = left.shape
    padded = functional.pad(left, (0, -rank % BLOCK, 0, -n_out % BLOCK))
    fragments = _fragments(padded)  # [rb, kb, lane, step, pair = (m, b, hi), e]
    return fragments.unflatten(4, (TILES, 4)).permute(0, 1, 3, 4, 2, 5, 6).contiguous()


def read_left(packed: Tensor, n_out: int, rank: int) -> Tensor:
    """The inverse of `pack_left`."""
    return _unfragmented(packed.permute(0, 1, 4, 2, 3, 5, 6).flatten(4, 5))[:n_out, :rank]


def table(buffer: Tensor, layout: CudaLayout, start: int, dtype: torch.dtype) -> Tensor:
    """Scales or zero points in the buffer: [row blocks, groups, 8 (g), 8 (m, hi)]."""
    n = layout.row_blocks * layout.n_groups * BLOCK
    return buffer[start : start + n * dtype.itemsize].view(dtype).view(layout.row_blocks, layout.n_groups, 8, 8)


def _fragments(matrix: Tensor) -> Tensor:
    """[rows, inputs], whole blocks -> [row block, input block, lane (g, t), step (h, s), pair (m, b, hi), e]."""
    blocked = matrix.unflatten(0, (-1, TILES, 2, 8)).unflatten(-1, (-1, 2, 4, 2, 2, 2))  # rb m hi g | kb h t s b e
    lanes = blocked.permute(0, 4, 3, 6, 5, 7, 1, 8, 2, 9)  # rb kb g t h s m b hi e
    return lanes.flatten(6, 8).flatten(4, 5).flatten(2, 3)


def _unfragmented(lanes: Tensor) -> Tensor:
    split = lanes.unflatten(4, (TILES, 2, 2)).unflatten(3, (2, 2)).unflatten(2, (8, 4))  # rb kb g t h s m b hi e
    blocked = split.permute(0, 6, 8, 2, 1, 4, 3, 5, 7, 9)  # rb m hi g | kb h t s b e
    return blocked.flatten(4).flatten(0, 3)


def _places(bits: int) -> list[list[tuple[int, int, int]]]:
    """Of each pair: (word, bit of the half, bit of the code) of every bit it has."""
    if bits == 3:
        whole = [[(p // 5, p % 5 * 3 + i, i) for i in range(3)] for p in range(15)]
        return [*whole, [(i, 15, i) for i in range(3)]]
    per_word = 16 // bits
    return [[(p // per_word, p % per_word * bits + i, i) for i in range(bits)] for p in range(16)]


def _words(lanes: Tensor, bits: int) -> Tensor:
    """[rb, kb, lane, step, pair, e] uint8 -> int32 [rb, kb, lane, step, word]."""
    halves = torch.zeros(*lanes.shape[:4], bits, 2, dtype=torch.int32, device=lanes.device)
    for pair, places in enumerate(_places(bits)):
        codes = lanes[..., pair, :].int()  # [..., e]
        for word, bit, i in places:
            halves[..., word, :] |= (codes >> i & 1) << bit
    return halves[..., 0] | halves[..., 1] << 16


def _unworded(words: Tensor, bits: int) -> Tensor:
    halves = torch.stack((words & 0xFFFF, words >> 16 & 0xFFFF), dim=-1)  # [..., word, e]
    lanes = torch.zeros(*words.shape[:4], 16, 2, dtype=torch.uint8, device=words.device)
    for pair, places in enumerate(_places(bits)):
        for word, bit, i in places:
            lanes[..., pair, :] |= ((halves[..., word, :] >> bit & 1) << i).to(torch.uint8)
    return lanes


def _vectors(words: Tensor) -> Tensor:
    """[rb, kb, lane, step, word] -> [rb, kb, vector, lane, 4]: 16 bytes of each lane side by side."""
    return words.flatten(3).unflatten(3, (-1, 4)).transpose(2, 3).contiguous()


def _unvectored(vectors: Tensor) -> Tensor:
    return vectors.transpose(2, 3).flatten(3).unflatten(3, (STEPS, -1))


def _padded(values: Tensor, layout: CudaLayout) -> Tensor:
    n_out, n = values.shape
    return functional.pad(values, (0, layout.n_groups - n, 0, layout.row_blocks * BLOCK - n_out))


def _rows_to_lanes(values: Tensor) -> Tensor:
    """[rows, groups] -> [rb, groups, g, (m, hi)]."""
    return values.unflatten(0, (-1, 8, 8)).permute(0, 3, 2, 1)  # rows are rb (m hi) g


def _lanes_to_rows(lanes: Tensor) -> Tensor:
    return lanes.permute(0, 3, 2, 1).flatten(0, 2)
