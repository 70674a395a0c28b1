"""The residual stream of a decoder, as data: who writes to it, who reads it, through which norms. Names on disk; no torch.

    x = sum of embeddings;   per block   x += writers(... readers(norm(x)));   logits = head(final_norm(x))

A model whose stream looks like this may be written down in another basis: every reader W becomes W R, every writer R^T W,
every embedding E R, for one orthogonal R, and computes the same. `stream_of` says so, or refuses by name and with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from compress.errors import RecipeError
from compress.models.architecture import Architecture, Site


@dataclass(frozen=True)
class Branch:
    """What one norm feeds, up to what is added to the stream.

    `readers` have the normed stream as their input: linears, and the router of a mixture of experts. The outputs of
    `writers` are added to the stream.
    """

    kind: Literal["attention", "mlp"]
    norm: str
    readers: tuple[str, ...]
    writers: tuple[str, ...]


@dataclass(frozen=True)
class ValueHeads:
    """Where the values of each key/value head lie, and who reads them.

    Rows `starts[j] : starts[j] + head_dim` of linear `values` (rows are outputs) are the values of head j; input columns
    `i * head_dim : (i + 1) * head_dim` of linear `output` are those of query head i, which reads value head
    i // (n_heads / n_kv_heads).
    """

    values: str
    starts: tuple[int, ...]
    output: str
    n_heads: int
    n_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Stream:
    """One model's residual stream.

    Attributes:
        size: of the stream, by config.json.
        embeddings: tables whose rows are written to it: tokens, then positions if they are learned.
        branches: per block, attention before MLP.
        parallel: both branches of a block read what enters the block; else the MLP reads what attention has added to.
        heads: per block.
        layer_norm: norms subtract the mean of the stream as well (LayerNorm); else they divide by its size only.
        norm_offset: added to a norm's stored weight before it scales.
        tied: the head's weight is the token table's.
    """

    size: int
    embeddings: tuple[str, ...]
    branches: tuple[tuple[Branch, Branch], ...]
    parallel: bool
    heads: tuple[ValueHeads, ...]
    final_norm: str
    head: str
    layer_norm: bool
    norm_offset: float
    tied: bool
    transposed: bool  # weights of the linears in the blocks are stored [in, out]
    one_width: bool  # transformers' code has the stream as wide behind the last block as before the first


def stream_of(architecture: Architecture) -> Stream:
    """The residual stream of a model.

    Raises: RecipeError naming the family and the reason if its stream cannot be written down in another basis.
    """
    family, settings = architecture.table, architecture.settings

    def refuse(reason: str) -> RecipeError:
        return RecipeError(f"{family.title} ({architecture.model_type}): {reason}")

    if family.bound is not None:
        raise refuse(family.bound)
    width = settings.get("word_embed_proj_dim") or architecture.hidden_size
    if width != architecture.hidden_size:
        raise refuse(
            f"its token table has {width} columns, projected to the {architecture.hidden_size} of the stream: another basis "
            f"would need another projection"
        )
    if family.attn_norm is None or family.mlp_norm is None or architecture.final_norm is None:
        raise refuse("its norms do not stand before attention, MLP and head, so their scales belong to no reader")
    if not architecture.structure.plain:
        raise refuse("it was rewritten before; begin with the original")
    return stream_of_structure(architecture)


def stream_of_structure(architecture: Architecture) -> Stream:
    """The stream of a model that is known to have one, because it was rewritten."""
    family, settings = architecture.table, architecture.settings
    attn_norm, mlp_norm, final_norm = family.attn_norm, family.mlp_norm, architecture.final_norm
    assert attn_norm is not None and mlp_norm is not None and final_norm is not None
    branches = []
    for block, sites in zip(architecture.blocks, architecture.block_sites, strict=True):
        routers = (f"{block}.{architecture.experts.router}",) if architecture.experts and _sparse(sites) else ()
        branches.append(
            (
                Branch("attention", f"{block}.{attn_norm}", _linears(sites, "attn_in"), _linears(sites, "attn_out")),
                Branch(
                    "mlp",
                    f"{block}.{mlp_norm}",
                    _linears(sites, "mlp_in", "expert_in") + routers,
                    _linears(sites, "mlp_out", "expert_out"),
                ),
            )
        )
    return Stream(
        size=architecture.hidden_size,
        embeddings=architecture.embeddings,
        branches=tuple(branches),
        parallel=bool(settings.get("use_parallel_residual", False)),
        heads=tuple(_heads(architecture, settings, family.value_layout, sites) for sites in architecture.block_sites),
        final_norm=final_norm,
        head=architecture.head.linears[0],
        layer_norm=family.layer_norm,
        norm_offset=architecture.norm_offset,
        tied=architecture.tied,
        transposed=architecture.transposed,
        one_width=family.one_width,
    )


def _linears(sites: tuple[Site, ...], *kinds: str) -> tuple[str, ...]:
    return tuple(name for site in sites if site.kind in kinds for name in site.linears)


def _sparse(sites: tuple[Site, ...]) -> bool:
    return any(site.expert is not None for site in sites)


def _heads(architecture: Architecture, settings: Mapping[str, Any], layout: str, sites: tuple[Site, ...]) -> ValueHeads:
    n_heads = settings["num_attention_heads"]
    n_kv = settings.get("num_key_value_heads") or n_heads
    size = settings.get("head_dim") or architecture.hidden_size // n_heads
    values = _linears(sites, "attn_in")[-1]
    if layout == "fused":  # all queries, then all keys, then all values
        first, step = (n_heads + n_kv) * size, size
    elif layout == "by_head":  # query, key and value of the first head, of the second, …
        first, step = 2 * size, 3 * size
    else:
        first, step = 0, size
    starts = tuple(first + j * step for j in range(n_kv))
    return ValueHeads(values, starts, _linears(sites, "attn_out")[0], n_heads, n_kv, size)
