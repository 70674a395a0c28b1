"""Rotations: the model in another basis, in which outliers of weights and activations are spread evenly. It computes the
same.

    R1  [hidden, hidden]      of the residual stream, one for the model             merged into all that read or write it
    R2  [head_dim, head_dim]  of what each value head holds, one per block          merged into value and output projections
    H   [n, n]                of the input of a down or output projection           online: half of it is merged into the linear,
                                                                                    the input is transformed while the model runs

R is a random Hadamard matrix, diag(signs) H, or a random orthogonal one. A group of weights that holds an outlier has a
wide grid; in the new basis every entry is a mean of n old ones with random signs. Gains of norms become part of their
readers first. R1 and R2 leave an ordinary checkpoint. A head that is the token table gets a weight of its own: the gain
in front of it is not in the table.

LayerNorm takes the mean out, so R1 then keeps the mean (`compress/linalg/rotation.py`). The published codes take it out
of the weights and change the norm, which leaves no ordinary checkpoint; and they do so for RMSNorm as well, where it is
an error.

`candidates` > 1 or `learn` > 0 look at the model (`compress/methods/rotate_learning.py`): the loss of the calibration
tokens with the weights of all linears rounded to nearest decides between random rotations, and its gradient turns the
best one further.

Sources: QuaRot, Ashkboos et al., 2024, arXiv:2404.00456; SpinQuant, Liu et al., 2024, arXiv:2405.16406.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator

from compress.errors import RecipeError
from compress.linalg.hadamard import random_orthogonal, random_signs
from compress.linalg.hadamard_orders import factors, largest_block
from compress.linalg.rotation import Deferred, DenseRotation, HadamardRotation, MeanKeeping, Rotation
from compress.methods.base import Extent, MethodConfig
from compress.methods.rewrite import Found, ModelMethod, ModelShape, ModelView, Rewrite
from compress.methods.rotate_tensors import rotated_tensors
from compress.models.stream import Stream
from compress.models.structure import Structure

Kind = Literal["hadamard", "orthogonal", "none"]

SITES = {"mlp": "mlp_out", "attention": "attn_out"}  # a branch -> the kind of its last site
LEARNED_BYTES = 8  # of an entry of a rotation that was learned
HADAMARD_FLOPS = 100  # per entry: twice the sum of the small orders of most widths


class RotateConfig(MethodConfig):
    r1: Kind = Field("hadamard", description="rotation of the residual stream")
    r2: Kind = Field("hadamard", description="rotation of the value heads, one for each block")
    online: tuple[Literal["mlp", "attention"], ...] = Field(
        (),
        description="inputs that go through a Hadamard transform while the model runs: of the last linears of MLP, attention",
    )
    block_size: int | None = Field(
        None,
        ge=2,
        description="size of the diagonal blocks of Hadamard matrices, R2's apart; default: the largest there is",
    )
    candidates: int = Field(
        1, ge=1, le=1000, description="random rotations, of which the one with the least loss is taken"
    )
    learn: int = Field(0, ge=0, description="steps of learning R1 and R2, a batch of calibration rows each")
    learning_rate: float = Field(1.5, gt=0, description="learn: the largest step; falls to 0 along a cosine")
    bits: int = Field(4, ge=2, le=8, description="candidates, learn: bits to which weights are rounded in the loss")
    group_size: int = Field(128, ge=-1, description="candidates, learn: inputs that share a scale; -1: all of a row")
    symmetric: bool = Field(True, description="candidates, learn: ranges centred on 0")

    @field_validator("group_size")
    @classmethod
    def _not_zero(cls, group_size: int) -> int:
        if group_size == 0:
            raise ValueError(
                "group_size=0 is no group; use -1 for one scale per row, or a size that divides the inputs"
            )
        return group_size

    @field_validator("online")
    @classmethod
    def _distinct(cls, online: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(online)) != len(online):
            raise ValueError(f"online={list(online)} names a branch twice")
        return online

    @model_validator(mode="after")
    def _does_something(self) -> RotateConfig:
        if self.r1 == self.r2 == "none" and not self.online:
            raise ValueError("r1=none, r2=none and nothing online rotates nothing; leave the step out")
        if self.observing and self.r1 == self.r2 == "none":
            raise ValueError("candidates and learn are about R1 and R2, and both are none")
        if self.block_size is not None and self.r1 != "hadamard" and not self.online:
            raise ValueError("block_size is of Hadamard matrices, and neither R1 nor an online transform is one")
        of_learning = {"learning_rate"} if not self.learn else set()
        of_looking = {"bits", "group_size", "symmetric"} if not self.observing else set()
        fields = type(self).model_fields
        unused = sorted(f for f in of_learning | of_looking if getattr(self, f) != fields[f].default)
        if unused:
            raise ValueError(
                f"{unused[0]} is for {'learn' if unused[0] == 'learning_rate' else 'candidates and learn'}; set that too"
            )
        return self

    @property
    def observing(self) -> bool:
        return self.candidates > 1 or self.learn > 0


class Rotate(ModelMethod):
    name = "rotate"
    summary = "another basis, in which outliers are spread: random or learned rotations, merged into the weights"
    Config = RotateConfig

    @classmethod
    def rewrite(cls, model: ModelShape, config: RotateConfig, found: Found) -> Rewrite:
        stream = model.stream()
        merged = tuple(name for name, kind in (("r1", config.r1), ("r2", config.r2)) if kind != "none")
        for name in merged:
            if name in model.marks.get(cls.name, ()):
                raise RecipeError(
                    f"{name}: it is in another basis already, which rotate gave it; begin with the original, or set {name}=none"
                )
        if config.observing:
            from compress.methods.rotate_learning import check

            check(model, stream, config)
        values = found.values or {"candidate": 0, "learned": False}
        rotations = Rotations.drawn(model, stream, config, found.generator, values["candidate"])
        if values["learned"]:
            rotations = rotations.replaced(found)
        online: dict[str, HadamardRotation] = {
            branch: online_transform(model, stream, branch, config.block_size) for branch in config.online
        }
        tensors = rotated_tensors(model, stream, rotations.r1, rotations.r2, online)
        structure = Structure(hadamard=tuple(sorted((SITES[branch], h.block_size) for branch, h in online.items())))
        untied = rotations.r1 is not None and stream.tied
        note = "; ".join(
            [
                *_described(model, stream, config, values),
                *_online(online),
                *([_untied(model, stream)] if untied else []),
            ]
        )
        return Rewrite(tensors, untied=untied, structure=structure, mark=merged, note=note)

    @classmethod
    def observes(cls, config: RotateConfig) -> bool:
        return config.observing

    @classmethod
    def observe(cls, view: ModelView, config: RotateConfig) -> dict[str, Any]:
        from compress.methods.rotate_learning import settle

        return settle(view, config)

    @classmethod
    def observation_bytes(cls, extent: Extent, config: RotateConfig) -> int:
        if not config.observing:
            return 0
        from compress.methods.rotate_learning import learning_bytes

        return learning_bytes(extent, config)

    @classmethod
    def kept_bytes(cls, model: ModelShape, config: RotateConfig) -> int:
        """What was learned."""
        if not config.learn:
            return 0
        stream = model.stream()
        r1 = stream.size**2 if config.r1 != "none" else 0
        r2 = sum(heads.head_dim**2 for heads in stream.heads) if config.r2 != "none" else 0
        return LEARNED_BYTES * (r1 + r2)

    @classmethod
    def observation_flops(cls, extent: Extent, config: RotateConfig) -> float:
        from compress.methods.rotate_learning import learning_flops

        return learning_flops(extent, config)

    @classmethod
    def flops(cls, extent: Extent, config: RotateConfig) -> float:
        dense = config.r1 == "orthogonal" or config.learn > 0
        per_weight = 2 * extent.hidden_size if dense else HADAMARD_FLOPS
        return float(extent.n_weights * per_weight) if config.r1 != "none" else float(extent.n_weights * HADAMARD_FLOPS)


class Rotations:
    """R1 and the R2 of every block; None where there is none."""

    def __init__(self, r1: Rotation | None, r2: tuple[Rotation | None, ...]):
        self.r1, self.r2 = r1, r2

    @classmethod
    def drawn(
        cls, model: ModelShape, stream: Stream, config: RotateConfig, generator: Any, candidate: int
    ) -> Rotations:
        """Candidate number `candidate`. Raises: RecipeError if `block_size` does not suit the stream."""
        r1: Rotation | None = None
        if config.r1 != "none":
            block = _block(stream.size, config.block_size, "the residual stream") if config.r1 == "hadamard" else None
            r1 = _random(stream.size, block, generator(f"r1 {candidate}"))
            if stream.layer_norm:
                r1 = MeanKeeping(r1)
        if config.r2 == "none":
            return cls(r1, (None,) * model.n_blocks)
        sizes = [heads.head_dim for heads in stream.heads]
        blocks = [largest_block(size) if config.r2 == "hadamard" else None for size in sizes]
        draws = [generator(f"r2 {candidate} {index}") for index in range(model.n_blocks)]
        return cls(r1, tuple(_random(*drawn) for drawn in zip(sizes, blocks, draws, strict=True)))

    def replaced(self, found: Found) -> Rotations:
        """Those that were learned in their places."""

        def of_block(rotation: Rotation | None, block: int) -> Rotation | None:
            return rotation and Deferred(rotation.width, lambda: DenseRotation(found.tensor("r2")[block]))

        r1 = self.r1 and Deferred(self.r1.width, lambda: DenseRotation(found.tensor("r1")))
        return Rotations(r1, tuple(of_block(r2, block) for block, r2 in enumerate(self.r2)))


def online_transform(model: ModelShape, stream: Stream, branch: str, block_size: int | None) -> HadamardRotation:
    """H of the inputs of a branch's last linears. Raises: RecipeError if there is none of `block_size`, or for experts."""
    writers = [next(b for b in branches if b.kind == branch).writers for branches in stream.branches]
    if any(len(names) > 1 for names in writers):
        raise RecipeError(
            "online: the inputs of experts are not transformed while the model runs; leave mlp out of online"
        )
    width = model.shapes[f"{writers[0][0]}.weight"][0 if stream.transposed else 1]
    return HadamardRotation(width, _block(width, block_size, f"the input of the last linear of {branch}"))


def _random(size: int, block: int | None, generator: torch.Generator) -> Rotation:
    """diag(signs) H with blocks of `block`; orthogonal if that is None, made when it is needed."""
    if block is not None:
        return HadamardRotation(size, block, random_signs(size, generator))
    return Deferred(size, lambda: DenseRotation(random_orthogonal(size, generator)))


def _block(width: int, block_size: int | None, what: str) -> int:
    block = largest_block(width) if block_size is None else block_size
    if width % block or factors(block) is None:
        sizes = [d for d in range(2, width + 1) if width % d == 0 and factors(d) is not None]
        raise RecipeError(f"block_size={block} does not suit {what}, {width}; use one of {sizes[-8:]}")
    if block == 1:
        raise RecipeError(
            f"{what} has {width} entries, for which there is no Hadamard matrix; use r1=orthogonal, nothing online"
        )
    return block


def _described(model: ModelShape, stream: Stream, config: RotateConfig, values: dict[str, Any] | Any) -> list[str]:
    how = "learned" if values["learned"] else "random"
    lines = []
    if config.r1 != "none":
        block = _block(stream.size, config.block_size, "") if config.r1 == "hadamard" else stream.size
        lines.append(
            f"R1 {how} {config.r1} [{stream.size}]" + ("" if block == stream.size else f" in blocks of {block}")
        )
    if config.r2 != "none":
        sizes = sorted({heads.head_dim for heads in stream.heads})
        lines.append(f"R2 {how} {config.r2} [{', '.join(map(str, sizes))}] in {model.n_blocks} blocks")
    return lines


def _online(online: Mapping[str, HadamardRotation]) -> list[str]:
    return [
        f"online Hadamard [{h.width}]"
        + ("" if h.block_size == h.width else f" in blocks of {h.block_size}")
        + f" in {branch}"
        for branch, h in online.items()
    ]


def _untied(model: ModelShape, stream: Stream) -> str:
    vocabulary, width = model.shapes[f"{stream.embeddings[0]}.weight"]
    return f"the head gets its own {vocabulary} x {width} weights"
