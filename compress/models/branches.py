"""The two halves of a decoder block, run one by one: what attention, and what the MLP, adds to the residual stream.

Which modules they are follows from the names in the family's table; how transformers calls them, from the signature of the
block that it built.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from compress.models.architecture import Architecture
from compress.models.families import module_name


class Branches:
    """Where the halves of block `index` lie, and how to run them."""

    def __init__(self, architecture: Architecture, index: int):
        family, prefix = architecture.table, architecture.blocks[index]
        inside = len(module_name(architecture, prefix)) + 1

        def inner(disk_name: str) -> str:
            return module_name(architecture, f"{prefix}.{disk_name}")[inside:]

        sites = {site.kind: site for site in architecture.sites(index)}
        assert family.attn_norm is not None and family.mlp_norm is not None
        self.norms = {"attention": inner(family.attn_norm), "mlp": inner(family.mlp_norm)}
        self.attention = inner(family.attn_in[0]).rpartition(".")[0]
        self.experts = self.router = ""
        if "expert_in" in sites:
            assert architecture.experts is not None
            self.experts, self.router = inner(architecture.experts.name), inner(architecture.experts.router)
        self.mlp = inner(family.mlp_in[0]).rpartition(".")[0]
        self.mlp_in, self.mlp_out = inner(family.mlp_in[0]), inner(family.mlp_out)

    def run(self, kind: str, block: nn.Module, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        """What the branch adds for hidden states that enter its norm. `arguments`: what the model calls the block with."""
        normed = block.get_submodule(self.norms[kind])(hidden)
        if kind == "attention":
            module = block.get_submodule(self.attention)
            return _first(module(normed, **_accepted(module, arguments)))
        if self.experts:  # not by way of the module that holds them: it takes outputs for as wide as inputs
            flat = normed.flatten(0, -2)
            _, weights, chosen = block.get_submodule(self.router)(flat)
            return block.get_submodule(self.experts)(flat, chosen, weights).unflatten(0, normed.shape[:-1])
        if self.mlp:
            return _first(block.get_submodule(self.mlp)(normed))
        activation = block.get_submodule("activation_fn") if "activation_fn" in block._modules else block.activation_fn
        assert callable(activation)
        return block.get_submodule(self.mlp_out)(activation(block.get_submodule(self.mlp_in)(normed)))


def named_arguments(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a block is called with beside the hidden states, by name."""
    forward = getattr(type(block), "original_forward", type(block).forward)
    bound = inspect.signature(forward).bind(block, torch.empty(0), *args, **kwargs).arguments
    named = {**bound, **bound.get("kwargs", {})}
    hidden = list(inspect.signature(forward).parameters)[1]
    return {key: value for key, value in named.items() if key not in ("self", "kwargs", hidden)}


def _accepted(module: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(type(module).forward).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return arguments
    return {key: value for key, value in arguments.items() if key in parameters}


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
