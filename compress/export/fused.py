"""The linears of a model, and which of them servers run as one matrix: q, k, v; gate and up; all experts of a block."""

from __future__ import annotations

from compress.checkpoint.standard import linear_names
from compress.models.architecture import Architecture

FUSED = {("q_proj", "k_proj", "v_proj"): "qkv_proj", ("gate_proj", "up_proj"): "gate_up_proj"}


def all_linears(architecture: Architecture) -> list[str]:
    """Every linear by name on disk, routers and heads included, in the order of the model."""
    in_sites = [name for site in architecture.all_sites() if site.kind != "embedding" for name in site.linears]
    return list(dict.fromkeys([*in_sites, *linear_names(architecture)]))


def fused_linears(architecture: Architecture) -> dict[str, tuple[str, ...]]:
    """The name that servers give the whole -> its parts, by name on disk."""
    found: dict[str, tuple[str, ...]] = {}
    for block, sites in zip(architecture.blocks, architecture.block_sites, strict=True):
        experts = tuple(name for site in sites if site.expert is not None for name in site.linears)
        if experts and architecture.experts is not None:
            found[f"{block}.{architecture.experts.name}"] = experts
        for site in sites:
            ends = tuple(name.rpartition(".")[2] for name in site.linears)
            if site.expert is None and ends in FUSED:
                found[f"{site.linears[0].rpartition('.')[0]}.{FUSED[ends]}"] = site.linears
    return found
