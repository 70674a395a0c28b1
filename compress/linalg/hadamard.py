"""Hadamard matrices of every width that language models have, and a fast product with them.

    x -> x H  (`transformed`),  x -> x H^T  (`transformed(..., transposed=True)`),  H H^T = I,  entries +-1/sqrt(n)

H acts on row vectors from the right everywhere, so an activation x H meets a weight W H: (x H)(W H)^T = x W^T. H^T = H holds for
powers of two and for little else.

    H_n = H_K1 (x) H_K2 (x) ... (x) H_2^p,   n = K1 K2 ... 2^p               (which: compress/linalg/hadamard_orders.py)

H_2^p is Sylvester's, the p-th Kronecker power of [[1, 1], [1, -1]]. The cores K are built, not tabulated:

    Paley I         K = q + 1,     q = 3 mod 4        I + S,   S = [[0, 1], [-1, Q]]
    Paley II        K = 2 (q + 1), q = 1 mod 4        S (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]],   S = [[0, 1], [1, Q]]
    Goethals-Seidel K = 92, 116, 156, 172             four circulants A, B, C, D with A A^T + B B^T + C C^T + D D^T = K I

where Q[a, b] = chi(a - b), chi the quadratic character of the field of q elements. What the four circulants need is found by
search; SEQUENCES says which.

The fast product reshapes x to [K1, K2, ..., 32, 32, 16] and multiplies each axis by its small matrix: n (K1 + ... + 16)
multiplications in a few batched products, which on CPU and GPU is faster than n log2 n additions in as many passes.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from compress.linalg.hadamard_orders import SEQUENCES, factors, largest_block, paley

AXIS_BITS = 5  # 2^5 = 32: on one core, 14336 = 28 * 16 * 32 takes half the time of 112 * 128, and a quarter of 28 * 512


def transformed(x: Tensor, block_size: int | None = None, transposed: bool = False) -> Tensor:
    """x H, or x H^T, along the last axis; H block-diagonal with blocks of `block_size`.

    Args:
        x: [..., n], any float dtype. float64 is computed in float64, all else in float32.
        block_size: B, a divisor of n with a Hadamard matrix; None: the `largest_block` of n.

    Returns: [..., n], contiguous, in the dtype of x.
    """
    n = x.shape[-1]
    block = largest_block(n) if block_size is None else block_size
    if n % block or factors(block) is None:
        raise ValueError(f"{n} has no blocks of {block} with a Hadamard matrix; {largest_block(n)} is the largest")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    out, behind = x.to(dtype), 1  # behind: the size of the axes that have been transformed, from the last one on
    for small in reversed(_axes_on(block, dtype, x.device)):
        k = small.shape[0]
        matrix = small.T if transposed else small
        if behind == 1:
            out = out.reshape(-1, k) @ matrix
        else:
            out = out.view(-1, k, behind)
            out = torch.bmm(matrix.T.expand(len(out), k, k), out)
        behind *= k
    return (out * (1 / math.sqrt(block))).to(x.dtype).reshape(x.shape)


def hadamard(n: int, block_size: int | None = None) -> Tensor:
    """H [n, n], float64: entries +-1/sqrt(B) in blocks of B = `block_size` (None: the `largest_block`), 0 outside them."""
    return transformed(torch.eye(n, dtype=torch.float64, device="cpu"), block_size)


def random_signs(n: int, generator: torch.Generator) -> Tensor:
    """[n] of +-1, float64: diag(signs) H is a random Hadamard matrix."""
    return torch.randint(0, 2, (n,), generator=generator, device=generator.device).double() * 2 - 1


def random_hadamard(n: int, generator: torch.Generator, block_size: int | None = None) -> Tensor:
    """diag(signs) H [n, n], float64."""
    return random_signs(n, generator)[:, None].cpu() * hadamard(n, block_size)


def random_orthogonal(n: int, generator: torch.Generator) -> Tensor:
    """An orthogonal matrix [n, n], uniform (Haar): Q of a Gaussian matrix, with the signs that make R's diagonal positive."""
    gaussian = torch.randn(n, n, generator=generator, dtype=torch.float64, device=generator.device)
    q, r = torch.linalg.qr(gaussian)
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)


@lru_cache(maxsize=64)
def axes(n: int) -> tuple[Tensor, ...]:
    """The small matrices of +-1, int8, whose Kronecker product is sqrt(n) H_n: cores as they are, the power of two in parts."""
    orders = factors(n)
    assert orders is not None, n
    bits = orders[-1].bit_length() - 1
    parts = -(-bits // AXIS_BITS)
    sylvester = tuple(_sylvester((bits + i) // parts) for i in range(parts))
    return (*(core(order) for order in orders[:-1]), *sylvester)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept may be needed by a backward pass later
def _axes_on(n: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    return tuple(axis.to(device, dtype) for axis in axes(n))


@lru_cache(maxsize=64)
def core(order: int) -> Tensor:
    """A Hadamard matrix [order, order] of +-1, int8, by the construction for that order. 36 for one: Paley II over 17."""
    if order in SEQUENCES:
        return _goethals_seidel(*SEQUENCES[order])
    found = paley(order)
    assert found is not None, order
    p, k, second = found
    q = p**k
    s = torch.ones(q + 1, q + 1, dtype=torch.int8, device="cpu")
    s[0, 0] = 0
    s[1:, 1:] = jacobsthal(p, k)
    one = torch.eye(q + 1, dtype=torch.int8, device="cpu")
    if second:
        return torch.kron(s, _signs([[1, 1], [1, -1]])) + torch.kron(one, _signs([[1, -1], [-1, -1]]))
    s[1:, 0] = -1
    return one + s


def jacobsthal(p: int, k: int) -> Tensor:
    """Q[a, b] = chi(a - b) [q, q], int8: 1 where a - b is a square of the field of q = p^k elements, -1 where it is not, 0 for 0.

    Elements are polynomials of degree < k over the integers mod p, numbered by their coefficients as digits.
    """
    q = p**k
    chi = torch.zeros(q, dtype=torch.int8, device="cpu")
    for power, element in enumerate(_powers(p, k)):
        chi[sum(c * p**i for i, c in enumerate(element))] = 1 if power % 2 == 0 else -1
    place = p ** torch.arange(k, device="cpu")
    digits = torch.arange(q, device="cpu")[:, None] // place % p  # [q, k]
    difference = (digits[:, None] - digits[None]) % p  # [q, q, k]
    return chi[(difference * place).sum(-1)]


def _powers(p: int, k: int) -> list[tuple[int, ...]]:
    """1, x, x^2, ... modulo the first monic polynomial of degree k of which x generates all q - 1 elements other than 0."""
    one = (1,) + (0,) * (k - 1)
    for tail in product(range(p), repeat=k):  # x^k = sum_i tail[i] x^i
        powers: list[tuple[int, ...]] = []
        element = one
        while len(powers) < p**k - 1:
            powers.append(element)
            top = element[-1]
            element = tuple((low + top * c) % p for low, c in zip((0, *element[:-1]), tail, strict=True))
            if element in (one, (0,) * k):
                break
        if len(powers) == p**k - 1 and element == one:
            return powers
    raise AssertionError("every finite field has a primitive element")


def _goethals_seidel(n: int, multiplier: int, minus: tuple[tuple[int, ...], ...]) -> Tensor:
    """The array of four circulants and the matrix R that reverses the order of rows."""
    place = torch.arange(n, device="cpu")
    index = (place - place[:, None]) % n
    circulants = []
    for listed in minus:
        row = torch.ones(n, dtype=torch.int8, device="cpu")
        for s in listed:
            entry = s
            while row[entry] == 1:
                row[entry] = -1
                entry = entry * multiplier % n
        circulants.append(row[index])
    a, b, c, d = circulants
    br, cr, dr = b.flip(1), c.flip(1), d.flip(1)
    bt, ct, dt = b.T.flip(1), c.T.flip(1), d.T.flip(1)
    rows = ((a, br, cr, dr), (-br, a, dt, -ct), (-cr, -dt, a, bt), (-dr, ct, -bt, a))
    return torch.cat([torch.cat(row, dim=1) for row in rows])


def _sylvester(bits: int) -> Tensor:
    matrix = _signs([[1]])
    for _ in range(bits):
        matrix = torch.kron(_signs([[1, 1], [1, -1]]), matrix)
    return matrix


def _signs(rows: list[list[int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int8, device="cpu")  # not where a surrounding `torch.device` says
