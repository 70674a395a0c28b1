"""Integer grids, one number at a time."""

from __future__ import annotations


def grid_reference(values: list[float], bits: int, symmetric: bool) -> tuple[float, int]:
    """Scale and zero point of one group, scales in full precision."""
    low, high = min(0.0, *values), max(0.0, *values)
    if symmetric:
        high = max(-low, high)
        low = -high
    if low == high == 0:
        low, high = -1.0, 1.0
    scale = (high - low) / (2**bits - 1)
    return scale, 2 ** (bits - 1) if symmetric else round(-low / scale)


def round_reference(value: float, scale: float, zero_point: int, bits: int) -> int:
    """The code of the nearest grid value."""
    return min(range(2**bits), key=lambda code: abs((code - zero_point) * scale - value))
