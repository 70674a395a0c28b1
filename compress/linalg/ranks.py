"""How many directions of each layer are kept: rules on shapes and spectra. Pure functions, torch-free.

A *spectrum* is the energies sigma_i^2 of a layer, falling (`low_rank.spectrum`); leaving out all behind the first k loses
sum_{i>k} sigma_i^2. Two factors of rank k hold k (out + in) numbers in place of out * in, so ranks from out * in / (out + in)
on, the *break-even*, are worth nothing: such a layer stays dense.

Rules for one layer:
    uniform_rank      from a ratio of bytes, the same for every layer
    energy_rank       the least rank that keeps a share of the energy
    effective_rank    exp of the entropy of the singular values: how many directions there are, softly counted
Rules for a whole model: each gives every direction of every layer a score, and one threshold over all layers does the rest.
    "loss"            sigma_i^2 per byte, times what the layer's energy is worth: least sum of losses (greedy)
    "heavy_tail"      (sigma_i - min) / (max - min): WeLore, arXiv:2407.11239
    "energy"          the share of energy that is left from i on: the same share kept in every layer
    "effective_rank"  -i / effective rank: ranks in proportion to effective ranks
    "uniform"         -i (out + in) / (out * in)
What energy is worth differs between layers by orders of magnitude, and between directions of one layer: an error here dies
out, one there reaches the logits. As fractions of each layer's own energy, losses do not compare (on the model that ships every
rule that compares them does worse than the uniform one). Rule "loss" is for energies that have been weighed, direction by
direction, by what the model's loss is expected to rise by; `importance` is then their sum.

Ranks that are known up to a factor (learned, or LoRAP's) become scores by `proportional`.

`spend` takes directions by falling score while the budget of bytes lasts. `choose` does it for any set of choices, along
the lower convex hull of loss over bytes, on which the greedy choice is optimal up to one step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from compress.errors import RecipeError

Rule = Literal["loss", "heavy_tail", "energy", "effective_rank", "uniform"]
Array = NDArray[np.float64]

LORAP_BIAS = 3.0  # LoRAP's `a`: how many times the rank of q and k goes to v and o


# ---- one layer


def break_even_rank(out_features: int, in_features: int) -> int:
    """The largest rank whose factors are smaller than the layer; 0 if none is."""
    return (out_features * in_features - 1) // (out_features + in_features)


def rounded_rank(rank: int, multiple: int) -> int:
    """`rank` down to a multiple of `multiple`, but at least that."""
    return max(rank // multiple, 1) * multiple


def uniform_rank(out_features: int, in_features: int, keep_ratio: float, multiple: int = 1) -> int:
    """The largest rank whose factors hold at most `keep_ratio` of the layer's numbers, down to a multiple, at least that."""
    ratio = Fraction(str(keep_ratio))  # as written: 0.29 * 100 is 29
    return rounded_rank(int(ratio * out_features * in_features / (out_features + in_features)), multiple)


def energy_rank(energies: ArrayLike, share: float) -> int:
    """The least rank that keeps at least `share` of the sum of `energies`; 1 where there is none."""
    kept = np.cumsum(_spectrum(energies))
    return min(int(np.searchsorted(kept, share * kept[-1] * (1 - 1e-12))) + 1, len(kept))


def effective_rank(energies: ArrayLike) -> float:
    """exp(-sum p_i log p_i), p_i = sigma_i / sum sigma: from 1 to the number of directions, reached where all are equal.

    Source: Roy and Vetterli, 2007. 0 where all energies are 0.
    """
    values = np.sqrt(_spectrum(energies))
    if values[0] == 0:
        return 0.0
    p = values[values > 0] / values.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def lorap_ranks(
    shapes: Mapping[str, tuple[int, int]], keep_ratio: float, bias: float = LORAP_BIAS
) -> dict[str, int | None]:
    """LoRAP's ranks of the four attention linears: v and o get `bias` times the share of q and k.

    With k0 the uniform rank at `keep_ratio`: 2 bias / (1 + bias) k0 for v and o, 2 / (1 + bias) k0 for q and k. Where that
    reaches the break-even of v or o, both stay dense (None) and q and k share what is left of `keep_ratio` of all four. The paper
    has square matrices; here each has the k0 of its own shape, so grouped key and value heads are as good.

    Args:
        shapes: (out, in) of "q", "k", "v", "o".

    Raises: RecipeError where dense v and o leave nothing for q and k.
    Source: Li et al., 2024, arXiv:2404.09695.
    """
    more, less = 2 * bias / (1 + bias), 2 / (1 + bias)
    uniform = {name: keep_ratio * m * n / (m + n) for name, (m, n) in shapes.items()}
    if all(int(more * uniform[name]) <= break_even_rank(*shapes[name]) for name in "vo"):
        shares = dict.fromkeys("vo", more) | dict.fromkeys("qk", less)
        return {name: max(int(shares[name] * rank), 1) for name, rank in uniform.items()}
    sizes = {name: m * n for name, (m, n) in shapes.items()}
    left = keep_ratio * sum(sizes.values()) - sizes["v"] - sizes["o"]
    ratio = left / (sizes["q"] + sizes["k"])
    ranks = {name: int(ratio * sizes[name] / sum(shapes[name])) for name in "qk"}
    if min(ranks.values()) < 1:
        raise RecipeError(
            f"keep_ratio={keep_ratio:g}: dense v and o leave nothing for q and k; raise keep_ratio, or use another allocation"
        )
    return {**ranks, "v": None, "o": None}


# ---- a whole model


@dataclass(frozen=True)
class Candidate:
    """What one layer can become: what each choice costs, and how much the step up to it is worth.

    Attributes:
        ranks: rising; the first is the least that the layer can have, the last is None: dense.
        costs: bytes of each, rising.
        scores: of the step to each from the one before, falling from the second on (the first step is always taken).
    """

    ranks: Sequence[int | None]
    costs: Sequence[int]
    scores: Sequence[float]


def candidate(
    energies: ArrayLike,
    out_features: int,
    in_features: int,
    rule: Rule,
    *,
    multiple: int = 1,
    bytes_at: Callable[[int], int] | None = None,
    dense_bytes: int | None = None,
    importance: float = 1.0,
) -> Candidate:
    """A layer as `spend` takes it: ranks while they are cheaper than the dense layer, then that.

    The last step, to dense, has the score of the rank that would come next: past the break-even all the directions that
    are left cost less than one more of them.

    Args:
        energies: its spectrum, [min(out, in)]; rule "loss": of any order, what each direction is worth.
        multiple: of which all ranks are.
        bytes_at: bytes stored at a rank; by default 2 * rank * (out + in), as for 16-bit factors.
        dense_bytes: by default 2 * out * in.
        importance: rule "loss": what the layer's whole energy is worth beside that of others. 1: as much as theirs.
    """
    values = _spectrum(energies)
    bytes_at = bytes_at or (lambda rank: 2 * rank * (out_features + in_features))
    dense_bytes = 2 * out_features * in_features if dense_bytes is None else dense_bytes
    ranks = np.arange(multiple, max(len(values) // multiple, 1) * multiple + 1, multiple)
    costs = [bytes_at(int(rank)) for rank in ranks]
    scores = _scores(values, np.minimum(ranks, len(values)), np.diff(costs, prepend=0), rule)
    if rule == "uniform":
        scores *= (out_features + in_features) / (out_features * in_features)
    if rule == "loss":
        scores = _falling(scores * importance, np.diff(costs, prepend=0))
    n_cheaper = sum(cost < dense_bytes for cost in costs)
    last = scores[n_cheaper] if n_cheaper < len(scores) else scores[-1]
    return Candidate(
        [*ranks[:n_cheaper].tolist(), None],
        [*costs[:n_cheaper], dense_bytes],
        [*scores[:n_cheaper].tolist(), float(last)],
    )


def proportional(
    wanted: float, full: int, multiple: int, bytes_at: Callable[[int], int], dense_bytes: int
) -> Candidate:
    """A layer whose rank is to be in proportion to `wanted`, infinity where it is to be dense; the rest as in `candidate`."""
    ranks = [rank for rank in range(multiple, full + 1, multiple) if bytes_at(rank) < dense_bytes]
    steps = [*ranks, (ranks[-1] if ranks else 0) + multiple]  # the last: where dense begins
    return Candidate([*ranks, None], [*map(bytes_at, ranks), dense_bytes], [-rank / wanted for rank in steps])


def _falling(scores: Array, costs: NDArray[np.int64]) -> Array:
    """`scores` per cost of successive steps, those that rise taken together with the ones before: a step that is worth little
    may lead to one that is worth more."""
    pooled: list[tuple[float, int, int]] = []  # score, cost, steps
    for score, cost in zip(scores.tolist(), costs.tolist(), strict=True):
        steps = 1
        while pooled and pooled[-1][0] < score:
            before, before_cost, before_steps = pooled.pop()
            score = (score * cost + before * before_cost) / (cost + before_cost)
            cost, steps = cost + before_cost, steps + before_steps
        pooled.append((score, cost, steps))
    return np.repeat([score for score, _, _ in pooled], [steps for _, _, steps in pooled])


def _scores(values: Array, ranks: NDArray[np.int64], costs: NDArray[np.int64], rule: Rule) -> Array:
    """Of the step to each of `ranks` from the one before, which costs `costs`."""
    total = max(float(values.sum()), np.finfo(float).tiny)
    if rule == "loss":
        return np.diff(np.cumsum(values)[ranks - 1] / total, prepend=0.0) / costs
    if rule == "heavy_tail":
        return heavy_tail(values)[ranks - 1]
    if rule == "energy":
        return np.cumsum(values[::-1])[::-1][ranks - 1] / total
    if rule == "effective_rank":
        return -ranks / max(effective_rank(values), 1e-9)
    return -ranks.astype(np.float64)


def spend(layers: Sequence[Candidate], budget: int) -> list[int | None]:
    """A rank for each layer, None where it stays dense, by falling scores, so that all together take at most `budget` bytes.

    Every layer has its first choice. Steps are then taken by score, over all layers, while they fit; equal scores in turn.

    Raises: RecipeError if the first choices take more than `budget`.
    """
    at = [0] * len(layers)
    left = budget - sum(layer.costs[0] for layer in layers)
    if left < 0:
        raise RecipeError(
            f"a budget of {budget:,} bytes cannot be met: the least ranks of {len(layers)} layers take {budget - left:,}; "
            f"raise the budget, or leave layers out"
        )
    steps = [(-layer.scores[step], step, i) for i, layer in enumerate(layers) for step in range(1, len(layer.ranks))]
    full: set[int] = set()  # their next step did not fit
    for _, step, i in sorted(steps):
        cost = layers[i].costs[step] - layers[i].costs[step - 1]
        if i in full or cost > left:
            full.add(i)
            continue
        left -= cost
        at[i] = step
    return [layer.ranks[step] for layer, step in zip(layers, at, strict=True)]


def check_budget(budget: int, least: int, dense: int, multiples: Sequence[int]) -> None:
    """Raises: RecipeError, with the fraction that works, where the least ranks take more than the budget.

    Args:
        budget, least, dense: bytes of all layers: allowed, at their least ranks, and in 16 bits.
        multiples: what the rank of each layer is a multiple of.
    """
    if least > budget:
        each, ratio = ", ".join(map(str, sorted(set(multiples)))), math.ceil(1e4 * least / dense) / 1e4
        raise RecipeError(
            f"a budget of {budget:,} bytes cannot be met: {len(multiples)} layers at their least ranks (a multiple of {each}) "
            f"take {least:,}; use a keep_ratio of at least {ratio:g}, smaller groups, or leave layers out"
        )


def choose(choices: Sequence[Sequence[tuple[int, float]]], budget: int) -> list[int]:
    """One of its choices for each layer, with little loss in all for at most `budget` bytes.

    Args:
        choices: per layer (bytes, loss), in any order.

    Returns: an index into each layer's choices. The sum of losses exceeds the least possible by at most what the first
        step that no longer fitted would have gained.
    Raises: RecipeError if the cheapest choices take more than `budget`.
    """
    hulls = [_lower_hull(own) for own in choices]
    left = budget - sum(own[hull[0]][0] for own, hull in zip(choices, hulls, strict=True))
    if left < 0:
        raise RecipeError(
            f"a budget of {budget:,} bytes cannot be met: the cheapest choices take {budget - left:,}; raise the budget"
        )
    steps = []
    for i, (own, hull) in enumerate(zip(choices, hulls, strict=True)):
        for step, (before, after) in enumerate(pairwise(hull), start=1):
            gain = own[before][1] - own[after][1]
            steps.append((-gain / (own[after][0] - own[before][0]), step, i))
    at = [hull[0] for hull in hulls]
    full: set[int] = set()
    for _, step, i in sorted(steps):
        cost = choices[i][hulls[i][step]][0] - choices[i][at[i]][0]
        if i in full or cost > left:
            full.add(i)
            continue
        left -= cost
        at[i] = hulls[i][step]
    for i, own in enumerate(choices):  # what is left buys what lies off the hull, or was too much before
        affordable = [j for j, (cost, _) in enumerate(own) if cost - own[at[i]][0] <= left]
        best = min(affordable, key=lambda j: (own[j][1], own[j][0]))
        if own[best][1] < own[at[i]][1]:
            left -= own[best][0] - own[at[i]][0]
            at[i] = best
    return at


def rank_choices(
    energies: ArrayLike, ranks: Sequence[int], costs: Sequence[int], dense_cost: int
) -> list[tuple[int, float]]:
    """(bytes, relative loss) at each of `ranks`, and dense as the last: what `choose` takes."""
    values = _spectrum(energies)
    total = max(float(values.sum()), np.finfo(float).tiny)
    tail = np.append(np.cumsum(values[::-1])[::-1], 0.0) / total  # tail[k]: what rank k leaves out
    return [*((cost, float(tail[rank])) for rank, cost in zip(ranks, costs, strict=True)), (dense_cost, 0.0)]


# ---- WeLore


def heavy_tail(energies: ArrayLike) -> Array:
    """Singular values scaled to 0 .. 1, (sigma - min) / (max - min): few near 1 and a long tail where a layer is of low rank.

    All 1 where they are equal: such a layer has no tail.
    """
    values = np.sqrt(_spectrum(energies))
    spread = values[0] - values[-1]
    return (values - values[-1]) / spread if spread > 0 else np.ones_like(values)


def heavy_tail_rank(energies: ArrayLike, threshold: float) -> int:
    """How many scaled singular values are at least `threshold`, and at least 1."""
    return max(int((heavy_tail(energies) >= threshold).sum()), 1)


def heavy_tail_threshold(spectra: Sequence[ArrayLike], reduction: float) -> float:
    """The least threshold at which the mean over layers of the share of directions cut off is at least `reduction`.

    What the paper bisects for, found exactly. A reduction of ranks, not of bytes: below a half, on square matrices,
    factors are larger than the layer.
    """
    scaled = [heavy_tail(energies) for energies in spectra]
    values = np.concatenate(scaled)
    shares = np.concatenate([np.full(len(own), 1 / (len(own) * len(scaled))) for own in scaled])
    order = np.argsort(values, kind="stable")
    cut = np.cumsum(shares[order])  # cut[j]: share cut off by a threshold just above the j-th value
    first = int(np.searchsorted(cut, reduction - 1e-12))
    if reduction <= 0 or first >= len(values):
        return 0.0 if reduction <= 0 else 1.0
    return min(math.nextafter(float(values[order[first]]), 2.0), 1.0)


def _spectrum(energies: ArrayLike) -> Array:
    values = np.asarray(energies, dtype=np.float64)
    assert values.ndim == 1 and len(values), values.shape
    return np.maximum(values, 0.0)


def _lower_hull(choices: Sequence[tuple[int, float]]) -> list[int]:
    """Indices of the choices on the lower convex hull of loss over bytes, from the cheapest on, each with less loss."""
    hull: list[int] = []
    for i in sorted(range(len(choices)), key=lambda i: choices[i]):
        cost, loss = choices[i]
        if hull and (cost == choices[hull[-1]][0] or loss >= choices[hull[-1]][1]):
            continue
        while len(hull) > 1:
            (first_cost, first_loss), (cost_, loss_) = choices[hull[-2]], choices[hull[-1]]
            if (first_loss - loss_) * (cost - cost_) >= (loss_ - loss) * (cost_ - first_cost):
                break
            hull.pop()
        hull.append(i)
    return hull
