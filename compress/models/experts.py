"""Mixtures of experts as ordinary linears.

transformers holds the experts of a block as 3-D parameters of one module (`gate_up_proj [E, 2I, H]`,
`down_proj [E, H, I]`); on disk each expert has three linears. `unfuse_experts` puts modules of the second kind in place
of the first, so that for everything else a mixture of experts is only more linears, under the names they have on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from compress.models.architecture import Architecture, Experts
from compress.models.families import module_name


class Expert(nn.Module):
    """down(act(gate(x)) * up(x)), with the three linears under the names of `roles` (gate, up, down)."""

    def __init__(self, roles: tuple[str, str, str], linears: tuple[nn.Module, nn.Module, nn.Module], act: Callable):
        super().__init__()
        self._roles = roles
        self.act_fn = act
        for role, linear in zip(roles, linears, strict=True):
            self.add_module(role, linear)

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (self._modules[role] for role in self._roles)
        return down(self.act_fn(gate(x)) * up(x))  # type: ignore[misc]


class UnfusedExperts(nn.ModuleList):
    """The experts of one block, called as the fused module is.

    `out_features`: of their outputs, where that is not the size of their inputs.
    """

    out_features: int | None = None

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum of each token's experts, weighted.

        Experts run in ascending order; one that no token was sent to is not called.

        Args:
            hidden_states: [tokens, hidden].
            top_k_index: [tokens, k], the experts of each token; an index of `len(self)` or more means none.
            top_k_weights: [tokens, k].

        Returns: [tokens, hidden], or as wide as the outputs of the experts are.
        """
        out = hidden_states.new_zeros(len(hidden_states), self.out_features or hidden_states.shape[-1])
        for e in top_k_index.unique().tolist():  # ascending
            if e >= len(self):
                continue
            slot, token = torch.where((top_k_index == e).T)  # the order of rows in which transformers calls an expert
            part = self[e](hidden_states[token]) * top_k_weights[token, slot, None]  # [tokens of e, hidden]
            out.index_add_(0, token, part.to(out.dtype))
        return out


def unfuse_experts(model: nn.Module, architecture: Architecture) -> None:
    """Replace every fused experts module of `model` by `UnfusedExperts`, in place.

    Works on meta, before weights are loaded, and on weights (which are copied). Dense blocks stay as they are.
    """
    experts = architecture.experts
    if experts is None:
        return
    for block, sites in zip(architecture.blocks, architecture.block_sites, strict=True):
        if any(site.expert is not None for site in sites):
            name = module_name(architecture, f"{block}.{experts.name}")
            fused = model.get_submodule(name)
            if not isinstance(fused, UnfusedExperts):
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, _unfused(fused, experts))


def without_expert_converters(conversions: list[Any]) -> list[Any]:
    """transformers' weight conversions less those that merge experts into 3-D parameters; renamings stay.

    With them, transformers would merge the experts on disk for parameters that are gone, and leave ours random.
    """
    return [
        c for c in conversions if not (hasattr(c, "operations") and any(".experts." in t for t in c.target_patterns))
    ]


def _unfused(fused: nn.Module, experts: Experts) -> UnfusedExperts:
    gate_up, down = fused.get_parameter("gate_up_proj"), fused.get_parameter("down_proj")
    roles = (experts.gate, experts.up, experts.down)
    unfused = UnfusedExperts()
    for e in range(experts.n_experts):
        gate_e, up_e = gate_up[e].chunk(2)  # [I, H] each
        unfused.append(Expert(roles, (_linear(gate_e), _linear(up_e), _linear(down[e])), fused.act_fn))  # type: ignore[arg-type]
    return unfused.train(fused.training)


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    return linear
