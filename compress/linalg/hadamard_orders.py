"""For which widths there is a Hadamard matrix, and what it is made of. Torch-free: the plan asks.

    H_n = H_K1 (x) H_K2 (x) ... (x) H_2^p,   n = K1 K2 ... 2^p                                       (`factors`)

H_2^p is Sylvester's. The *cores* K are those that `compress/linalg/hadamard.py` can build:

    Paley I         K = q + 1,     q = 3 mod 4, q a prime or a power of one
    Paley II        K = 2 (q + 1), q = 1 mod 4, likewise
    Goethals-Seidel K = 92, 116, 156, 172

Of several cores for the odd part o of n, the least of 4 o, 8 o, ...; where there is none up to LARGEST_CORE, o is split:
231 = 3 * 7 * 11 gives 12, 28, 44. A width without a matrix here (13696 = 2^7 * 107, and odd ones) takes a block-diagonal one:
blocks of the `largest_block`, or of a size that is asked for.

What H_n is must not change: models in which half of it is merged are stored.
"""

from __future__ import annotations

import math
from functools import lru_cache

LARGEST_CORE = 256  # a larger dense factor costs more than what it saves in mixing

# K: n, the multiplier m, and for each circulant the entries -1 of its first row: all s m^i mod n of the s listed.
SEQUENCES: dict[int, tuple[int, int, tuple[tuple[int, ...], ...]]] = {
    92: (23, 22, ((1, 2, 4, 6), (1, 2, 5, 7, 9), (3, 4, 5, 8, 9), (1, 2, 4, 5, 9, 10, 11))),
    116: (29, 28, ((1, 2, 4, 7, 8, 9), (1, 3, 6, 7, 8, 10, 11), (3, 6, 11, 12, 13), (1, 3, 5, 6, 7, 8, 11, 14))),
    156: (39, 16, ((3, 4, 6, 7, 8, 13, 14), (1, 3, 6, 7, 14, 17, 19), (1, 2, 6, 7, 12, 13, 17, 19, 21),
                   (1, 4, 8, 12, 13, 17, 26))),
    172: (43, 37, ((1, 2, 3), (2, 3, 4, 9), (3, 5, 9), (2, 9, 10))),
}  # fmt: skip


@lru_cache(maxsize=256)
def largest_block(n: int) -> int:
    """The largest divisor of n with a Hadamard matrix: n itself where it can be."""
    return max(d for d in range(1, n + 1) if n % d == 0 and factors(d) is not None)


@lru_cache(maxsize=1024)
def factors(n: int) -> tuple[int, ...] | None:
    """Orders of the matrices whose Kronecker product H_n is: cores, then a power of two (at least 1); None if there are none."""
    twos = n & -n
    cores = _cores(n // twos, twos)
    return None if cores is None else (*cores, n // math.prod(cores))


def _cores(odd: int, twos: int) -> tuple[int, ...] | None:
    """Cores for an odd number, whose powers of two multiply to at most `twos`."""
    if odd == 1:
        return ()
    order = 4 * odd
    while order <= min(LARGEST_CORE, odd * twos):
        if order in SEQUENCES or paley(order):
            return (order,)
        order *= 2
    for part in range(3, odd, 2):
        first = _cores(part, twos) if odd % part == 0 else None
        if first is not None:
            rest = _cores(odd // part, twos * part // math.prod(first))
            if rest is not None:
                return (*first, *rest)
    return None


def paley(order: int) -> tuple[int, int, bool] | None:
    """p, k, and whether it is the second construction, for q = p^k; None if neither gives this order."""
    for q, residue, second in ((order - 1, 3, False), (order // 2 - 1, 1, True)):
        base = _prime_power(q)
        if base is not None and q % 4 == residue:
            return (*base, second)
    return None


def _prime_power(q: int) -> tuple[int, int] | None:
    if q < 2:
        return None
    p = next((d for d in range(2, math.isqrt(q) + 1) if q % d == 0), q)
    k = 1
    while p**k < q:
        k += 1
    return (p, k) if p**k == q else None
