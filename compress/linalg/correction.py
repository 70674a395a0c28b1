"""A matrix as the sum of a rounded one and one of low rank, found by turns.

    minimise  e = tr((W - Q - L R) M (W - Q - L R)^T),   Q = quant(...) on its grid, L [out, k], R [k, in]

M is the second moment H of the inputs, its diagonal, or the identity (compress/linalg/low_rank.py). For a given Q the best
pair is known exactly: the rank-k truncation of W - Q under M. For a given pair, Q = quant(W - L R) is a good choice and no
more: rounding is not a projection, and its grids follow what they are fitted to. So the error may rise from one round to the
next. Every Q is judged with its own best pair, and the best of all is kept.

    rounding first   Q_1 = quant(W), then the pair of W - Q_1, Q_2 = quant(W - L_1 R_1), ...      LoftQ; LQER is its first round
    low rank first   the pair of W itself, Q_1 = quant(W - L_0 R_0), the pair of W - Q_1, ...     LQ-LoRA

With the low rank first, quant(W) is judged beside the others: whatever the order, the result has no more error than quant(W)
alone, and none than quant(W) with the pair that suits it.

Sources: Zhang et al., 2024, arXiv:2402.02446 (LQER); Li et al., 2023, arXiv:2310.08659 (LoftQ); Guo et al., 2023,
arXiv:2311.12023 (LQ-LoRA).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

from compress.linalg.krylov import leading
from compress.linalg.low_rank import decompose, factors

Kept = TypeVar("Kept")


@dataclass(frozen=True)
class Pair:
    """left [out, rank] and right [rank, in], float64. `loss`: what they leave of the matrix that they were fitted to, under M;
    `total`: of how much."""

    left: Tensor
    right: Tensor
    loss: float
    total: float

    def product(self) -> Tensor:
        """left @ right in float32."""
        return (self.left @ self.right).float()


def best_pair(matrix: Tensor, rank: int, moment: Tensor | None) -> Pair:
    """The pair of `rank` closest to `matrix` [out, in] under `moment` (as in `decompose`). Raises: NumericsError."""
    few = leading(matrix, rank, moment)
    if few is None:
        found = decompose(matrix, rank, moment)
        return Pair(*factors(matrix, found.basis), found.loss, found.total)
    return Pair(*factors(matrix, few.basis), max(few.total - few.held, 0.0), few.total)


class Alternation(Generic[Kept]):
    """The turns of one matrix. Whoever rounds asks for `target`, and hands back what became of it, until `finished`.

    Attributes:
        best: the best pair so far; `kept`: what came with its Q.
        losses: e of every Q so far, each with its own best pair.
        alone: e of the first quant(W) without a pair.
    """

    best: Pair
    kept: Kept

    def __init__(self, weight: Tensor, rank: int, moment: Tensor | None, rounds: int, low_rank_first: bool):
        """`rounds` >= 1: how many Q there are at most, quant(W) not counted where the low rank comes first."""
        self.weight, self.rank, self.moment = weight, rank, moment
        self.left = rounds + low_rank_first
        self.by_turns = self.left > 1  # more than one rounding is allowed
        self.starts_low = low_rank_first
        self.target = weight
        self.losses: list[float] = []
        self.alone = math.nan

    @property
    def finished(self) -> bool:
        return self.left == 0

    def take(self, rounded: Tensor, kept: Kept) -> None:
        """`rounded`, Q [out, in] in float32, is what became of `target`. Raises: NumericsError."""
        pair = best_pair(self.weight - rounded, self.rank, self.moment)
        if not self.losses:
            self.alone = pair.total
        if not self.losses or pair.loss < self.best.loss:
            self.best, self.kept = pair, kept
        n_before = (
            len(self.losses) - self.starts_low
        )  # Q of this order; quant(W) is none where the low rank comes first
        worse = n_before > 0 and pair.loss >= self.losses[-1]
        self.losses.append(pair.loss)
        self.left = 0 if worse else self.left - 1
        if self.left:
            again = self.starts_low and len(self.losses) == 1
            self.target = self.weight - (best_pair(self.weight, self.rank, self.moment) if again else pair).product()

    @property
    def loss(self) -> float:
        return self.best.loss
