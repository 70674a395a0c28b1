"""Block coordinate descent of ARMOR: block-diagonal wrappers A, B around a 2:4 core S that come close to a matrix.

    minimise  L = sum_oi h_i (W - A S B)_oi^2        A [out/a, a, a],  B [in/b, b, b],  S [out, in]: 2 of every 4 in a row

With columns scaled by sqrt(h), W^ = W sqrt(h) and B^ = B sqrt(h), it is L = |E|^2, E = A S B^ - W^, and half its gradients are

    A: E (S B^)^T by rows of tiles     B^: S^T (A^T E) by columns of tiles     S: A^T E B^^T where it is not masked

An iteration is a continuous step on A, B and the kept entries of S, then a new choice of one group of 4 per tile a x b:

    group         drawn with probability |half gradient of S|_1 of the group, masked entries included
    its new pair  g = slope - |a_p|^2 G s,   G = B^_q B^_q^T [4, 4],   a_p = A[:, p],   s: the group's values so far
                  of the 6 pairs P, that with the largest g_P^T G_P^-1 g_P; values -G_P^-1 g_P / |a_p|^2

which is exact minimisation over the group, so that L never rises; a change that would raise it, by rounding, is left out.
What a changed group does to E, S B^, A^T E and the slope is of rank one in its tile. So one forward and one backward product
serve both the choice and the next continuous step: 6 out in (a + b) operations in place of 16.

Continuous steps: `adam`, one step on all three together, of L / L0; `sequential`, a gradient step on A, then B, then S, each as
long as its largest curvature allows (1 / largest eigenvalue), which no step of the three raises L by.

Source: ARMOR, Liu et al., 2025, arXiv:2510.05528.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

from compress.linalg.block_diagonal import block_left, block_right, column_blocks, column_products, identity_blocks

GROUP = 4  # of 2:4
RELATIVE, ABSOLUTE = 1e-6, 1e-8  # an iteration that lowers L / L0 by less does not count as progress; ARMOR's code
DAMPING = 1e-9  # of a pair's curvature, so that two inputs that are one give finite values; ARMOR, absolute there
ADAM_EPSILON = 1e-8

Step = Literal["adam", "sequential"]


@dataclass
class Wrapped:
    """A, S with its zeros, where S is kept, and B. `losses`: L / L0 at the start and behind each iteration."""

    output_blocks: Tensor
    core: Tensor
    mask: Tensor
    input_blocks: Tensor
    losses: list[float] = field(default_factory=list)


def wrap(
    weight: Tensor,
    mask: Tensor,
    squares: Tensor,
    sizes: tuple[int, int],
    n_iters: int,
    step: Step,
    learning_rate: float,
    patience: int,
    generator: torch.Generator,
    tell: Callable[[int, float], None] = lambda done, loss: None,
) -> Wrapped:
    """Descend from A = I, B = I, S = W where `mask` keeps it.

    Args:
        weight: W [out, in].
        mask: bool [out, in], 2 of every 4 neighbours of a row.
        squares: h [in], positive; any multiple of it.
        sizes: a and b, which divide out and in; 4 divides b.
        patience: stop after so many iterations in a row without progress.
        generator: of the CPU.
        tell: is called behind each iteration with its number and L / L0.

    Returns: the last iterate; the start where L came out above the start's, which only Adam can do.
    """
    descent = Descent(weight, mask, squares, sizes, learning_rate)
    losses, since = [descent.loss], 0
    if descent.energy > 0:
        descent.pull()
        for done in range(1, n_iters + 1):
            descent.iterate(step, generator)
            since = since + 1 if little(losses[-1], descent.loss) else 0
            losses.append(descent.loss)
            tell(done, descent.loss)
            if since == patience:
                break
    if not losses[-1] <= losses[0]:
        descent = Descent(weight, mask, squares, sizes, learning_rate)
    return Wrapped(descent.output_blocks, descent.core, descent.kept.bool(), descent.input_blocks, losses)


def little(before: float, after: float) -> bool:
    """Whether going from one L / L0 to the other is no progress."""
    return after > (1 - RELATIVE) * before or after > before - ABSOLUTE


class Descent:
    """Where the descent is. The attributes agree with each other between steps, but for `back` and `slope` before `pull`.

    Attributes:
        output_blocks A [out/a, a, a], input_blocks B [in/b, b, b], core S [out, in], kept [out, in]: 1 where S is kept, else 0.
        scaled B^, inner S B^, error E, back A^T E, slope A^T E B^^T.
        energy L0 = |W^|^2; loss L / L0.
    """

    def __init__(
        self, weight: Tensor, mask: Tensor, squares: Tensor, sizes: tuple[int, int], learning_rate: float = 1e-4
    ):
        out_features, in_features = weight.shape
        self.a, self.b = sizes
        self.root = (squares / squares.mean()).sqrt().to(weight)
        self.target = weight * self.root
        self.kept = mask.to(weight.dtype).contiguous()
        self.core = (weight * self.kept).contiguous()
        self.output_blocks = identity_blocks(out_features, self.a, weight)
        self.input_blocks = identity_blocks(in_features, self.b, weight)
        self.scaled = self.input_blocks * self._columns()
        self.inner, self.error, self.back, self.slope = (torch.empty_like(self.core) for _ in range(4))
        self._scratch, self._ones = torch.empty_like(self.core), weight.new_ones(GROUP)
        self.energy = _energy(self.target)
        self.learning_rate = learning_rate
        self._adam: torch.optim.Adam | None = None
        self._forward()

    def iterate(self, step: Step, generator: torch.Generator) -> None:
        """One iteration. `back` and `slope` are current before and behind it."""
        self.adam_step() if step == "adam" else self.sequential_step()
        self._forward()
        self.pull()
        self.reselect(generator)

    def pull(self) -> None:
        """Bring `back` and `slope` up to date."""
        block_left(self.output_blocks.mT, self.error, self.back)
        block_right(self.back, self.scaled.mT, self.slope)

    def adam_step(self) -> None:
        """Adam on A, B and the kept entries of S together. `slope` is used up.

        Half gradients of L in place of gradients of L / L0: Adam takes them alike, but for its epsilon.
        """
        parameters = [self.output_blocks, self.input_blocks, self.core]
        if self._adam is None:
            epsilon = ADAM_EPSILON * self.energy / 2
            self._adam = torch.optim.Adam(parameters, self.learning_rate, eps=epsilon, fused=True)
        gradients = [self._slope_output(), self._slope_input() * self._columns(), self.slope.mul_(self.kept)]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        self._adam.step()
        for parameter in parameters:
            parameter.grad = None
        self.core.mul_(self.kept)
        self.scaled = self.input_blocks * self._columns()

    def sequential_step(self) -> None:
        """A step of 1 / (largest curvature) on A, on B and on S, one after the other."""
        inner = self.inner.unflatten(0, (-1, self.a))  # [out/a, a, in]
        self.output_blocks -= self._slope_output() / _largest(torch.bmm(inner, inner.mT))
        self._residual()
        block_left(self.output_blocks.mT, self.error, self.back)
        lifted = column_blocks(block_left(self.output_blocks, self.core, self.slope), self.b)  # A S: [in/b, out, b]
        self.scaled = self.scaled - self._slope_input() / _largest(torch.bmm(lifted.mT, lifted))
        self.input_blocks = self.scaled / self._columns()
        self._forward()
        self.pull()
        across = _largest(torch.bmm(self.output_blocks.mT, self.output_blocks))  # [out/a, 1, 1]
        along = _largest(torch.bmm(self.scaled, self.scaled.mT))  # [in/b, 1, 1]
        step = (self._tiles(self.slope) / (across[:, None] * along[:, 0, 0].view(1, 1, -1, 1))).view_as(self.core)
        self.core -= step.mul_(self.kept)

    def reselect(self, generator: torch.Generator) -> None:
        """Draw a group in every tile and choose anew which two of it are kept, and their values.

        Groups of 4 are looked up by their number, in matrices seen as [groups, ...]: rows that lie together.
        """
        i, j, p, q = self._drawn(generator)  # tile, row in it, first column in it: [tiles]
        row, across_group = i * self.a + p, j * (self.b // GROUP) + q // GROUP  # row of W, group of inputs
        place = row * (self.core.shape[1] // GROUP) + across_group
        gram = torch.bmm(self.output_blocks.mT, self.output_blocks)
        across = gram.view(-1, self.a).index_select(0, row)  # row p of A^T A: [tiles, a]
        squared = gram.diagonal(dim1=1, dim2=2).reshape(-1).index_select(0, row).double()  # |a_p|^2
        gram = torch.bmm(self.scaled, self.scaled.mT)
        along = _groups(gram).index_select(0, across_group)  # rows q.. of B^ B^^T: [tiles, 4 b]
        inner = gram.unflatten(2, (-1, GROUP)).unflatten(1, (-1, GROUP)).diagonal(dim1=1, dim2=3)  # [in/b, 4, 4, b/4]
        curvature = inner.permute(1, 2, 0, 3).reshape(GROUP, GROUP, -1).index_select(2, across_group).double()  # G
        core, kept, slopes = (matrix.view(-1, GROUP) for matrix in (self.core, self.kept, self.slope))
        old, slope = (matrix.index_select(0, place).double().T for matrix in (core, slopes))  # [4, tiles]
        pair, values = best_pairs(curvature, slope - squared * _times(curvature, old), squared)
        new = torch.zeros_like(old).scatter_(0, pair, values)
        change = new - old
        gain = (change * (2 * slope + squared * _times(curvature, change))).sum(0)
        better = gain < 0  # false for what is not finite
        change = torch.where(better, change, 0.0)
        chosen = torch.zeros_like(old).scatter_(0, pair, 1.0)
        core.index_copy_(0, place, torch.where(better, new, old).T.to(core))
        before = kept.index_select(0, place)
        kept.index_copy_(0, place, torch.where(better.unsqueeze(1), chosen.T.to(kept), before))
        self._carry(i, j, p, row, across_group, across, along, change.T.to(core))
        self.loss += float(torch.where(better, gain, 0.0).sum()) / self.energy

    def _drawn(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A group for each tile: row and column of the tile, row and first column inside it."""
        out_features, in_features = self.core.shape
        n_down, n_across, per_row = out_features // self.a, in_features // self.b, self.b // GROUP
        torch.abs(self.slope, out=self._scratch)
        size = (self._scratch.view(-1, GROUP) @ self._ones).view(n_down, self.a, n_across, per_row)
        size = size.transpose(1, 2).reshape(n_down * n_across, -1)
        upto = size.cumsum(1)
        draw = torch.rand(len(upto), 1, generator=generator).to(upto) * upto[:, -1:]
        found = torch.searchsorted(upto, draw).squeeze(1).clamp_(max=upto.shape[1] - 1)
        tile = torch.arange(len(upto), device=found.device)
        return tile // n_across, tile % n_across, found // per_row, found % per_row * GROUP

    def _carry(
        self,
        i: Tensor,
        j: Tensor,
        p: Tensor,
        row: Tensor,
        across_group: Tensor,
        across: Tensor,
        along: Tensor,
        change: Tensor,
    ) -> None:
        """What changes of one group per tile do to inner, error, back and slope."""
        n_down, n_across = len(self.output_blocks), len(self.input_blocks)
        added = _mixed(change, _groups(self.scaled).index_select(0, across_group))  # to row p of S B^: [tiles, b]
        raised = _mixed(change, along)
        lines, which = self.inner.view(-1, self.b), row * n_across + j
        lines.index_copy_(0, which, lines.index_select(0, which) + added)
        lifts = self.output_blocks.mT.reshape(-1, self.a).index_select(0, row)  # a_p: [tiles, a]
        for matrix, column, line in (
            (self.error, lifts, added),
            (self.back, across, added),
            (self.slope, across, raised),
        ):
            shape = (n_down, n_across, 1)
            self._tiles(matrix).addcmul_(
                column.view(n_down, n_across, self.a, 1).transpose(1, 2), line.view(*shape, -1).transpose(1, 2)
            )

    def _forward(self) -> None:
        block_right(self.core, self.scaled, self.inner)
        self._residual()
        self.loss = _energy(self.error) / self.energy if self.energy > 0 else 0.0

    def _residual(self) -> None:
        block_left(self.output_blocks, self.inner, self.error).sub_(self.target)

    def _slope_output(self) -> Tensor:
        """Half the gradient of A: [out/a, a, a]."""
        return torch.bmm(self.error.unflatten(0, (-1, self.a)), self.inner.unflatten(0, (-1, self.a)).mT)

    def _slope_input(self) -> Tensor:
        """Half the gradient of B^: [in/b, b, b]."""
        return column_products(self.core, self.back, self.b)

    def _columns(self) -> Tensor:
        """sqrt(h) as it multiplies columns of B: [in/b, 1, b]."""
        return self.root.view(-1, 1, self.b)

    def _tiles(self, matrix: Tensor) -> Tensor:
        """[out, in] seen as [out/a, a, in/b, b]."""
        return matrix.view(len(self.output_blocks), self.a, len(self.input_blocks), self.b)


def best_pairs(curvature: Tensor, slope: Tensor, squared: Tensor) -> tuple[Tensor, Tensor]:
    """The two of each group of 4 that lower the loss most, the others being 0, and the values that do.

    Args:
        curvature: G [4, 4, n]; slope: g [4, n], half the gradient where the group is 0; squared: |a_p|^2 [n].

    Returns: places [2, n], ascending, and values [2, n].
    """
    pairs = torch.tensor(list(combinations(range(GROUP), 2)), device=slope.device).T  # [2, 6]
    first, second = pairs
    damping = DAMPING * curvature.diagonal().mean(1)
    x, y = slope[first], slope[second]  # [6, n], as all that follows
    top, low = curvature[first, first] + damping, curvature[second, second] + damping
    between = curvature[first, second]
    determinant = top * low - between.square()
    u, v = (low * x - between * y) / determinant, (top * y - between * x) / determinant
    gain = torch.nan_to_num(x * u + y * v, nan=-torch.inf).masked_fill_(determinant <= 0, -torch.inf)
    most, best = gain[0], torch.zeros_like(gain[0], dtype=torch.long)
    for number in range(1, len(gain)):  # argmax goes entry by entry where it does not run along rows
        best.masked_fill_(gain[number] > most, number)
        most = torch.maximum(most, gain[number])
    values = -torch.stack([which.gather(0, best[None])[0] for which in (u, v)]) / squared
    return pairs.index_select(1, best), torch.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)


def _times(matrices: Tensor, vectors: Tensor) -> Tensor:
    """[4, 4, n] times [4, n]."""
    return (matrices * vectors).sum(1)


def _groups(blocks: Tensor) -> Tensor:
    """Blocks [n, b, b], four rows of one at a time: [n b / 4, 4 b]."""
    return blocks.reshape(-1, GROUP * blocks.shape[2])


def _mixed(weights: Tensor, rows: Tensor) -> Tensor:
    """Sums of four rows, [n, b], for `weights` [n, 4] and rows [n, 4 b]."""
    return torch.bmm(weights.unsqueeze(1), rows.view(len(rows), GROUP, -1)).squeeze(1)


def _largest(grams: Tensor) -> Tensor:
    """The largest eigenvalue of each [n, 1, 1]; 1 where all are 0."""
    largest = torch.linalg.eigvalsh(grams)[:, -1].clamp_min(0).view(-1, 1, 1)
    return torch.where(largest > 0, largest, 1.0)


def _energy(matrix: Tensor) -> float:
    """The sum of all squares; rows in their own dtype, then float64."""
    return float(torch.linalg.vector_norm(matrix, dim=1).double().square().sum())
