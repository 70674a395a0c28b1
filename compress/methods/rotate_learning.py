"""Rotations chosen, and learned, by what rounding costs: the loss of the calibration tokens with all linears rounded to
nearest.

The model need not be rotated for that. What rounding in another basis does to a linear is, in the original one,

    reader   W~ = Q(W R1) R1^T                    writer   W~ = R1 Q(R1^T W)
    with R2 on the rows of values and the columns of the output projection, and H on the inputs of a down projection, likewise

so token table, norms and head stay, and each candidate costs one forward of the model. W has the gain of its norm in
it.

    Q(w) = s (round(w / s + z) - z),   s = range of the group / (2^bits - 1)

Its gradient: rounding is taken to have slope 1 (straight through), the range is differentiated as it is. So the loss
falls where large weights become smaller, and with them the steps of their groups:

    dQ = dw + (round(w / s + z) - z - w / s) ds

R1 and every R2 take a step of Cayley SGD (`compress/linalg/cayley.py`) per batch, exact up to EXACT_UP_TO, from the
candidate with the least loss; the step size falls to 0 along a cosine. The learned rotations are used if their loss
over all calibration tokens is less than the candidate's, else the candidate: learning never loses.

Departures from SpinQuant: weights are rounded while learning, not activations (there is no activation quantization
here), and the gradient goes through the ranges. Its learning rate is 1.5; what limits a step is mostly 1 / |A|_1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compress.errors import NumericsError, RecipeError
from compress.linalg.cayley import cayley_step, cayley_step_approximate, projected
from compress.linalg.hadamard import transformed
from compress.linalg.residual import folded_bias
from compress.linalg.rotation import DenseRotation, MeanKeeping, Rotation
from compress.methods.base import Extent
from compress.methods.rewrite import ModelShape, ModelView
from compress.methods.rotate import RotateConfig, Rotations, online_transform
from compress.methods.whole_model import backward_bytes, next_token_loss, run_again, run_once
from compress.models.stream import Branch, Stream, ValueHeads

EXACT_UP_TO = 4096  # n of a step solved exactly: some n^3 in float64; approximately beyond
COPIES = 6  # of a block's weights in its backward pass: turned, in steps of their groups, rounded, turned back, and gradients
STEP_FLOPS = 6  # n^3, of a step


def settle(view: ModelView, config: RotateConfig) -> dict[str, Any]:
    """What `Rotate.observe` answers: which candidate, whether learning improved on it, and their losses in nats."""
    rounded = RoundedModel(view, config)
    try:
        drawn = _Drawn(view, rounded.stream, config)
        losses = []
        with view.track("try rotations", config.candidates, "candidate") as advance:
            for candidate in range(config.candidates):
                losses.append(view.remember(f"loss of candidate {candidate}", lambda: rounded.loss(*drawn(candidate))))  # noqa: B023
                advance(f"loss {losses[-1]:.4f}")
        best = min(range(config.candidates), key=losses.__getitem__)
        found = {"candidate": best, "learned": False, "losses": losses}
        if config.learn:
            found |= _learned(view, config, rounded, drawn(best), losses[best])
    finally:
        rounded.close()
    _tell(view, found)
    return found


def _learned(
    view: ModelView,
    config: RotateConfig,
    rounded: RoundedModel,
    start: tuple[Tensor | None, Tensor | None],
    loss: float,
) -> dict[str, Any]:
    made: list[tuple[Tensor | None, Tensor | None]] = []

    def learn(which: int) -> Callable[[], Tensor]:
        def make() -> Tensor:
            if not made:
                made.append(Learner(view, config, rounded, *start).learn())
            matrix = made[0][which]
            assert matrix is not None
            return matrix

        return make

    r1, r2 = (None if s is None else view.keep(f"r{i + 1}", learn(i)) for i, s in enumerate(start))
    after = view.remember("loss of learned rotations", lambda: rounded.loss(r1, r2))
    return {"learned": after < loss, "loss_learned": after}


def _tell(view: ModelView, found: Mapping[str, Any]) -> None:
    losses = found["losses"]
    line = (
        f"loss of the calibration tokens, weights rounded: {min(losses):.4f} with random rotation {found['candidate']}"
    )
    if len(losses) > 1:
        line += f", the best of {len(losses)} (worst {max(losses):.4f})"
    if "loss_learned" in found:
        line += f"; {found['loss_learned']:.4f} learned" + ("" if found["learned"] else ", which is not used")
    view.note(line)


class _Drawn:
    """Candidates as matrices, float64: R1 [n, n], R2 of all blocks [blocks, head_dim, head_dim]; None where there is none."""

    def __init__(self, view: ModelView, stream: Stream, config: RotateConfig):
        self.view, self.stream, self.config = view, stream, config

    def __call__(self, candidate: int) -> tuple[Tensor | None, Tensor | None]:
        drawn = Rotations.drawn(self.view.shape, self.stream, self.config, self.view.generator, candidate)
        r2 = [_matrix(rotation) for rotation in drawn.r2 if rotation is not None]
        return None if drawn.r1 is None else _matrix(drawn.r1), torch.stack(r2) if r2 else None


def _matrix(rotation: Rotation) -> Tensor:
    return rotation.times(torch.eye(rotation.width, dtype=torch.float64))


class RoundedModel:
    """The model whose linears are rounded in the basis that `r1`, `r2` say, float32."""

    def __init__(self, view: ModelView, config: RotateConfig):
        self.view, self.config, self.stream = view, config, view.shape.stream()
        self.r1: Tensor | None = None
        self.r2: Tensor | None = None
        self.model = view.model()
        self.blocks = [view.module(self.model, name) for name in view.shape.blocks]
        self.device = next(self.model.parameters()).device
        online = {
            branch: online_transform(view.shape, self.stream, branch, config.block_size) for branch in config.online
        }
        with torch.no_grad():
            for index, branches in enumerate(self.stream.branches):
                for branch in branches:
                    if config.r1 != "none":
                        self._fold(branch)
                    transform = online.get(branch.kind)
                    for name in (*branch.readers, *branch.writers):
                        if name in view.shape.linears:
                            block = transform.block_size if transform is not None and name in branch.writers else None
                            self._round(name, index, name in branch.writers, block)
        run_again(self.blocks)

    def close(self) -> None:
        """Let go of the model, which holds itself through its blocks' forwards."""
        run_once(self.blocks)

    def set(self, r1: Tensor | None, r2: Tensor | None) -> None:
        """Rotations to round under, in float32 on the model's device."""
        self.r1 = None if r1 is None else r1.to(self.device, torch.float32)
        self.r2 = None if r2 is None else r2.to(self.device, torch.float32)

    def loss(self, r1: Tensor | None, r2: Tensor | None) -> float:
        """Mean cross-entropy of the calibration tokens, in nats."""
        self.set(r1, r2)
        total, n_tokens = 0.0, 0
        with torch.no_grad(), parametrize.cached():
            for ids in self.view.batches:
                predicted = ids.numel() - ids.shape[0]
                total += float(next_token_loss(self.model, ids)) * predicted
                n_tokens += predicted
        if not math.isfinite(total):
            raise NumericsError(
                "rotate: the loss of the calibration rows is not a number with all layers rounded; check the checkpoint, or "
                "use candidates=1 without learn"
            )
        return total / n_tokens

    def _fold(self, branch: Branch) -> None:
        """Gain and shift of a norm into its readers, as in the rotated model."""
        norm: Any = self.view.module(self.model, branch.norm)
        readers: list[Any] = [self.view.module(self.model, name) for name in branch.readers]
        gain, shift = getattr(norm, "weight", None), getattr(norm, "bias", None)
        if shift is not None:
            if all(getattr(reader, "bias", None) is not None for reader in readers):
                for reader in readers:
                    reader.bias.copy_(folded_bias(self._oriented(reader.weight), reader.bias, shift))
                shift.zero_()
            elif gain is not None:
                shift.copy_(torch.where(shift == 0, 0.0, shift / gain))
        if gain is not None:
            for reader in readers:
                self._oriented(reader.weight).mul_(gain + self.stream.norm_offset)
            gain.fill_(1 - self.stream.norm_offset)

    def _round(self, name: str, index: int, writes: bool, online: int | None) -> None:
        heads = self.stream.heads[index]
        used = heads if name in (heads.values, heads.output) else None
        turn = _Turn(self, index, writes, used, online)
        rounding = _Rounding(turn, self.config, self.stream.transposed)
        parametrize.register_parametrization(self.view.module(self.model, name), "weight", rounding, unsafe=True)

    def _oriented(self, weight: Tensor) -> Tensor:
        return weight.T if self.stream.transposed else weight


class _Turn:
    """One linear's weight [out, in] into the basis in which it is rounded, and back."""

    def __init__(self, model: RoundedModel, index: int, writes: bool, heads: ValueHeads | None, online: int | None):
        self.model, self.index, self.writes, self.heads, self.online = model, index, writes, heads, online

    def there(self, weight: Tensor) -> Tensor:
        r1 = self.model.r1
        if r1 is not None:
            weight = r1.T @ weight if self.writes else weight @ r1
        weight = self._headed(weight, back=False)
        return weight if self.online is None else transformed(weight, self.online)

    def back(self, weight: Tensor) -> Tensor:
        r1 = self.model.r1
        weight = weight if self.online is None else transformed(weight, self.online, transposed=True)
        weight = self._headed(weight, back=True)
        if r1 is not None:
            weight = r1 @ weight if self.writes else weight @ r1.T
        return weight

    def _headed(self, weight: Tensor, back: bool) -> Tensor:
        if self.heads is None or self.model.r2 is None:
            return weight
        size, r2 = self.heads.head_dim, self.model.r2[self.index]
        if self.writes:  # columns of query heads
            return (weight.unflatten(1, (-1, size)) @ (r2.T if back else r2)).flatten(1)
        rows, done = [], 0
        for start in sorted(self.heads.starts):  # rows of value heads, wherever they are
            turned = (r2 if back else r2.T) @ weight[start : start + size]
            rows += [weight[done:start], turned]
            done = start + size
        return torch.cat([*rows, weight[done:]])


class _Rounding(nn.Module):
    """A parametrization: a weight as it lies in its module -> the same, rounded in another basis."""

    def __init__(self, turn: _Turn, config: RotateConfig, transposed: bool):
        super().__init__()
        self.turn, self.config, self.transposed = turn, config, transposed

    def forward(self, weight: Tensor) -> Tensor:
        weight = weight.T if self.transposed else weight
        config = self.config
        weight = self.turn.back(rounded(self.turn.there(weight), config.bits, config.group_size, config.symmetric))
        return weight.T if self.transposed else weight


def rounded(weight: Tensor, bits: int, group_size: int, symmetric: bool) -> Tensor:
    """Rounded to nearest on the grids of `compress/linalg/grid.py` without clipping, with a gradient (see above).

    Args:
        weight: [out, in], float32. group_size: divides `in`; -1: all of it.
    """
    groups = weight.unflatten(1, (-1, weight.shape[1] if group_size == -1 else group_size))  # [out, groups, group_size]
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scale = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(weight.dtype).tiny)
    with torch.no_grad():
        zero = 2 ** (bits - 1) if symmetric else (-low / scale).round().clamp(0, 2**bits - 1)
        steps = groups / scale
        off = ((steps.round() + zero).clamp(0, 2**bits - 1) - zero) - steps
    return (groups + off * scale).flatten(1)


class Learner:
    """R1 and R2 under Cayley SGD."""

    def __init__(
        self, view: ModelView, config: RotateConfig, rounded: RoundedModel, r1: Tensor | None, r2: Tensor | None
    ):
        self.view, self.config, self.rounded = view, config, rounded
        self.r1, self.r2 = r1, r2
        size = 0 if r1 is None else len(r1)
        self.fixed = (
            torch.full((size,), 1 / math.sqrt(size), dtype=torch.float64)
            if size and rounded.stream.layer_norm
            else None
        )

    def learn(self) -> tuple[Tensor | None, Tensor | None]:
        """R1 [n, n] and R2 [blocks, h, h] after all steps: float64, orthogonal."""
        n_batches, generator = len(self.view.batches), self.view.generator("steps")
        order = torch.empty(0)
        with self.view.track("learn rotations", self.config.learn, "step") as advance:
            for step in range(self.config.learn):
                if step % n_batches == 0:
                    order = torch.randperm(n_batches, generator=generator)
                rate = self.config.learning_rate * (1 + math.cos(math.pi * step / self.config.learn)) / 2
                loss = self._step(self.view.batches[int(order[step % n_batches])], rate, generator)
                advance(f"loss {loss:.4f}")
        if self.r1 is not None:
            r1 = DenseRotation(projected(self.r1))
            self.r1 = _matrix(r1 if self.fixed is None else MeanKeeping(r1))
        if self.r2 is not None:
            self.r2 = torch.stack([projected(r) for r in self.r2])
        return self.r1, self.r2

    def _step(self, ids: Tensor, rate: float, generator: torch.Generator) -> float:
        self.rounded.set(self.r1, self.r2)
        wanted = [r.requires_grad_() for r in (self.rounded.r1, self.rounded.r2) if r is not None]
        loss = next_token_loss(self.rounded.model, ids)
        gradients = [g.double().cpu() for g in torch.autograd.grad(loss, wanted)]
        if not all(bool(torch.isfinite(g).all()) for g in (*gradients, loss)):
            raise NumericsError(
                f"rotate: loss {float(loss):g} of a calibration batch has no finite gradient; check the checkpoint"
            )
        if self.r1 is not None:
            self.r1 = _moved(self.r1, gradients.pop(0), rate, self.fixed, generator)
        if self.r2 is not None:
            moved = [_moved(r, g, rate, None, generator) for r, g in zip(self.r2, gradients.pop(), strict=True)]
            self.r2 = torch.stack(moved)
        return float(loss.detach())


def _moved(r: Tensor, gradient: Tensor, rate: float, fixed: Tensor | None, generator: torch.Generator) -> Tensor:
    if len(r) <= EXACT_UP_TO:
        return cayley_step(r, gradient, rate, fixed=fixed)[0]
    return cayley_step_approximate(r.float(), gradient.float(), rate, fixed=fixed, generator=generator)[0].double()


def check(model: ModelShape, stream: Stream, config: RotateConfig) -> None:
    """Raises: RecipeError if groups do not divide a linear's inputs."""
    for name in model.linears if config.group_size != -1 else ():
        n = model.shapes[f"{name}.weight"][0 if stream.transposed else 1]
        if n % config.group_size:
            usable = [d for d in range(1, n + 1) if n % d == 0 and d <= config.group_size][-5:]
            raise RecipeError(
                f"group_size={config.group_size} does not divide in_features={n} of {name}; use one of {usable}, or -1"
            )


def learning_bytes(extent: Extent, config: RotateConfig) -> int:
    """The model in float32; its rounded weights while candidates are compared, or a block's several times and the rotations."""
    per_block = extent.n_weights // max(extent.n_blocks, 1)
    rotations = 8 * STEP_FLOPS * extent.hidden_size**2
    learning = backward_bytes(extent, COPIES * per_block) if config.learn else 0
    return 4 * extent.n_weights + rotations + max(4 * extent.n_weights + backward_bytes(extent, 0), learning)


def learning_flops(extent: Extent, config: RotateConfig) -> float:
    """Forwards for each candidate; steps of a forward, the same again, and a backward; the products with rotations."""
    forwards = config.candidates + (1 if config.learn else 0)
    turning = 4.0 * extent.hidden_size * extent.n_weights
    step = 8.0 * extent.n_weights * extent.batch_tokens + 4 * turning + STEP_FLOPS * extent.hidden_size**3
    return forwards * (2.0 * extent.n_weights * extent.n_tokens + turning) + config.learn * step
