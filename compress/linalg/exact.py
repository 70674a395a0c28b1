"""Products in float64 that are the same to the last bit, whatever else is computed with them.

The rows of a table are made when they are asked for, a few or all. A matrix product adds in an order that depends on how
many rows there are; what differs in the last bit of a float64 is, once in some ten million entries, another float32.
Sums without rounding have no order. Numbers that are multiples of one power of two have such sums as long as they stay
within 53 bits:

    x = x_1 + x_2 + rest,   x_1 and x_2 multiples of 2^(e - BITS) and 2^(e - 2 BITS), 2^e > max |x| of the row; M likewise
    x M = x_1 M_1 + (x_1 M_2 + x_2 M_1),   each product exact up to n = 2^(53 - 2 BITS)

The error is 2^(-2 BITS) of the largest entries of row and matrix, far below a rounding to float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

BITS = 19  # 2 * 19 + 15 = 53: rows of up to 2^15 entries


def fixed_point(x: Tensor, bits: int) -> Tensor:
    """Each row of x [..., n], float64, rounded to multiples of 2^(e - bits), 2^e > max |x| of the row."""
    if x.numel() == 0:
        return x
    _, exponent = torch.frexp(x.abs().amax(-1, keepdim=True))
    return torch.ldexp(torch.ldexp(x, bits - exponent).round_(), exponent - bits)


def exact_product(x: Tensor, matrix: Tensor) -> Tensor:
    """x M [..., m] for x [..., n] and M [n, m], float64: a row of the result depends on that row of x only."""
    x, matrix = x.double(), matrix.double()
    assert x.shape[-1] <= 2 ** (53 - 2 * BITS), x.shape
    high = fixed_point(x, BITS)
    low = fixed_point(x - high, BITS)
    matrix_high, matrix_low = _parts(matrix)
    return high @ matrix_high + (high @ matrix_low + low @ matrix_high)


def _parts(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Of a matrix as a whole: one exponent for all of it."""
    flat = matrix.reshape(1, -1)
    high = fixed_point(flat, BITS)
    return high.view_as(matrix), fixed_point(flat - high, BITS).view_as(matrix)
