"""The loop that learns roundings: shared by the methods that differ in what they learn and over how many blocks.

A layer of the window is a `LearnedLinear`: it holds what it started from and what is learned, and runs with the weight that
the present values give. Signs of gradients move offsets and factors, by a step that falls linearly to 0:

    V -= lr_t sign(dL/dV),  c -= range_lr_t sign(dL/dc),   lr_t = lr (1 - t / T)

Kept is the best of three candidates, the start, the iterate with the least loss on its own rows, and the last one, judged on
one fixed set of calibration rows: a lucky batch cannot win, and the result is never worse than the start on that set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.errors import NumericsError
from compress.linalg.learned_rounding import (
    FACTOR_RANGE,
    Start,
    hard_offset,
    regulariser,
    rounded,
    soft_start,
    softly_rounded,
    undecided,
)
from compress.methods.block import WindowTask

JUDGED_ROWS = 32  # of calibration, on which the candidates are compared
SHOWN = 20  # lines of progress per window


@dataclass(frozen=True)
class Schedule:
    """How long and how fast. `lr` and `range_lr` are the first steps of V and c; `batch_rows` rows are run in each iteration;
    `half`: products in bfloat16. `homologous`: the window with its original weights, on the inputs that it really has, is
    matched too."""

    iterations: int
    lr: float
    range_lr: float
    batch_rows: int
    original_inputs: bool = False
    half: bool = False
    homologous: bool = False


class LearnedLinear(nn.Module):
    """x @ W'.T + bias, W' as the present offsets and factors round it."""

    def __init__(self, start: Start, bias: Tensor | None):
        super().__init__()
        self.start, self.bias = start, bias
        self.out_features, self.in_features = start.weight.shape
        self.offset = torch.zeros_like(start.grouped()).requires_grad_()
        self.factor = torch.ones_like(start.scale()).requires_grad_()
        self.frozen: Tensor | None = None
        self.in_half = False

    def learned(self) -> Tensor:
        return rounded(self.start, self.offset, self.factor)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.learned() if self.frozen is None else self.frozen
        if self.in_half:
            output = _HalfProduct.apply(x, weight)
            return output if self.bias is None else output + self.bias
        return functional.linear(x, weight.to(x.dtype), self.bias)

    def moves(self, schedule: Schedule) -> list[tuple[Tensor, float, tuple[float, float]]]:
        """What signs of gradients move: the variable, its first step, its bounds."""
        return [(self.offset, schedule.lr, (-0.5, 0.5)), (self.factor, schedule.range_lr, FACTOR_RANGE)]

    def copy(self) -> tuple[Tensor, ...]:
        return (self.offset.detach().clone(), self.factor.detach().clone())

    def put(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            self.offset.copy_(values[0])
            self.factor.copy_(values[1])


class _HalfProduct(torch.autograd.Function):
    """x @ weight.T, forth and back by products of bfloat16, which is also what is kept of x; dtypes stay as they were."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x_half, weight_half = x.to(torch.bfloat16), weight.to(torch.bfloat16)
        ctx.save_for_backward(x_half, weight_half)
        ctx.dtypes = x.dtype, weight.dtype
        return functional.linear(x_half, weight_half).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        gradient = gradient.to(torch.bfloat16)
        by_x = (gradient @ weight).to(ctx.dtypes[0]) if ctx.needs_input_grad[0] else None
        by_weight = None
        if ctx.needs_input_grad[1]:
            by_weight = (gradient.flatten(0, -2).T @ x.flatten(0, -2)).to(ctx.dtypes[1])
        return by_x, by_weight


class SoftLinear(LearnedLinear):
    """The same, with each weight between its neighbours until `harden` (AdaRound); the scale stays as it is.

    `rank`: V = V0 + A B, of which A [out, rank] and B [rank, in] are learned (CBQ's LoRA-Rounding); 0: V itself.
    """

    def __init__(self, start: Start, bias: Tensor | None, rank: int = 0, generator: torch.Generator | None = None):
        super().__init__(start, bias)
        self.offset.requires_grad_(False)
        self.factor.requires_grad_(False)
        self.base = soft_start(start)
        self.soft = True
        self.parts: tuple[Tensor, ...]
        if rank == 0:
            self.parts = (torch.zeros_like(self.base).requires_grad_(),)
        else:
            down = torch.randn(rank, self.in_features, generator=generator) / math.sqrt(self.in_features)
            up = torch.zeros(self.out_features, rank)
            self.parts = (up.to(self.base).requires_grad_(), down.to(self.base).requires_grad_())

    def variable(self) -> Tensor:
        """V [out, groups, group_size]."""
        if len(self.parts) == 1:
            return self.base + self.parts[0]
        return self.base + (self.parts[0] @ self.parts[1]).view_as(self.base)

    def learned(self) -> Tensor:
        return softly_rounded(self.start, self.variable()) if self.soft else super().learned()

    def harden(self) -> float:
        """Every weight to the neighbour it has chosen, until `soften`. Returns the fraction that had not chosen."""
        self.soft = False
        with torch.no_grad():
            variable = self.variable()
            self.offset.copy_(hard_offset(self.start, variable))
        return undecided(variable)

    def soften(self) -> None:
        self.soft = True


Loss = Callable[[Tensor, Tensor], Tensor]
"""(output, target), both [rows, length, hidden_size] -> a number, differentiable in the output."""


def squared_error(output: Tensor, target: Tensor, trim: float = 0.0) -> Tensor:
    """Mean over everything of the squared difference; the largest `trim` of the differences count nothing."""
    squares = (output.float() - target.float()).square()
    if trim > 0:
        n = squares.numel()
        bound = squares.detach().flatten().kthvalue(max(1, n - int(n * trim))).values
        squares = squares * (squares.detach() <= bound)
    return squares.mean()


def batches(lengths: Sequence[int], size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Rows to run together, for ever: all are visited in an order drawn anew each time; those of a batch have one length."""
    by_length = _by_length(range(len(lengths)), lengths)
    while True:
        drawn = []
        for rows in by_length:
            order = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
            take = min(size, len(order))
            drawn += [order[first : first + take] for first in range(0, len(order) - take + 1, take)]
        for place in torch.randperm(len(drawn), generator=generator).tolist():
            yield drawn[place]


@dataclass(frozen=True)
class Figures:
    """Losses on the judged rows: of the start and of what was kept; which candidate that is."""

    start: float
    kept: float
    which: str


def learn_signs(
    task: WindowTask,
    modules: Mapping[str, LearnedLinear],
    schedule: Schedule,
    loss: Loss,
    generator: torch.Generator,
) -> Figures:
    """Learn the offsets and factors of `modules`, which are in the window's place while this lasts.

    Raises: NumericsError if the loss is not finite.
    """
    with task.replaced(modules):
        first = _judged(task, modules, schedule, loss)
        if not math.isfinite(first):
            raise NumericsError(f"{task.name}: its output is not finite before anything is learned; use more bits")
        start = [module.copy() for module in modules.values()]
        if schedule.iterations == 0:
            return Figures(first, first, "start")
        best = _descend(task, modules, schedule, loss, generator)
        candidates = {"last": [module.copy() for module in modules.values()], "best": best}
        losses = {"start": first}
        for which, values in candidates.items():
            _put(modules, values)
            losses[which] = _judged(task, modules, schedule, loss)
        which = min(losses, key=lambda name: (losses[name], name))
        _put(modules, {"start": start, **candidates}[which])
    return Figures(first, losses[which], which)


REGULARISER = 0.01  # lambda there, for losses summed over features
BETAS = (20.0, 2.0)
WARM_UP = 0.2  # of the iterations, without the regulariser


def learn_soft(
    task: WindowTask, modules: Mapping[str, SoftLinear], schedule: Schedule, loss: Loss, generator: torch.Generator
) -> tuple[Figures, float]:
    """AdaRound: Adam on the soft roundings, then every weight goes to the neighbour it has chosen. The start is kept if it is
    better. The modules are hard afterwards. Returns the figures, and the fraction of weights that had not chosen."""
    parts = [part for module in modules.values() for part in module.parts]
    before = [part.detach().clone() for part in parts]
    with task.replaced(modules):
        first = _hard_loss(task, modules, schedule, loss)[0]
        for module in modules.values():
            module.soften()
        optimizer = torch.optim.Adam(parts, lr=schedule.lr)
        drawn = batches(task.rows.lengths, schedule.batch_rows, generator)
        for iteration in range(schedule.iterations):
            with torch.enable_grad():
                value = _loss(task, modules, next(drawn), schedule, loss) + _choosing(
                    task, modules, iteration, schedule
                )
            if not math.isfinite(float(value)):
                raise NumericsError(f"{task.name}: the loss of iteration {iteration} is {float(value)}; use more bits")
            gradients = torch.autograd.grad(value, parts, allow_unused=True)
            for part, gradient in zip(parts, gradients, strict=True):
                part.grad = gradient
            optimizer.step()
            _show(task, iteration, schedule, float(value))
        last, left = _hard_loss(task, modules, schedule, loss)
        if last >= first:
            with torch.no_grad():
                for part, value in zip(parts, before, strict=True):
                    part.copy_(value)
            _, left = _hard_loss(task, modules, schedule, loss)
    return Figures(first, min(first, last), "last" if last < first else "start"), left


def _hard_loss(
    task: WindowTask, modules: Mapping[str, SoftLinear], schedule: Schedule, loss: Loss
) -> tuple[float, float]:
    """The judged loss of hard roundings, and the fraction of weights that had not chosen."""
    sizes = [module.offset.numel() for module in modules.values()]
    left = sum(module.harden() * n for module, n in zip(modules.values(), sizes, strict=True)) / sum(sizes)
    return _judged(task, modules, schedule, loss), left


def _choosing(
    task: WindowTask, modules: Mapping[str, SoftLinear], iteration: int, schedule: Schedule
) -> Tensor | float:
    """What drives every weight to one of its neighbours, once the warm-up is over."""
    progress = iteration / schedule.iterations
    if progress < WARM_UP:
        return 0.0
    beta = BETAS[0] + (BETAS[1] - BETAS[0]) * (progress - WARM_UP) / (1 - WARM_UP)
    width = task.rows.targets([0]).shape[-1]  # the loss is a mean over features, lambda is for their sum
    with torch.enable_grad():
        total = torch.stack([regulariser(module.variable(), beta) for module in modules.values()]).sum()
        return REGULARISER / width * total


def _show(task: WindowTask, iteration: int, schedule: Schedule, loss: float) -> None:
    if (iteration + 1) % max(1, schedule.iterations // SHOWN) == 0:
        task.tell(f"{task.name}: {iteration + 1} of {schedule.iterations}, loss {loss:.4g}")


def _put(modules: Mapping[str, LearnedLinear], values: Sequence[Sequence[Tensor]]) -> None:
    for module, own in zip(modules.values(), values, strict=True):
        module.put(own)


def _descend(
    task: WindowTask, modules: Mapping[str, LearnedLinear], schedule: Schedule, loss: Loss, generator: torch.Generator
) -> list[tuple[Tensor, ...]]:
    """Returns the iterate with the least loss on its own batch."""
    moves = [move for module in modules.values() for move in module.moves(schedule) if move[0].requires_grad]
    drawn = batches(task.rows.lengths, schedule.batch_rows, generator)
    best, least = [module.copy() for module in modules.values()], math.inf
    for iteration in range(schedule.iterations):
        value = _loss(task, modules, next(drawn), schedule, loss)
        number = float(value)
        if not math.isfinite(number):
            raise NumericsError(
                f"{task.name}: the loss of iteration {iteration} is {number}; lower lr or use more bits"
            )
        if number < least:
            best, least = [module.copy() for module in modules.values()], number
        gradients = torch.autograd.grad(value, [parameter for parameter, *_ in moves], allow_unused=True)
        share = 1 - iteration / schedule.iterations
        with torch.no_grad():
            for (parameter, lr, bounds), gradient in zip(moves, gradients, strict=True):
                if gradient is not None:  # None: of an expert that no token of the batch reached
                    parameter.sub_(gradient.sign_(), alpha=lr * share).clamp_(*bounds)
        _show(task, iteration, schedule, number)
    return best


def _loss(
    task: WindowTask, modules: Mapping[str, LearnedLinear], rows: list[int], schedule: Schedule, loss: Loss
) -> Tensor:
    x = task.rows.inputs(rows, original=schedule.original_inputs)
    _set_products(modules, schedule)
    with torch.enable_grad():
        output = task.run(x)
    own = None
    if schedule.homologous:
        own = _with_weights(task, modules, {name: layer.weight for name, layer in task.layers.items()}, x)
    with torch.enable_grad():
        value = loss(output, task.rows.targets(rows))
        return value if own is None else value + loss(output, own)


def _set_products(modules: Mapping[str, LearnedLinear], schedule: Schedule) -> None:
    """In bfloat16 or not, as the schedule says."""
    for module in modules.values():
        module.in_half = schedule.half


def _with_weights(
    task: WindowTask, modules: Mapping[str, LearnedLinear], weights: Mapping[str, Tensor], x: Tensor
) -> Tensor:
    """What the window makes of `x` with these weights, in full precision."""
    with torch.no_grad():
        for name, module in modules.items():
            module.frozen, module.in_half = weights[name], False
        output = task.run(x)
        for module in modules.values():
            module.frozen = None
    return output


def _judged(task: WindowTask, modules: Mapping[str, LearnedLinear], schedule: Schedule, loss: Loss) -> float:
    """The mean loss on the judged rows, on the inputs that the window really has."""
    n = len(task.rows.lengths)
    judged = list(range(0, n, max(1, n // JUDGED_ROWS)))[:JUDGED_ROWS]
    total = tokens = 0.0
    _set_products(modules, schedule)
    with torch.no_grad():
        for module in modules.values():
            module.frozen = module.learned()
        for rows in alike(judged, task.rows.lengths, schedule.batch_rows):
            weight = sum(task.rows.lengths[row] for row in rows)
            total += float(loss(task.run(task.rows.inputs(rows)), task.rows.targets(rows))) * weight
            tokens += weight
        for module in modules.values():
            module.frozen = None
    return total / tokens


def alike(rows: Sequence[int], lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """`rows` in parts of one length, `size` of them at most."""
    for own in _by_length(rows, lengths):
        for first in range(0, len(own), size):
            yield own[first : first + size]


def _by_length(rows: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    groups: dict[int, list[int]] = {}
    for row in rows:
        groups.setdefault(lengths[row], []).append(row)
    return list(groups.values())
