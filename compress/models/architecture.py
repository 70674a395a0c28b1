"""What a decoder consists of, as data: blocks, sites, norms, head, experts, and their names on disk.

Readable without torch: `compress plan` and the recipe checks use nothing else. The families' tables are in `tables.py`;
`skeleton.py` checks them against the real modules.

A *site* is a set of linears that share one input. Statistics of that input belong to the site, once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from compress.models.structure import Structure

if TYPE_CHECKING:
    from compress.models.tables import Family, Settings


@dataclass(frozen=True)
class Producer:
    """What a per-channel scale of a site's input can be folded into, so that the model's function stays the same.

    `kind` is "norm" (scale the norm's weight) or "rows" (scale the output rows of a linear: v for o, up for down).
    """

    name: str
    kind: Literal["norm", "rows"]


@dataclass(frozen=True)
class Site:
    """Linears that share one input; `linears` are named as on disk, in full (`model.layers.3.self_attn.q_proj`).

    `kind` is one of "attn_in", "attn_out", "mlp_in", "mlp_out", "expert_in", "expert_out", "head", "embedding". `name`
    is `{block}.{kind}`, or `{block}.{kind}.{expert}`, or the kind alone outside the blocks.
    A site of kind "embedding" has a lookup table instead of a linear, and no input statistics.
    """

    name: str
    kind: str
    linears: tuple[str, ...]
    producer: Producer | None = None
    expert: int | None = None

    def role(self, linear: str) -> Literal["q", "k", "v", "o"] | None:
        """What one of its linears is to attention: query, key, value, output; None for any other, and where they are fused.

        The three that read the input of attention are in this order in every family's table.
        """
        if self.kind == "attn_in" and len(self.linears) == 3:
            roles: tuple[Literal["q", "k", "v"], ...] = ("q", "k", "v")
            return roles[self.linears.index(linear)]
        return "o" if self.kind == "attn_out" else None

    @property
    def layer_kind(self) -> Literal["linear", "embedding"]:
        """What its layers are."""
        return "embedding" if self.kind == "embedding" else "linear"


@dataclass(frozen=True)
class Experts:
    """A mixture of experts as it stands on disk: one linear per expert and role, under `{block}.{name}.{e}.{role}`.

    Roles are (gate, up, down) in that order; gate and up share the expert's input.
    """

    name: str  # relative to the block, on disk: "mlp.experts" or "block_sparse_moe.experts"
    n_experts: int
    top_k: int
    gate: str
    up: str
    down: str
    router: str  # relative to the block, on disk


@dataclass(frozen=True)
class Architecture:
    """One model, by its `config.json`: everything that does not need the weights.

    Names are names on disk. `blocks[i]` is the prefix of block i; `sites(i)` are in data order.
    """

    family: str  # the table it came from: "llama", "gpt2", …
    model_type: str  # of config.json
    hidden_size: int
    vocab_size: int
    max_positions: int | None  # longest sequence the position embeddings allow; None: not limited
    blocks: tuple[str, ...]
    block_sites: tuple[tuple[Site, ...], ...]
    block_norms: tuple[tuple[str, ...], ...]
    embeddings: tuple[str, ...]  # token table first, then learned positions if any
    final_norm: str | None
    head: Site
    embedding: Site
    tied: bool  # the head's weight is the token table's
    transposed: bool  # weights are stored [in, out] (Conv1D)
    experts: Experts | None = None
    norm_offset: float = 0.0  # added to a norm's stored weight before it scales (Gemma: 1)
    structure: Structure = field(default_factory=Structure)  # how it differs from what its config.json alone says
    table: Family = field(kw_only=True, repr=False, compare=False)  # of the family, as this config.json changes it
    settings: Settings = field(
        kw_only=True, repr=False, compare=False
    )  # of config.json, by the names most families use

    @property
    def n_blocks(self) -> int:
        return len(self.blocks)

    def sites(self, block: int) -> tuple[Site, ...]:
        """The sites of one block in data order."""
        return self.block_sites[block]

    def all_sites(self) -> tuple[Site, ...]:
        """Embedding, every block's sites in order, head."""
        return (self.embedding, *(site for sites in self.block_sites for site in sites), self.head)
