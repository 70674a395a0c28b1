"""Ranks of all layers under one budget of bytes: `allocation` of `svd`.

The budget is keep_ratio times the bytes that the layers would take if they stayed dense, later steps applied to both sides: with
`gptq` behind, dense layers and factors are counted in its bits. Every allocation spends it to less than one step of a rank.

    loss             where it lowers the expected loss of the model most:
                     rise of the loss ~ 1/2 sum over layers of  mean (dL/dy)^2  sum_{i>k} sigma_i^2
    effective_rank   in proportion to exp of the entropy of the singular values
    energy           the same share of the outputs' energy kept in every layer
    heavy_tail       one threshold for the singular values of all layers, each layer's scaled to 0 .. 1 (WeLore)
    lorap            of attention, v and o three times the share of q and k (LoRAP); the rest as if uniform
    learned          by gradient through truncated outputs (Dobi-SVD)

sigma_i are those of W S, S S^T = M of the objective, on the inputs of the original model, streamed block by block; y are the
outputs of a layer, L is the log-likelihood of a text. The second derivatives of L by y are taken from first ones (empirical
Fisher), and as equal in all directions. One backward pass through the whole model gives them for all layers; as means over many
numbers they settle soon: GRADIENT_TOKENS are enough.

Sources: WeLore, Jaiswal et al., 2024, arXiv:2407.11239; LoRAP, Li et al., 2024, arXiv:2404.09695; Dobi-SVD, Wang et al., 2025,
arXiv:2502.02723. Fisher information in this place: FWSVD, Hsu et al., 2022, arXiv:2207.00112, which weighs inputs by it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import cast

import numpy as np
import torch
from torch import Tensor

from compress.calibration.statistics import SecondMoment
from compress.errors import NumericsError, RecipeError
from compress.linalg.low_rank import spectrum
from compress.linalg.quadratic import energy
from compress.linalg.ranks import Array, Candidate, Rule, candidate, lorap_ranks, proportional, spend, uniform_rank
from compress.methods.base import Extent, Kept, LayerShape, Sizes, View
from compress.methods.dobi_svd import DobiSVD, DobiSVDConfig
from compress.methods.dobi_svd_ranks import Costs, learned_ranks
from compress.methods.rtn import check_weight
from compress.methods.svd import EIGEN_FLOPS, SVDConfig, moment_of
from compress.methods.whole_model import backward_bytes, next_token_loss, run_again, run_once
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
    if least > budget:
        dense = sum(offer.dense_bytes for offer in offers.values())
        multiples = {offer.multiple for offer in offers.values()}
        raise RecipeError(
            f"a budget of {budget:,} bytes cannot be met: {len(offers)} layers at their least ranks (a multiple of "
            f"{', '.join(map(str, sorted(multiples)))}) take {least:,}; use a keep_ratio of at least "
            f"{math.ceil(1e4 * least / dense) / 1e4:g}, smaller groups, or leave layers out"
        )
    if settings.allocation == "lorap" and not {shape.role for shape in shapes.values()} >= ROLES:
        raise RecipeError(
            "allocation=lorap shares bytes among q, k, v and o of attention, but not all four are layers of this step (they are "
            "fused, or left out); use another allocation"
        )


def settle(view: View, configs: Mapping[str, SVDConfig]) -> dict[str, SVDConfig | Kept]:
    """The rank of every layer: what `SVD.observe` answers."""
    settings = _common(configs)
    offers = offers_of(view.shapes, configs, view.nbytes)
    rules = {"lorap": _lorap, "learned": _learned}
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
    """The settings that all layers share. Raises: RecipeError where overrides make them differ."""
    first_name, first = next(iter(configs.items()))
    for name, config in configs.items():
        for field in COMMON:
            if getattr(config, field) != getattr(first, field):
                raise RecipeError(
                    f"{field} is {getattr(config, field)} for {name} and {getattr(first, field)} for {first_name}, but one "
                    f"budget is spent by one rule; use two steps, or override other settings only"
                )
    return first


def _spend(offers: Mapping[str, Offer], candidates: Sequence[Candidate], budget: int | None = None) -> Ranks:
    return dict(zip(offers, spend(candidates, budget_of(offers) if budget is None else budget), strict=True))


# ---- by spectra


@dataclass(frozen=True)
class Spectrum:
    """sigma_i^2 of one layer, and the energy of its outputs, per token."""

    energies: Array
    output_energy: float


def _by_spectra(view: View, configs: Mapping[str, SVDConfig], offers: Mapping[str, Offer]) -> Ranks:
    rule = cast(Rule, _common(configs).allocation)
    by_loss = rule == "loss"
    gradients = view.remember("gradients", lambda: mean_square_gradients(view, list(configs))) if by_loss else {}
    spectra = spectra_of(view)
    unseen = {
        name: offers[name].uniform for name, found in spectra.items() if found is None
    }  # nothing is known of them
    seen = {name: found for name, found in spectra.items() if found is not None}
    candidates = [
        candidate(
            found.energies,
            offers[name].shape.out_features,
            offers[name].shape.in_features,
            rule,
            multiple=offers[name].multiple,
            bytes_at=offers[name].bytes_at,
            dense_bytes=offers[name].dense_bytes,
            importance=gradients[name] * found.output_energy if by_loss else 1.0,
        )
        for name, found in seen.items()
    ]
    left = budget_of(offers) - sum(offers[name].bytes_at(rank) for name, rank in unseen.items())
    ranks = _spend({name: offers[name] for name in seen}, candidates, left) | unseen
    if by_loss:
        mine, uniform = (
            sum(expected_rise(seen[name], rank, gradients[name]) for name, rank in own.items() if name in seen)
            for own in (ranks, {name: offer.uniform for name, offer in offers.items()})
        )
        view.note(f"svd: expected to raise the loss by {mine:.4f} nats per token; uniform ranks by {uniform:.4f}")
    return ranks


def spectra_of(view: View) -> dict[str, Spectrum | None]:
    """By layer; None for one that a calibration token never reached."""
    found: dict[str, Spectrum | None] = {}
    for site, statistics in view.sites():
        for layer in site.layers:
            check_weight(layer)
            found[layer.name] = None
            if statistics is not None and not statistics.n_tokens:
                continue
            moment, n_tokens = None, 1
            if statistics is not None:
                moment, n_tokens = moment_of(layer.config, statistics), statistics.n_tokens
            try:
                energies = spectrum(layer.weight, moment).cpu().numpy() / n_tokens
            except NumericsError as error:
                raise NumericsError(f"{layer.name}: svd: {error}") from None
            total = float(energies.sum())
            if statistics is not None and layer.config.objective != "whitened":
                total = energy(layer.weight, statistics[SecondMoment()]) / n_tokens
            found[layer.name] = Spectrum(energies, total)
    return found


def expected_rise(found: Spectrum, rank: int | None, gradient: float) -> float:
    """Of the loss per token, in nats, by one layer at a rank."""
    if rank is None:
        return 0.0
    share = float(found.energies[rank:].sum()) / max(float(found.energies.sum()), np.finfo(float).tiny)
    return 0.5 * gradient * found.output_energy * share


def mean_square_gradients(view: View, names: Sequence[str]) -> dict[str, float]:
    """Mean over tokens and outputs of (dL/dy)^2, L the summed log-likelihood of a batch; 0 where no token came."""
    model = view.model()
    blocks, sums, counts = view.block_modules(model), dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)

    def watch(name: str) -> Callable[..., None]:
        def see(gradient: Tensor) -> None:
            sums[name] += float(gradient.double().square().sum())
            counts[name] += gradient.numel()

        def hook(module: torch.nn.Module, args: object, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(see)

        return hook

    def follow(module: torch.nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        (args[0] if args else kwargs["hidden_states"]).requires_grad_()

    hooks = [blocks[0].register_forward_pre_hook(follow, with_kwargs=True)]
    for name in names:
        parent, attribute = view.place(model, name)
        hooks.append(getattr(parent, attribute).register_forward_hook(watch(name)))
    run_again(blocks)
    batches = _first_tokens(view.batches)
    try:
        with torch.enable_grad(), view.track("gradients", len(batches), "batch") as advance:
            for ids in batches:
                loss = next_token_loss(model, ids)
                if not torch.isfinite(loss):
                    raise NumericsError("svd: the loss of the calibration rows is not a number; check the checkpoint")
                (loss * (ids.numel() - len(ids))).backward()
                advance(f"loss {float(loss.detach()):.4f}")
    finally:
        run_once(blocks)
        for handle in hooks:
            handle.remove()
    found = {name: sums[name] / max(counts[name], 1) for name in names}
    broken = next((name for name, value in found.items() if not math.isfinite(value)), None)
    if broken is not None:
        raise NumericsError(f"{broken}: svd: the gradient of the loss by its outputs holds NaN or infinity")
    return found


def _first_tokens(batches: Sequence[Tensor]) -> list[Tensor]:
    """The batches that hold the first GRADIENT_TOKENS tokens."""
    chosen: list[Tensor] = []
    for ids in batches:
        if sum(other.numel() for other in chosen) >= GRADIENT_TOKENS:
            break
        chosen.append(ids)
    return chosen


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
    return 4 * extent.n_weights + backward_bytes(extent, extent.batch_tokens * outputs)


def observation_flops(shapes: tuple[LayerShape, ...], config: SVDConfig) -> float:
    """Of a site: eigenvalues without vectors; gradients by two forward passes and a backward one."""
    if config.allocation == "learned":
        return DobiSVD.observation_flops(shapes, _learning(config))
    if config.allocation == "lorap":
        return 0.0
    total = 0.0
    for s in shapes:
        small = min(s.out_features, s.in_features)
        total += EIGEN_FLOPS / 3 * small**3 + 8.0 * s.out_features * s.in_features * (s.in_features + small)
        total += 6.0 * GRADIENT_TOKENS * s.out_features * s.in_features if config.allocation == "loss" else 0.0
    return total
