"""ARMOR: a 2:4 core between block-diagonal wrappers, W ~ A S B, all three fitted together, the core's places included.

    A = diag(A_1, ...), blocks a x a    S: 2 of every 4 neighbouring inputs of a row    B = diag(B_1, ...), blocks b x b

Wrappers are small, 16 (a + b) bits per row and column, and let inputs and outputs change their basis block by block, so that
what 2:4 drops hurts less. h_i is the mean over tokens of x_i^2; W is brought to columns and then rows of one norm first (NoWag),

    W = diag(r) Wn diag(c),    minimise  sum_oi h_i (Wn - A S B)_oi^2  from A = I, B = I, S = Wn where NoWag-P keeps it

by block coordinate descent (compress/linalg/armor.py): a continuous step on all three, then in every tile of a x b a new choice
of one group of 4. r and c go into A and B in the end. With no iterations, or none that lowered the loss, W's own values stay
where NoWag-P keeps them, behind wrappers that are the identity: what `prune: {score: nowag}` stores.

An input that was 0 on every calibration token counts as the mean of the others does. A row of zeros gives 0, whatever the
other rows of its block do; a column of zeros, likewise, passes nothing on.

Departures from the public code: inputs come from the layers compressed before; groups are drawn from the same distribution by
other numbers; a change of a group that rounding would make a loss is left out; the result is never worse than NoWag-P.

Source: ARMOR, Liu et al., 2025, arXiv:2510.05528.
"""

from __future__ import annotations

from math import gcd
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.calibration.statistics import Request, SiteStatistics, SquareSum
from compress.errors import NumericsError, RecipeError
from compress.linalg.armor import GROUP, Wrapped, wrap
from compress.linalg.block_diagonal import identity_blocks
from compress.linalg.finite import all_finite
from compress.linalg.quadratic import energy, fraction
from compress.linalg.sparsity import highest_of_groups, nowag_normalised, nowag_scores
from compress.methods.base import Kept, Layer, LayerShape, MethodConfig, Outcome, SiteMethod, SiteTask
from compress.methods.rtn import check_weight
from compress.modules.armor import ArmorLinear
from compress.modules.armor_spec import ArmorSpec
from compress.modules.sparse import SparseLinear

TELL_EVERY = 50  # iterations
NOT_CALIBRATED = "NOT CALIBRATED: no calibration token reached this layer; all its inputs counted alike"


class ArmorConfig(MethodConfig):
    block_size: int = Field(
        128, ge=4, multiple_of=4, description="inputs, and outputs, that a block of the wrappers mixes; divides both"
    )
    out_block_size: int | None = Field(
        None, ge=1, description="outputs that a block mixes, where that is not to be block_size; divides out_features"
    )
    n_iters: int = Field(1000, ge=0, description="iterations at most; 20000 in the paper, 0: NoWag-P")
    step: Literal["adam", "sequential"] = Field(
        "adam",
        description="how wrappers and values move: all by Adam (the paper's tables), or one after the other by steps that never "
        "raise the loss (the paper's proof)",
    )
    learning_rate: float = Field(1e-3, gt=0, le=1, description="adam: step size; 0.0001 in the paper")
    patience: int = Field(
        100, ge=1, description="stop after so many iterations in a row that lower the loss by next to nothing"
    )

    def sizes(self) -> tuple[int, int]:
        """a and b."""
        return self.out_block_size or self.block_size, self.block_size


class Armor(SiteMethod):
    name = "armor"
    summary = "a 2:4 core between block-diagonal wrappers, fitted together"
    Config = ArmorConfig
    on_leaves = False

    @classmethod
    def plan(cls, shape: LayerShape, config: ArmorConfig) -> ArmorSpec | Kept:
        if shape.kind != "linear":
            raise RecipeError(f"{shape.name}: armor is for linears, not for tables; leave it out of layers")
        _check_sizes(shape, config)
        a, b = config.sizes()
        spec = ArmorSpec.of_sizes(shape.in_features, shape.out_features, a, b)
        bits = 8 * spec.nbytes("BF16") / (shape.out_features * shape.in_features)
        return (
            spec
            if bits < 16
            else Kept(f"core and wrappers would take {bits:.1f} of 16 bits per weight{_smaller(shape, config)}")
        )

    @classmethod
    def in_multiple(cls, config: ArmorConfig) -> int:
        return config.block_size

    @classmethod
    def statistics(cls, config: ArmorConfig) -> tuple[Request, ...]:
        return (SquareSum(),)

    @classmethod
    def workspace(cls, shapes: tuple[LayerShape, ...], config: ArmorConfig) -> int:
        size = max(s.out_features * s.in_features for s in shapes)
        a, b = config.sizes()
        tiles = 12 / min(a, b) + 160 / (a * b)  # what is gathered for each tile, its six pairs in float64
        return int(4 * size * (13 + tiles))

    @classmethod
    def flops(cls, shapes: tuple[LayerShape, ...], config: ArmorConfig) -> float:
        a, b = config.sizes()
        products = 6 * (a + b) if config.step == "adam" else 18 * a + 12 * b
        return float(config.n_iters) * (products + 300) * sum(s.out_features * s.in_features for s in shapes)

    @classmethod
    def compress(
        cls, site: SiteTask, statistics: SiteStatistics | None, generator: torch.Generator
    ) -> dict[str, Outcome]:
        known = SiteStatistics.usable(statistics, f"{', '.join(layer.name for layer in site.layers)}: armor")
        return {layer.name: _compress_layer(layer, known, generator, site) for layer in site.layers}


def _check_sizes(shape: LayerShape, config: ArmorConfig) -> None:
    """Raises: RecipeError where blocks, or groups of 4, do not fit, with the sizes nearest to those asked for that do."""
    out_features, in_features = shape.out_features, shape.in_features
    a, b = config.sizes()
    if in_features % GROUP:
        raise RecipeError(
            f"{shape.name}: 2 of every 4 inputs are kept, and in_features={in_features} is not a multiple of 4; skip it"
        )
    together = config.out_block_size is None
    common = fitting(gcd(in_features, out_features) if together else in_features, GROUP, b)
    if in_features % b:
        alone = "" if common else " and out_block_size to a divisor of out_features"
        usable = common or fitting(in_features, GROUP, b)
        raise RecipeError(
            f"{shape.name}: block_size={b} does not divide in_features={in_features}; use one of {usable}{alone}"
        )
    if out_features % a:
        name = "block_size" if together else "out_block_size"
        apart = f"out_block_size one of {fitting(out_features, 1, a)}"
        use = f"one of {common}, or {apart}" if together and common else apart
        raise RecipeError(f"{shape.name}: {name}={a} does not divide out_features={out_features}; use {use}")


def fitting(features: int, multiple: int, near: int) -> list[int]:
    """Up to three divisors of `features`, multiples of `multiple`, closest to `near` by ratio; ascending."""
    found = [d for d in range(multiple, features + 1, multiple) if features % d == 0]
    return sorted(sorted(found, key=lambda d: max(d, near) / min(d, near))[:3])


def _smaller(shape: LayerShape, config: ArmorConfig) -> str:
    """The largest smaller blocks with which something is saved, as the end of a sentence."""
    for size in range(config.block_size - GROUP, 0, -GROUP):
        fits = shape.out_features % size == 0 and shape.in_features % size == 0
        if fits and ArmorSpec.of_sizes(shape.in_features, shape.out_features, size, size).nbytes("BF16") < (
            2 * shape.out_features * shape.in_features
        ):
            return f"; block_size={size} saves some"
    return ""


def _compress_layer(layer: Layer, known: SiteStatistics | None, generator: torch.Generator, site: SiteTask) -> Outcome:
    check_weight(layer)
    config: ArmorConfig = layer.config
    spec = Armor.plan(layer.shape, config)
    assert isinstance(spec, ArmorSpec), f"{layer.name}: {spec}"
    squares, dead = counted(known, layer.weight)
    mask = highest_of_groups(nowag_scores(layer.weight, squares), spec.core.n, spec.core.m)
    normalised, rows, columns = nowag_normalised(layer.weight)

    def tell(done: int, loss: float) -> None:
        if done % TELL_EVERY == 0:
            site.tell(f"{layer.name}: iteration {done} of {config.n_iters}, loss {loss:.4g}")

    found = wrap(
        normalised, mask, squares, config.sizes(), config.n_iters, config.step, config.learning_rate, config.patience,
        generator, tell,
    )  # fmt: skip
    changed = found.losses[-1] < found.losses[0]
    if changed:
        rows, columns = rows * layer.weight.any(1), columns * layer.weight.any(0)
        found.output_blocks.mul_(rows.view(-1, spec.output_size, 1))
        found.input_blocks.mul_(columns.view(-1, 1, spec.input_size))
        module = _module(layer, found)
    else:
        identities = (
            identity_blocks(n, size, normalised) for n, size in zip(normalised.shape, config.sizes(), strict=True)
        )
        output_blocks, input_blocks = identities
        module = _module(layer, Wrapped(output_blocks, layer.weight, mask, input_blocks))
    assert module.spec == spec
    notes = [] if known is not None else [NOT_CALIBRATED]
    if config.n_iters and not changed and found.losses[0] > 0:
        notes.append("no iteration lowered the loss; it is stored as by prune with score=nowag")
    report = _figures(layer, module, squares, found.losses)
    if known is not None:
        n_dead = int(dead.sum())
        report |= {"n_tokens": float(known.n_tokens), "n_dead": float(n_dead)}
        if n_dead:
            notes.append(
                f"{n_dead} of {dead.numel()} inputs were 0 on every calibration token; they counted as the mean input"
            )
    return Outcome(module, report, notes)


def counted(known: SiteStatistics | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of squares of the inputs [in], all positive, and which of them were 0: those count as the mean of the others does.
    Without tokens, all count alike."""
    n = weight.shape[1]
    if known is None:
        return torch.ones(n, device=weight.device), torch.zeros(n, dtype=torch.bool, device=weight.device)
    squares = known[SquareSum()].to(weight.device)
    dead = squares <= 0
    if dead.all():
        return torch.ones_like(squares), dead
    return (squares.masked_fill(dead, squares[~dead].mean()) if dead.any() else squares), dead


def _module(layer: Layer, found: Wrapped) -> ArmorLinear:
    """Raises: NumericsError if a value is too large for the dtype in which it is stored."""
    parts = [part.to(layer.scale_dtype) for part in (found.output_blocks, found.core, found.input_blocks)]
    if not all(all_finite(part) for part in parts):
        raise NumericsError(
            f"{layer.name}: armor: wrappers or core overflow {layer.scale_dtype}; store the result with model.dtype=float32 or "
            f"bfloat16"
        )
    core = SparseLinear.from_weight(parts[1], found.mask, 2, GROUP)
    return ArmorLinear.from_parts(parts[0], core, parts[2], layer.bias)


def _figures(layer: Layer, module: ArmorLinear, squares: Tensor, losses: list[float]) -> dict[str, float]:
    """`proxy_loss`: what was minimised, as a fraction of what no weights at all would give; `proxy_loss_start`: that of NoWag-P.
    Measured on what is stored: `diagonal_error`, of the outputs were inputs uncorrelated, and `weight_error`."""
    difference = (layer.weight - module.dense(torch.float32)).square_()
    return {
        "proxy_loss": min(losses[0], losses[-1]),
        "proxy_loss_start": losses[0],
        "iterations": float(len(losses) - 1),
        "weight_error": fraction(float(difference.double().sum()), energy(layer.weight, None)),
        "diagonal_error": fraction(float((difference @ squares).sum()), float((layer.weight.square() @ squares).sum())),
    }
