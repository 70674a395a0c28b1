"""Depth pruning: whole decoder blocks are left out, the others stay as they are.

    x_{n+1} = x_n + block_n(x_n)        without block n:  x_{n+1} = x_n

What block n is worth, by `score` (compress/methods/drop_blocks_scores.py has them in detail):

    perplexity          L(D; without n), mean negative log-likelihood of the calibration rows: the log of perplexity
    taylor              sum over its matrices of |W * dL(D)/dW|
    magnitude           sum over its matrices of |W|
    angular_distance    mean angle between the hidden states of a row's last token before and behind it

The blocks of lowest score go, by `selection`:

    one_shot      scored once, all together
    iterative     the worst one, then the others are scored anew in the model without it, and so on
    contiguous    `angular_distance` only: the run of n_drop blocks around which the angle is smallest

Taylor and magnitude rate the first blocks low, though without them a model breaks down: as in the paper, the first four
and the last two are then no candidates ("Taylor+", "magnitude+"). `protect` says otherwise.

Departures: matrices only are summed over (the public code has the norms' weights too, of which Gemma stores w - 1);
gradients are those of all rows together, however they are batched.

Source: Kim et al., 2024, Shortened LLaMA, arXiv:2402.02834; iterative: Song et al., 2024, SLEB, arXiv:2402.09025; angular
distance, contiguous: Gromov et al., 2024, arXiv:2403.17887.
"""

from __future__ import annotations

from fractions import Fraction
from math import ceil
from typing import Any, Literal

from pydantic import Field, model_validator

from compress.errors import RecipeError
from compress.methods.base import Extent, MethodConfig
from compress.methods.rewrite import Found, ModelMethod, ModelShape, ModelView, Rewrite

Score = Literal["perplexity", "taylor", "magnitude", "angular_distance"]
PROTECTED = {"taylor": (4, 2), "magnitude": (4, 2)}  # first and last blocks; the paper's section 3.1


class DropBlocksConfig(MethodConfig):
    n_drop: int | None = Field(None, ge=1, description="how many blocks go")
    keep_ratio: float | None = Field(
        None, gt=0, lt=1, description="in place of n_drop: at most this fraction of the blocks' bytes stays"
    )
    blocks: tuple[int, ...] | None = Field(
        None, min_length=1, description="in place of a choice: these blocks, counted from 0"
    )
    score: Score = Field("perplexity", description="by what blocks are chosen")
    selection: Literal["one_shot", "iterative", "contiguous"] = Field(
        "one_shot", description="all by one look; one at a time, looking again; a run of neighbours (angular_distance)"
    )
    protect: tuple[int, int] | None = Field(
        None, description="how many first and last blocks stay [default: 4 and 2 for taylor and magnitude, else none]"
    )
    rows: int = Field(10, ge=1, description="calibration rows that are looked at")

    @model_validator(mode="after")
    def _consistent(self) -> DropBlocksConfig:
        given = [name for name in ("n_drop", "keep_ratio", "blocks") if getattr(self, name) is not None]
        if len(given) != 1:
            said = f"{' and '.join(given)} are two ways to say" if given else "nothing says"
            raise ValueError(f"{said} what goes; give one of n_drop, keep_ratio and blocks")
        if self.blocks is not None:
            if len(set(self.blocks)) != len(self.blocks):
                raise ValueError(f"blocks={list(self.blocks)} names a block twice")
            fields = type(self).model_fields
            chosen = [
                name
                for name in ("score", "selection", "protect", "rows")
                if getattr(self, name) != fields[name].default
            ]
            if chosen:
                raise ValueError(f"{chosen[0]} is for choosing, and blocks={list(self.blocks)} leaves no choice")
        if self.selection == "contiguous" and (self.score != "angular_distance" or self.n_drop is None):
            raise ValueError("selection=contiguous needs score=angular_distance and n_drop")
        if self.selection == "iterative" and self.score == "magnitude":
            raise ValueError("magnitudes stay the same when blocks go; leave selection=iterative out")
        if self.score == "magnitude" and self.rows != type(self).model_fields["rows"].default:
            raise ValueError(f"rows={self.rows}: score=magnitude looks at weights only; leave rows out")
        if self.protect is not None and min(self.protect) < 0:
            raise ValueError(f"protect={list(self.protect)}: a number of first and one of last blocks, from 0 on")
        return self

    @property
    def protected(self) -> tuple[int, int]:
        return PROTECTED.get(self.score, (0, 0)) if self.protect is None else self.protect


class DropBlocks(ModelMethod):
    name = "drop_blocks"
    summary = "depth pruning: whole blocks are left out, those that are missed least"
    Config = DropBlocksConfig
    on_compressed = True

    @classmethod
    def rewrite(cls, model: ModelShape, config: DropBlocksConfig, found: Found) -> Rewrite:
        if config.score == "taylor" and model.compressed:
            raise RecipeError(
                "score=taylor needs gradients of ordinary weights, and this model is compressed; use score=perplexity"
            )
        if config.blocks is not None:
            dropped, how = config.blocks, ""
            _check_named(model, dropped)
        elif found.values is not None:
            dropped, how = found.values["blocks"], f", chosen by {config.score}"
        else:
            dropped = tuple(some(model, config))
            note = f"leaves out {len(dropped)} of {model.n_blocks} blocks, chosen by {config.score}"
            return Rewrite(blocks=_others(model, dropped), note=note)
        named = ", ".join(map(str, sorted(dropped)))
        one = len(dropped) == 1
        note = f"leaves out block{'' if one else 's'} {named} of 0 to {model.n_blocks - 1}{how}"
        return Rewrite(blocks=_others(model, dropped), note=note)

    @classmethod
    def observes(cls, config: DropBlocksConfig) -> bool:
        return config.blocks is None

    @classmethod
    def needs_tokens(cls, config: DropBlocksConfig) -> bool:
        return config.blocks is None and config.score != "magnitude"

    @classmethod
    def observe(cls, view: ModelView, config: DropBlocksConfig) -> dict[str, Any]:
        from compress.methods.drop_blocks_scores import choose

        return choose(view, config)

    @classmethod
    def observation_bytes(cls, extent: Extent, config: DropBlocksConfig) -> int:
        from compress.methods.drop_blocks_scores import peak_bytes

        return peak_bytes(extent, config) if cls.needs_tokens(config) else 0

    @classmethod
    def observation_flops(cls, extent: Extent, config: DropBlocksConfig) -> float:
        from compress.methods.drop_blocks_scores import flops

        return flops(extent, config) if cls.needs_tokens(config) else 0.0


def candidates(model: ModelShape, config: DropBlocksConfig) -> list[int]:
    """Blocks that may go. Raises: RecipeError if they are fewer than must go."""
    first, last = config.protected
    found = list(range(first, model.n_blocks - last))
    if not found:
        raise RecipeError(
            f"protect=[{first}, {last}] keeps all {model.n_blocks} blocks (it is the default of score={config.score}); use "
            f"protect=[{min(first, 1)}, {min(last, 1)}] or score=perplexity"
        )
    most = min(len(found), model.n_blocks - 1)
    if config.n_drop is not None and config.n_drop > most:
        raise RecipeError(f"n_drop={config.n_drop}, but {most} of {model.n_blocks} blocks can go; use n_drop={most}")
    return found


def enough(model: ModelShape, config: DropBlocksConfig, dropped: list[int]) -> bool:
    """Whether the model is as small as it should be. Raises: RecipeError if it is so only when nothing is left."""
    if config.n_drop is not None:
        return len(dropped) >= config.n_drop
    sizes = block_bytes(model)
    assert config.keep_ratio is not None
    if len(dropped) == model.n_blocks:
        raise RecipeError(
            f"keep_ratio={config.keep_ratio:g} leaves none of {model.n_blocks} blocks; use "
            f"keep_ratio={_rounded_up(max(sizes) / sum(sizes))} or more"
        )
    left = sum(sizes) - sum(sizes[block] for block in dropped)
    return left <= Fraction(str(config.keep_ratio)) * sum(sizes)


def taken(model: ModelShape, config: DropBlocksConfig, order: list[int]) -> list[int]:
    """As many of the first blocks of `order` as must go. Raises: RecipeError if all are too few."""
    dropped: list[int] = []
    for block in order:
        if enough(model, config, dropped):
            return dropped
        dropped.append(block)
    if enough(model, config, dropped):
        return dropped
    sizes = block_bytes(model)
    ratio = 1 - sum(sizes[block] for block in order) / sum(sizes)
    raise RecipeError(
        f"keep_ratio={config.keep_ratio:g}: without all {len(order)} blocks that may go, {ratio:.3g} of the bytes are left; "
        f"use keep_ratio={_rounded_up(ratio)} or more, or a smaller protect"
    )


def some(model: ModelShape, config: DropBlocksConfig) -> list[int]:
    """Blocks that might be chosen: the smallest, and of them the first, so that a result is no larger than planned, and what a
    model's config.json cannot say without its first blocks is refused in the plan."""
    sizes = block_bytes(model)
    return taken(model, config, sorted(candidates(model, config), key=lambda block: (sizes[block], block)))


def block_bytes(model: ModelShape) -> list[int]:
    """What each block takes."""
    return [
        sum(nbytes for name, nbytes in model.nbytes.items() if name.startswith(f"{prefix}.")) for prefix in model.blocks
    ]


def _rounded_up(ratio: float) -> float:
    """To three digits behind the point: what an error names must work."""
    return ceil(1000 * ratio) / 1000


def _check_named(model: ModelShape, blocks: tuple[int, ...]) -> None:
    beyond = [block for block in blocks if not 0 <= block < model.n_blocks]
    if beyond:
        raise RecipeError(f"blocks: {beyond[0]} is no block of this model; they are 0 to {model.n_blocks - 1}")
    if len(blocks) == model.n_blocks:
        raise RecipeError("blocks: leaves none; leave at least one block in the model")


def _others(model: ModelShape, dropped: Any) -> tuple[int, ...]:
    return tuple(block for block in range(model.n_blocks) if block not in dropped)
