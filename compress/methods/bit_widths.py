"""Widths of layers that differ, at the bytes of one width for all: `widths` of the methods that store codes.

    minimise  sum over layers of  1/2 mean_t (g_t . (W - Q_b) x_t)^2   over the width b of each,   bytes <= those of `bits`

Q_b is the weight as the method rounds it at b bits, what learns by GPTQ, on the inputs x of the original model; g is the
gradient of a text's log-likelihood by the layer's outputs (its squares stand for second derivatives). g and x are taken as
independent, so that a sketch of g and the second moment of x suffice: 1/2 tr(S D H D^T S^T) / n_tokens, D = W - Q_b
(compress/methods/whole_model.py). Error feedback must be in Q_b: where inputs are few and alike, as in a first block, it takes
away most of what rounding to nearest loses, elsewhere little.

Layers that share their input may be held to one width (`together`), as servers that fuse them want it.

Bit allocation by first-order costs and a program over layers: LQ-LoRA, Guo et al., 2023, arXiv:2311.12023; by gradients: HAWQ-V3,
Yao et al., 2021, arXiv:2011.10680.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from compress.calibration.statistics import SecondMoment, SiteStatistics
from compress.errors import NumericsError, RecipeError
from compress.linalg.quadratic import energy
from compress.linalg.ranks import choose
from compress.methods.base import Extent, Kept, Layer, LayerShape, SiteMethod, SiteTask, Sizes, View
from compress.methods.whole_model import SKETCH_ROWS, backward_bytes, gradient_sketches

WIDTHS_MEANING = (
    "bits that each layer may have, chosen where they lower the loss most at the bytes of `bits` for all; looks at the whole "
    "model first"
)
TOGETHER_MEANING = "of widths: layers that share their input have one, as servers that fuse them need it"
GRADIENT_TOKENS = 16384  # of the calibration tokens, at least a batch


class MixedWidths(SiteMethod):
    """Base of methods whose config has `bits`, `widths`, `together` and a grid."""

    @classmethod
    def observes(cls, config: Any) -> bool:
        return config.widths is not None

    @classmethod
    def foresee(cls, shapes: Mapping[str, LayerShape], configs: dict[str, Any], nbytes: Sizes) -> None:
        shapes = {name: shape for name, shape in shapes.items() if configs[name].widths is not None}
        least = sum(min(_sizes(cls, shape, configs[name], nbytes)) for name, shape in shapes.items())
        budget = sum(_bytes_at(cls, shape, configs[name], configs[name].bits, nbytes) for name, shape in shapes.items())
        if least > budget:
            raise RecipeError(
                f"{len(shapes)} layers take {least:,} bytes at the least of their widths, and {budget:,} at bits for all; "
                f"give widths that begin below bits"
            )

    @classmethod
    def observe(cls, view: View, configs: dict[str, Any]) -> dict[str, Any]:
        try:
            sketches = gradient_sketches(view, list(configs), GRADIENT_TOKENS)
        except NumericsError as error:
            raise NumericsError(f"{cls.name}: {error}") from None
        costs: dict[str, dict[int, float]] = {}
        sites: dict[str, str] = {}
        generator = view.generator("widths")
        for site, known in view.sites():
            sites |= {layer.name: site.name if layer.config.together else layer.name for layer in site.layers}
            if known is not None and known.n_tokens:
                costs |= costs_of(cls, site, sketches, known, generator)
        found = _chosen(cls, view, configs, costs, sites)
        seen = [name for name in configs if name in costs]
        mine = sum(costs[name][found[name]] for name in seen)
        uniform = sum(costs[name].get(configs[name].bits, 0.0) for name in seen)
        view.note(f"{cls.name}: expected to raise the loss by {mine:.4f} nats per token; one width by {uniform:.4f}")
        return {
            name: config.model_copy(update={"bits": found[name], "widths": None}) for name, config in configs.items()
        }

    @classmethod
    def observation_bytes(cls, extent: Extent, config: Any) -> int:
        outputs = sum(shape.out_features for shape in extent.shapes) // max(extent.n_blocks, 1)
        sketches = SKETCH_ROWS * sum(shape.out_features for shape in extent.shapes)
        return 4 * (extent.n_weights + sketches) + backward_bytes(extent, extent.batch_tokens * outputs)

    @classmethod
    def observation_flops(cls, shapes: tuple[LayerShape, ...], config: Any) -> float:
        """Gradients by two forward passes and a backward one; at each width the rounding, and its error's cost."""
        method, rounding = cls.probe(config)
        numbers = sum(s.out_features * s.in_features for s in shapes)
        felt = 2.0 * SKETCH_ROWS * sum(s.in_features * (s.out_features + s.in_features) for s in shapes)
        return 6.0 * GRADIENT_TOKENS * numbers + len(config.widths or ()) * (felt + method.flops(shapes, rounding))

    @classmethod
    def probe(cls, config: Any) -> tuple[type[SiteMethod], Any]:
        """What rounds for the costs, and its settings."""
        return cls, config


def costs_of(
    method: type[MixedWidths],
    site: SiteTask,
    sketches: Mapping[str, Tensor],
    known: SiteStatistics,
    generator: torch.Generator,
) -> dict[str, dict[int, float]]:
    """What each width of each layer is expected to raise the loss per token by, in nats.

    Args:
        sketches: S [rows, out_features] of the gradients by each layer's outputs.
    """
    moment = known.values.get(SecondMoment())
    found: dict[str, dict[int, float]] = {layer.name: {} for layer in site.layers}
    for bits in sorted({bits for layer in site.layers for bits in (*layer.config.widths, layer.config.bits)}):
        by_method: dict[type[SiteMethod], list[Layer]] = {}
        for layer in site.layers:
            rounding, config = method.probe(layer.config)
            own = config.model_copy(update={"bits": bits, "widths": None})
            by_method.setdefault(rounding, []).append(replace(layer, config=own))
        for rounding, layers in by_method.items():
            outcomes = rounding.compress(SiteTask(site.name, tuple(layers)), known, generator)
            for layer in layers:
                error = outcomes[layer.name].module.dense(torch.float32).sub_(layer.weight)
                felt = sketches[layer.name].to(error) @ error
                found[layer.name][bits] = 0.5 * energy(felt, moment) / (known.n_tokens if moment is not None else 1)
    return found


def _chosen(
    method: type[SiteMethod],
    view: View,
    configs: Mapping[str, Any],
    costs: Mapping[str, Mapping[int, float]],
    sites: Mapping[str, str],
) -> dict[str, int]:
    """The width of each layer; of one that nothing is known of, that of all."""
    groups: dict[str, list[str]] = {}
    for name in costs:
        groups.setdefault(sites[name], []).append(name)

    def size(name: str, bits: int) -> int:
        return _bytes_at(method, view.shapes[name], configs[name], bits, view.nbytes)

    offers: list[list[tuple[int, float]]] = []
    widths: list[Sequence[int]] = []
    for names in groups.values():
        common = sorted(set.intersection(*(set(configs[name].widths) for name in names)))
        if not common:
            raise RecipeError(f"{', '.join(names)}: share an input, but no width; give them one in common")
        widths.append(common)
        offers.append([(sum(size(n, b) for n in names), sum(costs[n][b] for n in names)) for b in common])
    budget = sum(size(name, configs[name].bits) for name in costs)
    at = choose(offers, budget)
    found = {name: config.bits for name, config in configs.items()}
    for names, own, place in zip(groups.values(), widths, at, strict=True):
        found |= dict.fromkeys(names, own[place])
    return found


def _bytes_at(method: type[SiteMethod], shape: LayerShape, config: Any, bits: int, nbytes: Sizes) -> int:
    spec = method.plan(shape, config.model_copy(update={"bits": bits, "widths": None}))
    return nbytes(shape.name, None if isinstance(spec, Kept) else spec)


def _sizes(method: type[SiteMethod], shape: LayerShape, config: Any, nbytes: Sizes) -> list[int]:
    return [_bytes_at(method, shape, config, bits, nbytes) for bits in config.widths]
