"""Depth pruning: whole decoder blocks are left out, the others stay as they are.

Source: Kim et al., 2024, Shortened LLaMA, arXiv:2402.02834.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from compress.errors import RecipeError
from compress.methods.base import MethodConfig
from compress.methods.rewrite import Found, ModelMethod, ModelShape, Rewrite


class DropBlocksConfig(MethodConfig):
    blocks: tuple[int, ...] | None = Field(
        None, min_length=1, description="these blocks, counted from 0, and no others"
    )

    @model_validator(mode="after")
    def _distinct(self) -> DropBlocksConfig:
        if self.blocks is not None and len(set(self.blocks)) != len(self.blocks):
            raise ValueError(f"blocks={list(self.blocks)} names a block twice")
        return self


class DropBlocks(ModelMethod):
    name = "drop_blocks"
    summary = "depth pruning: whole blocks are left out, those that are missed least"
    Config = DropBlocksConfig

    @classmethod
    def rewrite(cls, model: ModelShape, config: DropBlocksConfig, found: Found) -> Rewrite:
        dropped = config.blocks or ()
        beyond = [block for block in dropped if not 0 <= block < model.n_blocks]
        if beyond:
            raise RecipeError(f"blocks: {beyond[0]} is no block of this model; they are 0 to {model.n_blocks - 1}")
        stay = tuple(block for block in range(model.n_blocks) if block not in dropped)
        if not stay:
            raise RecipeError("blocks: leaves none; leave at least one block in the model")
        return Rewrite(blocks=stay, note=f"leaves out blocks {', '.join(map(str, sorted(dropped)))}")
