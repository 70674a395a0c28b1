"""One dictionary for the layers of one name in several consecutive blocks, codes for each.

    minimise  sum_l |(W_l - C_l D) L^T|^2,   L^T L = mean over l of H_l

which is the problem of one layer whose outputs are those of all, under the mean second moment of their inputs in the original
model. That mean is an approximation: the exact dictionary step would weigh each layer by its own H_l. Each layer's codes are
made for its own H_l, as its inputs are behind the blocks compressed before, by pursuit (compress/methods/cospadi.py).

Who shares follows from names: windows of `share` blocks from block 0 on. The first layer stores the dictionary. A later step
rounds it there; the others' codes are made for what was stored.

Source: CoSpaDi, 2025, after Basis Sharing, Wang et al., 2024.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from compress.calibration.statistics import SecondMoment
from compress.errors import NumericsError, RecipeError
from compress.linalg.whitening import whitening
from compress.methods.base import LayerShape, SiteTask, View, shared
from compress.methods.cospadi import CoSpaDiConfig, Member, Tell, learn
from compress.methods.cospadi_sizes import sizes_of
from compress.methods.rtn import check_weight

COMMON = tuple(name for name in CoSpaDiConfig.model_fields)


def arranged(shapes: Mapping[str, LayerShape], configs: Mapping[str, CoSpaDiConfig]) -> dict[str, CoSpaDiConfig]:
    """Every layer's settings with the layers that it shares a dictionary with.

    Raises: RecipeError where they differ in shape or settings.
    """
    windows: dict[tuple[str, int], list[str]] = {}
    for name, config in configs.items():
        place = _place(name)
        if config.share > 1 and place is not None:
            kind, block = place
            windows.setdefault((kind, block // config.share), []).append(name)
    found = {name: _alone(config) for name, config in configs.items()}
    for names in windows.values():
        if len(names) == 1:
            continue
        ordered = tuple(sorted(names, key=lambda name: _block(name)))
        together = {name: found[name] for name in ordered}
        config = shared(
            together, COMMON, "layers that share a dictionary have one size; override share too, or all of them alike"
        )
        first = shapes[ordered[0]]
        for name in ordered:
            if (shapes[name].out_features, shapes[name].in_features) != (first.out_features, first.in_features):
                raise RecipeError(
                    f"{name} is {shapes[name].out_features} x {shapes[name].in_features}, and {first.name}, whose dictionary it "
                    f"would share, {first.out_features} x {first.in_features}; use share: 1 for them (overrides)"
                )
        found |= {name: Member(**config.model_dump(exclude={"members"}), members=ordered) for name in ordered}
    return found


def observe(view: View, configs: Mapping[str, Member]) -> dict[str, CoSpaDiConfig]:
    """Learn the dictionaries and keep them, each under the name of the layer that stores it. The settings stay."""
    moments: dict[tuple[str, ...], Tensor] = {}  # of groups of layers with one input, summed over the blocks so far
    for site, statistics in view.sites():
        groups: dict[tuple[int, ...], list[str]] = {}
        for layer in site.layers:
            check_weight(layer)
            groups.setdefault(tuple(_block(name) for name in configs[layer.name].members), []).append(layer.name)
        for blocks, names in groups.items():
            key = (_kind(names[0]), *map(str, blocks))
            if statistics is not None and statistics.n_tokens:
                moment = statistics[SecondMoment()] / statistics.n_tokens
                moments[key] = moment if key not in moments else moments[key].add_(moment)
            if _block(names[0]) == blocks[-1]:
                summed = moments.pop(key, None)
                for name in names:
                    members = configs[name].members
                    view.keep(members[0], partial(_learned, view, members, configs[name], summed, site))
    return {name: _alone(config) for name, config in configs.items()}


def _learned(view: View, members: tuple[str, ...], config: Member, moment: Tensor | None, site: SiteTask) -> Tensor:
    """The dictionary of `members`, float32 [k, in], not yet rounded."""
    n_atoms, n_kept = sizes_of(view.shapes[members[0]], config, len(members))
    try:
        white = None
        rows = []
        for name in members:
            weight = view.weight(name)
            if white is None:
                eye = torch.eye(weight.shape[1], device=weight.device)
                white = whitening(eye if moment is None else moment.to(weight.device), config.damping)
            rows.append(white.forward(weight).float())
            del weight
        assert white is not None
        found = learn(
            torch.cat(rows), n_atoms, n_kept, config, view.generator(f"dictionary/{members[0]}"), Tell(site, members[0])
        )
        return white.back(found.atoms).float()
    except (NumericsError, torch.linalg.LinAlgError) as error:
        raise NumericsError(f"{members[0]}: cospadi: {' '.join(str(error).split())}") from None


def _alone(config: CoSpaDiConfig) -> CoSpaDiConfig:
    return CoSpaDiConfig(**config.model_dump(exclude={"members"}))


def _place(name: str) -> tuple[str, int] | None:
    """What a layer is called in every block, and its block; None outside the blocks."""
    found = re.search(r"\.(\d+)\.", f".{name}")
    if found is None:
        return None
    start, end = found.span(1)
    return f"{name[: start - 1]}*{name[end - 1 :]}", int(found[1])


def _block(name: str) -> int:
    place = _place(name)
    assert place is not None, name
    return place[1]


def _kind(name: str) -> str:
    place = _place(name)
    assert place is not None, name
    return place[0]
