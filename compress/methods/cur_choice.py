"""What `cur` settles once it has seen the whole model: which blocks it compresses, and the rank that holds enough of each M.

A block is worth compressing where it changes little. Its angular distance is the angle between the hidden states of the last
token of a row before it and behind it, mean over the rows, as a part of half a turn:

    d_b = mean acos(cos(h_before, h_behind)) / pi        0: nothing changes; 0.5: nothing is left; 1: the opposite

The first block, which turns embeddings into states, and the last, behind which many models normalise, are never candidates.

Source: Gromov et al., 2024, arXiv:2403.17887, for single blocks as in Park and Moon, 2025, arXiv:2501.04211.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from torch import Tensor

from compress.calibration.statistics import SecondMoment, SiteStatistics
from compress.errors import RecipeError
from compress.linalg.angles import angular_distance
from compress.linalg.low_rank import spectrum
from compress.linalg.ranks import energy_rank
from compress.methods.base import Kept, Layer, View
from compress.methods.cur import CURConfig, limited, most_rank, selection_matrix
from compress.methods.rtn import check_weight


def settle(view: View, configs: dict[str, CURConfig]) -> dict[str, Any]:
    """A config without `n_blocks` and `energy` for each layer, or that it is kept."""
    settled: dict[str, Any] = _in_chosen_blocks(view, configs)
    waiting = {name for name, choice in settled.items() if not isinstance(choice, Kept) and choice.energy is not None}
    if waiting:
        for site, statistics in view.sites():
            for layer in site.layers:
                if layer.name in waiting:
                    settled[layer.name] = _with_rank(layer, settled[layer.name], statistics)
    return settled


def angular_distances(states: list[Tensor]) -> list[float]:
    """How far each block turns the hidden state of the last token.

    Args:
        states: [rows, hidden] each: those that enter block 0, then those behind each block.
    """
    return [angular_distance(before, behind) for before, behind in pairwise(states)]


def _in_chosen_blocks(view: View, configs: dict[str, CURConfig]) -> dict[str, CURConfig | Kept]:
    wanted = {config.n_blocks for config in configs.values() if config.n_blocks is not None}
    if not wanted:
        return dict(configs)
    if len(wanted) > 1:
        raise RecipeError(f"cur: n_blocks is one number for all layers of a step, not {sorted(wanted)}")
    (n_blocks,) = wanted
    asked = {name for name, config in configs.items() if config.n_blocks is not None}
    blocks = {block for name in asked if (block := view.blocks[name]) is not None}
    candidates = sorted(block for block in blocks if 0 < block < view.n_blocks - 1)
    if n_blocks > len(candidates):
        raise RecipeError(
            f"cur: n_blocks={n_blocks}, but {len(candidates)} blocks can be chosen: those with layers of the step, and neither "
            f"the first nor the last of the model's {view.n_blocks}; use n_blocks={max(len(candidates), 1)} or less"
        )
    angles = view.remember("angles", lambda: angular_distances(list(view.states())))
    chosen = sorted(sorted(candidates, key=lambda block: (angles[block], block))[:n_blocks])
    named = ", ".join(map(str, chosen))
    view.note(
        f"cur: blocks {named} of 0 to {view.n_blocks - 1} turn their hidden states least, by " + _listed(angles, chosen)
    )
    kept = Kept(f"n_blocks={n_blocks}: blocks {named} turn their hidden states less")
    return {
        name: _settled(config, view.blocks[name] in chosen, kept) if name in asked else config
        for name, config in configs.items()
    }


def _settled(config: CURConfig, chosen: bool, kept: Kept) -> CURConfig | Kept:
    return config.model_copy(update={"n_blocks": None}) if chosen else kept


def _listed(angles: list[float], chosen: list[int]) -> str:
    return ", ".join(f"{angles[block]:.4f}" for block in chosen) + " of half a turn"


def _with_rank(layer: Layer, config: CURConfig, statistics: SiteStatistics | None) -> CURConfig | Kept:
    """The least rank that holds `energy` of M, up to a multiple, within its limits."""
    assert config.energy is not None
    check_weight(layer)
    hessian = None
    if statistics is not None and statistics.n_tokens:
        hessian = statistics.values.get(SecondMoment())
    if config.matrix == "full":
        energies = spectrum(layer.weight, hessian)
    else:
        energies = spectrum(selection_matrix(layer.weight, hessian, config.matrix))
    needed = energy_rank(energies.cpu().numpy(), config.energy)
    rank = limited(math.ceil(needed / config.rank_multiple) * config.rank_multiple, config)
    most = most_rank(layer.shape, config)
    if rank > most:
        return Kept(f"energy={config.energy:g} needs rank {rank}, and from rank {most + 1} on nothing is saved")
    return config.model_copy(update={"energy": None, "rank": rank})
