"""Ranks of all layers under one budget of bytes: `allocation` of `svd`.

The budget is keep_ratio times the bytes that the layers would take if they stayed dense, later steps applied to both sides: with
`gptq` behind, dense layers and factors are counted in its bits. Every allocation spends it to less than one step of a rank.

    loss             where it lowers the expected loss of the model most:
                     rise of the loss ~ 1/2 sum over layers and i > k of  mean (g . u_i)^2  sigma_i^2
    effective_rank   in proportion to exp of the entropy of the singular values
    energy           the same share of the outputs' energy kept in every layer
    heavy_tail       one threshold for the singular values of all layers, each layer's scaled to 0 .. 1 (WeLore)
    lorap            of attention, v and o three times the share of q and k (LoRAP); the rest as if uniform
    learned          by gradient through truncated outputs (Dobi-SVD)

sigma_i and u_i are the singular values and left vectors of W S, S S^T = M of the objective, on the inputs of the original
model, streamed block by block. g is the gradient of a text's log-likelihood by the outputs of the layer: its squares stand for
second derivatives (empirical Fisher). One backward pass through the whole model gives it for all layers; its means settle soon,
GRADIENT_TOKENS are enough, and a sketch of it is all that is kept (compress/methods/whole_model.py).

Sources: WeLore, Jaiswal et al., 2024, arXiv:2407.11239; LoRAP, Li et al., 2024, arXiv:2404.09695; Dobi-SVD, Wang et al., 2025,
arXiv:2502.02723. Fisher information in this place: FWSVD, Hsu et al., 2022, arXiv:2207.00112, which weighs inputs by it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import cast

import numpy as np
import torch
from torch import Tensor

from compress.calibration.statistics import SecondMoment, SiteStatistics
from compress.errors import NumericsError, RecipeError
from compress.linalg.low_rank import directions, spectrum
from compress.linalg.quadratic import row_energy
from compress.linalg.ranks import (
    Array,
    Candidate,
    Rule,
    candidate,
    check_budget,
    lorap_ranks,
    proportional,
    spend,
    uniform_rank,
)
from compress.methods.base import Extent, Kept, Layer, LayerShape, Sizes, View, shared
from compress.methods.dobi_svd import DobiSVD, DobiSVDConfig
from compress.methods.dobi_svd_ranks import Costs, learned_ranks
from compress.methods.rtn import check_weight
from compress.methods.svd import EIGEN_FLOPS, SVDConfig, moment_of
from compress.methods.whole_model import SKETCH_ROWS, backward_bytes, gradient_sketches
from compress.modules.low_rank_spec import LowRankSpec

GRADIENT_TOKENS = 16384  # of the calibration tokens, at least a batch
COMMON = ("allocation", "steps", "learning_rate")  # settings that are of all layers together
ROLES = {"q", "k", "v", "o"}
Ranks = dict[str, int | None]


@dataclass(frozen=True)
class Offer:
    """What a layer can become, and for how many bytes."""

    shape: LayerShape
    multiple: int
    ratio: Fraction
    bytes_at: Callable[[int], int]
    dense_bytes: int

    @property
    def full(self) -> int:
        return min(self.shape.out_features, self.shape.in_features)

    @property
    def share(self) -> Fraction:
        """Of the budget."""
        return self.ratio * self.dense_bytes

    @property
    def least_bytes(self) -> int:
        return min(self.bytes_at(self.multiple), self.dense_bytes)

    @property
    def uniform(self) -> int:
        return uniform_rank(self.shape.out_features, self.shape.in_features, float(self.ratio), self.multiple)

    def bytes_of(self, rank: int | None) -> int:
        return self.dense_bytes if rank is None else self.bytes_at(rank)

    def proportional(self, wanted: float) -> Candidate:
        return proportional(wanted, self.full, self.multiple, self.bytes_at, self.dense_bytes)


def offers_of(shapes: Mapping[str, LayerShape], configs: Mapping[str, SVDConfig], nbytes: Sizes) -> dict[str, Offer]:
    def offer(name: str, config: SVDConfig) -> Offer:
        out_features, in_features = shapes[name].out_features, shapes[name].in_features
        return Offer(
            shapes[name],
            config.rank_multiple,
            Fraction(str(config.keep_ratio)),  # as written: 0.29 of 100 is 29
            lambda rank: nbytes(name, LowRankSpec(in_features, out_features, rank)),
            nbytes(name, None),
        )

    return {name: offer(name, config) for name, config in configs.items()}


def check(shapes: Mapping[str, LayerShape], configs: Mapping[str, SVDConfig], nbytes: Sizes) -> None:
    """What `SVD.foresee` refuses. Raises: RecipeError."""
    settings = _common(configs)
    offers = offers_of(shapes, configs, nbytes)
    budget, least = budget_of(offers), sum(offer.least_bytes for offer in offers.values())
    dense = sum(offer.dense_bytes for offer in offers.values())
    check_budget(budget, least, dense, [offer.multiple for offer in offers.values()])
    if settings.allocation == "lorap" and not {shape.role for shape in shapes.values()} >= ROLES:
        raise RecipeError(
            "allocation=lorap shares bytes among q, k, v and o of attention, but not all four are layers of this step (they are "
            "fused, or left out); use another allocation"
        )


def settle(view: View, configs: Mapping[str, SVDConfig]) -> dict[str, SVDConfig | Kept]:
    """The rank of every layer: what `SVD.observe` answers."""
    settings = _common(configs)
    offers = offers_of(view.shapes, configs, view.nbytes)
    rules = {"loss": _by_loss, "lorap": _lorap, "learned": _learned}
    ranks = rules.get(settings.allocation, _by_spectra)(view, configs, offers)
    spent = sum(offers[name].bytes_of(rank) for name, rank in ranks.items())
    view.note(f"svd: ranks settled by allocation={settings.allocation}: {spent:,} of {budget_of(offers):,} bytes")
    return {
        name: Kept("its rank is so high that factors would take no fewer bytes than the layer itself")
        if ranks[name] is None
        else config.model_copy(update={"rank": ranks[name]})
        for name, config in configs.items()
    }


def budget_of(offers: Mapping[str, Offer]) -> int:
    return int(sum(offer.share for offer in offers.values()))


def _common(configs: Mapping[str, SVDConfig]) -> SVDConfig:
    return shared(configs, COMMON, "one budget is spent by one rule; use two steps, or override other settings only")


def _spend(offers: Mapping[str, Offer], candidates: Sequence[Candidate], budget: int | None = None) -> Ranks:
    return dict(zip(offers, spend(candidates, budget_of(offers) if budget is None else budget), strict=True))


# ---- by spectra


def _by_spectra(view: View, configs: Mapping[str, SVDConfig], offers: Mapping[str, Offer]) -> Ranks:
    rule = cast(Rule, _common(configs).allocation)
    return _by_worth(offers, {layer.name: spectrum_of(layer, known) for layer, known in _reached(view)}, rule)


def _by_loss(view: View, configs: Mapping[str, SVDConfig], offers: Mapping[str, Offer]) -> Ranks:
    worth = expected_losses(view, list(configs))
    ranks = _by_worth(offers, worth, "loss")
    mine, uniform = (
        sum(float(worth[name][rank:].sum()) for name, rank in own.items() if rank is not None and name in worth)
        for own in (ranks, {name: offer.uniform for name, offer in offers.items()})
    )
    view.note(f"svd: expected to raise the loss by {mine:.4f} nats per token; uniform ranks by {uniform:.4f}")
    return ranks


def _by_worth(offers: Mapping[str, Offer], found: Mapping[str, Array], rule: Rule) -> Ranks:
    """Directions by what they are worth; a layer of which nothing was found has its uniform rank."""
    unseen: Ranks = {name: offer.uniform for name, offer in offers.items() if name not in found}
    seen = {name: offer for name, offer in offers.items() if name in found}
    candidates = [
        candidate(
            found[name],
            offer.shape.out_features,
            offer.shape.in_features,
            rule,
            multiple=offer.multiple,
            bytes_at=offer.bytes_at,
            dense_bytes=offer.dense_bytes,
            importance=float(np.sum(found[name])) if rule == "loss" else 1.0,
        )
        for name, offer in seen.items()
    ]
    left = budget_of(offers) - sum(offers[name].bytes_of(rank) for name, rank in unseen.items())
    return _spend(seen, candidates, left) | unseen


def _reached(view: View) -> Iterator[tuple[Layer, SiteStatistics | None]]:
    """Every layer with what is known of its inputs, less those for which that is nothing: no calibration token came."""
    for site, statistics in view.sites():
        if statistics is None or statistics.n_tokens:
            for layer in site.layers:
                check_weight(layer)
                yield layer, statistics


def spectrum_of(layer: Layer, known: SiteStatistics | None) -> Array:
    """sigma_i^2 under the objective."""
    try:
        return spectrum(layer.weight, None if known is None else moment_of(layer.config, known)).cpu().numpy()
    except NumericsError as error:
        raise NumericsError(f"{layer.name}: svd: {error}") from None


def expected_losses(view: View, names: Sequence[str]) -> dict[str, Array]:
    """What leaving out each direction of a layer is expected to raise the loss per token by, in nats.

        1/2  mean (g_t . u_i)^2  sum_t (u_i . W x_t)^2 / n_tokens

    Without the layers that no calibration token reached.
    """
    try:
        sketches = gradient_sketches(view, names, GRADIENT_TOKENS)
    except NumericsError as error:
        raise NumericsError(f"svd: {error}") from None
    n_tokens = sum(ids.numel() for ids in view.batches)
    found = {}
    for layer, known in _reached(view):
        assert known is not None, layer.name  # no objective that goes with it is without data
        try:
            energies, basis = directions(layer.weight, moment_of(layer.config, known))
        except NumericsError as error:
            raise NumericsError(f"{layer.name}: svd: {error}") from None
        if layer.config.objective != "whitened":  # their energies are not those of the outputs
            energies = row_energy(basis.T @ layer.weight.double(), known[SecondMoment()].double()).clamp(min=0)
        felt = (sketches[layer.name].to(basis) @ basis).square().sum(0)  # [min(out, in)]
        found[layer.name] = (0.5 * felt * energies / n_tokens).cpu().numpy()
    return found


# ---- without spectra


def _lorap(view: View, configs: Mapping[str, SVDConfig], offers: Mapping[str, Offer]) -> Ranks:
    def numbers(offer: Offer) -> int:
        return offer.shape.out_features * offer.shape.in_features

    wanted = {
        name: float(offer.ratio * numbers(offer) / (offer.shape.out_features + offer.shape.in_features))
        for name, offer in offers.items()
    }
    for group in _attentions(view):
        own = {role: offers[name] for role, name in group.items()}
        ratio = sum(offer.ratio * numbers(offer) for offer in own.values()) / sum(map(numbers, own.values()))
        ranks = lorap_ranks({r: (o.shape.out_features, o.shape.in_features) for r, o in own.items()}, float(ratio))
        wanted |= {group[role]: math.inf if rank is None else rank for role, rank in ranks.items()}
    return _spend(offers, [offer.proportional(wanted[name]) for name, offer in offers.items()])


def _attentions(view: View) -> list[dict[str, str]]:
    """Role -> layer, of each block that has all four."""
    groups: dict[int | None, dict[str, str]] = {}
    for name, shape in view.shapes.items():
        if shape.role is not None:
            groups.setdefault(view.blocks[name], {})[shape.role] = name
    return [group for group in groups.values() if group.keys() == ROLES]


def _learned(view: View, configs: Mapping[str, SVDConfig], offers: Mapping[str, Offer]) -> Ranks:
    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    own = list(offers.values())
    slopes = [(offer.bytes_at(2 * offer.multiple) - offer.bytes_at(offer.multiple)) / offer.multiple for offer in own]
    costs = Costs(
        column([offer.full for offer in own]),
        column(slopes),
        column([offer.dense_bytes for offer in own]),
        column([int(offer.share) for offer in own]),
        tuple(offer.multiple for offer in own),
    )

    def settled(fractions: Tensor) -> list[int | None]:
        wanted = [fraction * offer.full for fraction, offer in zip(fractions.tolist(), own, strict=True)]
        return spend([offer.proportional(rank) for offer, rank in zip(own, wanted, strict=True)], budget_of(offers))

    ranks = learned_ranks(view, list(offers), _learning(_common(configs)), costs, settled)
    return dict(zip(offers, ranks, strict=True))


def _learning(config: SVDConfig) -> DobiSVDConfig:
    return DobiSVDConfig(remap=False, steps=config.steps, learning_rate=config.learning_rate)


# ---- what it costs


def observation_bytes(extent: Extent, config: SVDConfig) -> int:
    """Of the whole model, where it is looked at. Spectra need no more than the factorisation itself."""
    if config.allocation == "learned":
        return DobiSVD.observation_bytes(extent, _learning(config))
    if config.allocation != "loss":
        return 0
    outputs = sum(shape.out_features for shape in extent.shapes) // max(extent.n_blocks, 1)
    sketches = SKETCH_ROWS * sum(shape.out_features for shape in extent.shapes)
    return 4 * (extent.n_weights + sketches) + backward_bytes(extent, extent.batch_tokens * outputs)


def observation_flops(shapes: tuple[LayerShape, ...], config: SVDConfig) -> float:
    """Of a site: its eigenvalues; `loss` takes vectors too, and gradients by two forward passes and a backward one."""
    if config.allocation == "learned":
        return DobiSVD.observation_flops(shapes, _learning(config))
    if config.allocation == "lorap":
        return 0.0
    by_loss, total = config.allocation == "loss", 0.0
    for s in shapes:
        small = min(s.out_features, s.in_features)
        total += EIGEN_FLOPS * (1.0 if by_loss else 1 / 3) * small**3 + 8.0 * s.out_features * s.in_features * (
            s.in_features + small
        )
        total += 6.0 * GRADIENT_TOKENS * s.out_features * s.in_features if by_loss else 0.0
    return total
