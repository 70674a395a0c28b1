"""The order of a stack: which block of which layer is worth its bytes most.

    levels   the paper's. At level b = 1, 2, … every layer has b blocks; each layer alone gets one more, and the perplexity of
             that model is measured. The blocks of level b + 1 are sorted by it, best first, and follow those of level b: at
             any size, layers differ by one block at most.
    proxy    one measurement for each layer, in place of one for each layer and level: c, how much the loss of the whole
             stack's model rises if this layer alone keeps its first block only. What is left of a layer after b blocks is e_b,
             the squared error of its outputs as a share of the outputs' own (inputs taken as uncorrelated), ||R_b||^2 /
             ||W s||^2; taking the loss as proportional to it, the b-th block takes c (e_(b-1) - e_b) / e_1 away. The next
             block is always that which takes most per byte; layers may differ by any number of blocks. Without data, c = e_1.

A perplexity that is no number says nothing of its layer. It is replaced by that of the next level plus the largest of this
one, so that the layer comes last; of the proxy, by the largest rise of all, so that it comes first.
"""

from __future__ import annotations

import heapq
import math
import statistics
from collections.abc import Mapping, Sequence

from compress.methods.base import StackView

Order = list[tuple[str, int]]  # (module, level); the levels of a module in rising order

LEAST = 0.05  # of the median rise of the loss: smaller ones, and negative ones, are noise


def by_proxy(view: StackView, measured: bool) -> Order:
    """Blocks by how much loss a byte of them takes away. `measured`: with one loss for each layer."""
    left = {name: [1.0, *_residuals(view.figures[name], len(sizes))] for name, sizes in view.levels.items()}
    if measured:
        last = max(len(sizes) for sizes in view.levels.values())
        whole, alone = view.loss(last), view.losses(list(view.levels), 1, last)
        rises = credible({name: loss - whole for name, loss in alone.items()})
        left = {
            name: [rises[name] / max(shares[1], 1e-30) * share for share in shares] for name, shares in left.items()
        }
    return greedy(left, view.levels)


def _residuals(figures: Mapping[str, float], n_levels: int) -> list[float]:
    return [figures[f"residual_{level}"] for level in range(1, n_levels + 1)]


def credible(rises: Mapping[str, float]) -> dict[str, float]:
    """Rises of a loss, none below `LEAST` of the median of those that are positive, and those that are no numbers the largest."""
    positive = [rise for rise in rises.values() if math.isfinite(rise) and rise > 0]
    least, most = LEAST * statistics.median(positive or [1.0]), max(positive, default=1.0)
    return {name: max(rise, least) if math.isfinite(rise) else most for name, rise in rises.items()}


def greedy(left: Mapping[str, Sequence[float]], sizes: Mapping[str, Sequence[int]]) -> Order:
    """Levels 1, 2, … of every module, always next that with the largest fall of `left` per byte; ties go by name.

    Args:
        left: module -> error without any level, then behind each.
        sizes: module -> bytes of each level.
    """
    order: Order = []
    heap: list[tuple[float, str, int]] = []

    def offer(name: str, level: int) -> None:
        if level < len(sizes[name]):
            gain = (left[name][level] - left[name][level + 1]) / sizes[name][level]
            heapq.heappush(heap, (-gain, name, level))

    for name in sizes:
        offer(name, 1)
    while heap:
        _, name, level = heapq.heappop(heap)
        order.append((name, level))
        offer(name, level + 1)
    return order


def by_levels(view: StackView) -> Order:
    """The paper's search."""
    last = max(len(sizes) for sizes in view.levels.values())
    scores: list[dict[str, float]] = []
    for level in range(1, last):
        modules = [name for name, sizes in view.levels.items() if len(sizes) > level]
        scores.append(view.losses(modules, level + 1, level))
    n_bad = sum(not math.isfinite(value) for found in scores for value in found.values())
    if n_bad:
        n_all = sum(map(len, scores))
        view.note(f"bitstack: {n_bad} of {n_all} perplexities are no numbers; their blocks come last in their level")
    return sorted_levels(scores)


def sorted_levels(scores: Sequence[Mapping[str, float]]) -> Order:
    """Level after level, each sorted by its scores, ascending; `scores[i]` are of level i + 1. Ties go by name."""
    filled: list[dict[str, float]] = []
    following: Mapping[str, float] = {}
    for found in reversed(scores):
        finite = [value for value in found.values() if math.isfinite(value)]
        worst = max(finite, default=0.0)
        mended = {n: v if math.isfinite(v) else worst + following.get(n, worst) for n, v in found.items()}
        filled.insert(0, mended)
        following = mended
    return [
        (name, level)
        for level, found in enumerate(filled, start=1)
        for name in sorted(found, key=lambda name: (found[name], name))
    ]
