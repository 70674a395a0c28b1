"""Rounding with offsets and ranges that gradients can move: what SignRound, AdaRound and CBQ learn.

    steps = clamp(round(W / s + V), -z, 2^bits - 1 - z),   W' = steps * s,   s = s0 * c rounded to its stored dtype

W is the weight that was rounded to start with, V an offset within [-1/2, 1/2] for each weight, c a factor for each group.
V = 0, c = 1 is the start, bit for bit. Rounding passes gradients on as if it were not there, the clamp does not:

    dL/dV = s * inside * dL/dW'       dL/dc = s0 * sum over the group of dL/dW' * (steps - inside * W / s)

One autograd function does this with a code, two bytes, kept per weight; W / s is computed again.

    h(V) = clamp(1.2 sigmoid(V) - 0.1, 0, 1)           AdaRound: W' = s * clamp(floor(W / s) + h(V), ...), smooth in V
    R(V) = sum 1 - |2 h(V) - 1|^beta                   its regulariser: beta falls, and h goes to 0 or 1

Sources: Cheng et al., 2023, arXiv:2309.05516 (SignRound); Nagel et al., 2020, arXiv:2004.10568 (AdaRound); Ding et al., 2023,
arXiv:2312.07950 (CBQ: V = V0 + A B).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.linalg.grid import Grid, stored_scale

STRETCH_LOW, STRETCH_HIGH = -0.1, 1.1  # of AdaRound's sigmoid: h reaches 0 and 1 at finite V
FACTOR_RANGE = (0.3, 1.7)  # of c: a group's scale neither vanishes nor changes its sign


@dataclass(frozen=True)
class Start:
    """Where learning starts: `weight` float32 [out, in], whose nearest values on `grid` are the first codes."""

    weight: Tensor
    grid: Grid

    @property
    def groups(self) -> int:
        return self.grid.scale.shape[1]

    def grouped(self) -> Tensor:
        """The weight as [out, groups, group_size]."""
        return self.weight.unflatten(1, (self.groups, -1))

    def scale(self) -> Tensor:
        """[out, groups, 1], float32."""
        return self.grid.scale.float().unsqueeze(-1)

    @property
    def most(self) -> int:
        """The largest code; the least is 0."""
        return 2**self.grid.bits - 1

    def zero(self) -> Tensor | float:
        """The code of 0: [out, groups, 1], float32, or one for all."""
        if self.grid.zero_point is None:
            return 2.0 ** (self.grid.bits - 1)
        return self.grid.zero_point.float().unsqueeze(-1)


def learned_scale(start: Start, factor: Tensor) -> Tensor:
    """s [out, groups, 1] for factors c [out, groups, 1], float32 but representable in its stored dtype; keeps its sign."""
    scale = start.scale()
    return scale.sign() * stored_scale((scale * factor).abs(), start.grid.scale.dtype)


def rounded(start: Start, offset: Tensor | None, factor: Tensor) -> Tensor:
    """W' [out, in], float32 but as it will be loaded; differentiable in `offset` and `factor`.

    Args:
        offset: V [out, groups, group_size]; None: 0.
        factor: c [out, groups, 1].
    """
    return _Rounded.apply(start, offset, factor)


def learned_grid(start: Start, factor: Tensor) -> Grid:
    """The grid that factors [out, groups, 1] lead to."""
    scale = learned_scale(start, factor).squeeze(-1).to(start.grid.scale.dtype)
    return Grid(start.grid.bits, scale, start.grid.zero_point)


def learned_codes(start: Start, offset: Tensor | None, factor: Tensor) -> Tensor:
    """Codes uint8 [out, in] on `learned_grid`: those that `rounded` has multiplied with their scales."""
    return _codes(start, offset, learned_scale(start, factor)).clamp_(0, start.most).to(torch.uint8).flatten(1)


def _codes(start: Start, offset: Tensor | None, scale: Tensor) -> Tensor:
    """Codes [out, groups, group_size] as they are before they are clamped, float32."""
    codes = start.grouped() / scale
    if offset is not None:
        codes += offset
    return codes.round_().add_(start.zero())


class _Rounded(torch.autograd.Function):
    """Masks are made by arithmetic: comparisons, products with booleans and bounds in tensors take a CPU several times longer."""

    @staticmethod
    def forward(ctx: Any, start: Start, offset: Tensor | None, factor: Tensor) -> Tensor:
        scale = learned_scale(start, factor)
        codes = _codes(start, offset, scale).clamp_(-1, start.most + 1)  # what lies outside stays outside, by one
        ctx.start = start
        ctx.save_for_backward(codes.to(torch.int16), scale)
        weight = codes.clamp_(0, start.most).sub_(start.zero()).mul_(scale)
        return weight.to(start.grid.scale.dtype).float().flatten(1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        start: Start = ctx.start
        kept, scale = ctx.saved_tensors
        gradient = gradient.unflatten(1, (start.groups, -1))
        codes = kept.float()
        steps = codes.clamp(0, start.most)
        outside = codes.sub_(steps).square_()  # 1, or 0
        inside = outside.neg_().add_(1)
        by_offset = by_factor = None
        if ctx.needs_input_grad[1]:
            by_offset = (gradient * inside).mul_(scale)
        if ctx.needs_input_grad[2]:
            moved = (start.grouped() / scale).mul_(inside)
            moved = steps.sub_(start.zero()).sub_(moved).mul_(gradient)
            by_factor = moved.sum(-1, keepdim=True) * start.scale()
        return None, by_offset, by_factor


# ---- AdaRound


def rectified(variable: Tensor) -> Tensor:
    """h(V), within [0, 1]."""
    return (torch.sigmoid(variable) * (STRETCH_HIGH - STRETCH_LOW) + STRETCH_LOW).clamp(0, 1)


def soft_start(start: Start) -> Tensor:
    """V0 [out, groups, group_size]: floor(W / s) + h(V0) is W / s."""
    steps = start.grouped() / start.scale()
    rest = steps - steps.floor()
    return -torch.log((STRETCH_HIGH - STRETCH_LOW) / (rest - STRETCH_LOW) - 1)


def softly_rounded(start: Start, variable: Tensor) -> Tensor:
    """W' [out, in] with each weight between its neighbours; differentiable in `variable` [out, groups, group_size]."""
    scale = start.scale()
    steps = (start.grouped() / scale).floor() + rectified(variable)
    zero = start.zero()
    return (((steps + zero).clamp(0, start.most) - zero) * scale).flatten(1)


def regulariser(variable: Tensor, beta: float) -> Tensor:
    """sum 1 - |2 h - 1|^beta: 0 where every weight has chosen a neighbour."""
    return (1 - (2 * rectified(variable) - 1).abs().pow(beta)).sum()


def undecided(variable: Tensor) -> float:
    """The fraction of weights that have not chosen: 0.05 < h < 0.95."""
    h = rectified(variable)
    return float(((h > 0.05) & (h < 0.95)).float().mean())


def hard_offset(start: Start, variable: Tensor) -> Tensor:
    """The offset V of `rounded` that takes every weight to the neighbour it has chosen: up where h(V) >= 1/2."""
    steps = start.grouped() / start.scale()
    return (steps.floor() + (variable >= 0)) - steps
