"""Codes of 1 to 8 bits in 32-bit words: a dense bit stream, low bits first, as compressed-tensors packs them.

Code i of a row lies at bits i * bits .. (i + 1) * bits - 1 of the row's stream; words are little-endian, so the stream
of words is also a stream of bytes. In bytes the pattern repeats after at most 8 codes, and a code touches at most two
bytes: packing is one shift and one or for each of those positions, over all periods at once.
"""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

CHUNK = 1 << 20  # codes handled at a time: bounds the temporaries, whatever the size of the matrix


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes [rows, n], integers 0 .. 2^bits - 1 -> words int32 [rows, ceil(n * bits / 32)]."""
    n_rows, n = codes.shape
    words = torch.empty(n_rows, -(-n * bits // 32), dtype=torch.int32, device=codes.device)
    for rows in _chunks(n_rows, n):
        words[rows] = _pack(codes[rows].to(torch.uint8), bits)
    return words


def unpack(words: Tensor, bits: int, n: int) -> Tensor:
    """The inverse of `pack`: words [rows, ceil(n * bits / 32)] -> codes uint8 [rows, n]."""
    n_rows = words.shape[0]
    codes = torch.empty(n_rows, n, dtype=torch.uint8, device=words.device)
    for rows in _chunks(n_rows, n):
        codes[rows] = _unpack(words[rows], bits, n)
    return codes


def unpack_entries(words: Tensor, bits: int, index: Tensor) -> Tensor:
    """Some of the codes packed along the first dimension: words [words, columns] -> uint8 [len(index), columns]."""
    bit = index.long() * bits
    word, shift = bit // 32, (bit % 32).unsqueeze(-1)
    low = words[word].long() & 0xFFFFFFFF
    high = (
        words[(word + 1).clamp(max=words.shape[0] - 1)].long() << 32
    )  # read only where a code runs over its word's end
    return (((low | high) >> shift) & (2**bits - 1)).to(torch.uint8)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    """(codes - zero_point) * scale, in the dtype of `scale`; the difference is exact there, the product rounded.

    Args:
        codes: uint8 [rows, n].
        scale: [rows, groups], groups of n / groups columns.
        zero_point: uint8 [rows, groups]; None: 2^(bits-1).

    Returns: [rows, n].
    """
    steps = codes.to(scale.dtype).unflatten(1, (scale.shape[1], -1))  # [rows, groups, group_size]
    steps.sub_(2 ** (bits - 1) if zero_point is None else zero_point.to(scale.dtype).unsqueeze(-1))
    return steps.mul_(scale.unsqueeze(-1)).flatten(1)


def _pack(codes: Tensor, bits: int) -> Tensor:
    n_rows, n = codes.shape
    period, width = _pattern(bits)  # codes, bytes
    n_periods = -(-n // period)
    codes = torch.nn.functional.pad(codes, (0, n_periods * period - n)).view(n_rows, n_periods, period)
    stream = codes.new_zeros(n_rows, n_periods, width)
    for position in range(period):
        byte, shift = divmod(position * bits, 8)
        stream[..., byte] |= codes[..., position] << shift
        if shift + bits > 8:
            stream[..., byte + 1] |= codes[..., position] >> (8 - shift)
    n_bytes = -(-n * bits // 32) * 4  # the padding of either kind is zero: cutting it or adding to it loses nothing
    stream = stream.view(n_rows, n_periods * width)
    stream = torch.nn.functional.pad(stream, (0, n_bytes - n_periods * width))
    return stream.reshape(-1).view(torch.int32).view(n_rows, n_bytes // 4)


def _unpack(words: Tensor, bits: int, n: int) -> Tensor:
    n_rows = words.shape[0]
    period, width = _pattern(bits)
    n_periods = -(-n // period)
    stream = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    stream = torch.nn.functional.pad(stream, (0, n_periods * width - stream.shape[1])).view(n_rows, n_periods, width)
    if bits == 8:
        return stream.view(n_rows, n)
    codes = stream.new_empty(n_rows, n_periods, period)
    for position in range(period):
        byte, shift = divmod(position * bits, 8)
        code = stream[..., byte] >> shift
        if shift + bits > 8:
            code |= stream[..., byte + 1] << (8 - shift)
        torch.bitwise_and(code, 2**bits - 1, out=codes[..., position])
    return codes.view(n_rows, n_periods * period)[:, :n]


def _pattern(bits: int) -> tuple[int, int]:
    """Codes and bytes after which the layout repeats."""
    common = gcd(bits, 8)
    return 8 // common, bits // common


def _chunks(n_rows: int, n: int) -> list[slice]:
    step = max(1, CHUNK // max(n, 1))
    return [slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step)]
