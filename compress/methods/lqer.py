"""LQER: round to few bits, then make good with a pair of thin matrices what the rounding cost on the calibration inputs.

    Q = quant(W)                                       by gptq, rtn or lut, the same codes that are stored
    minimise  tr((W - Q - L R) M (W - Q - L R)^T)      over L [out, rank], R [rank, in]

    plain      M = I             the error of the weight: no data with quantizer=rtn
    diagonal   M = diag(H)       the outputs' error, were inputs uncorrelated
    whitened   M = H             the outputs' error on the calibration inputs, H = sum_t x_t x_t^T

The pair is the exact solution, the truncation of W - Q under M (compress/linalg/low_rank.py): no other of this rank has less
error. It is stored in 4 or 8 bits with a scale per row, or in 16 (the dtype of the model). The same quantizer rounds R first,
then L, fitted anew to the R that is stored, on the inputs that this R gives.

The correction takes `factor_bits` rank (in + out) / (in out) bits per weight beside codes and scales; `bits_per_weight` takes the
largest rank that fits.

`refit` aims at what the original model gives for its own inputs, as in svd: W_s = W + refit W D (H + a I)^-1 is rounded and
corrected in place of W, under H + a I in place of H.

Departures from the paper: it scales columns by the mean size of each input and truncates then; here that is
objective=diagonal, with root mean squares, and the default knows that inputs are correlated. Q may be GPTQ's.

Source: Zhang et al., 2024, arXiv:2402.02446.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import lcm
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compress.calibration.statistics import CrossMoment, Request, SecondMoment, SiteStatistics
from compress.errors import NumericsError, RecipeError
from compress.linalg.correction import Alternation, Pair, best_pair
from compress.linalg.finite import all_finite
from compress.linalg.low_rank import shifted
from compress.linalg.quadratic import energy, fraction
from compress.methods.base import Kept, Layer, LayerShape, MethodConfig, Outcome, SiteMethod, SiteTask
from compress.methods.bit_widths import MixedWidths
from compress.methods.gptq import GPTQ, GPTQConfig
from compress.methods.lqer_sizes import DENSE_BITS, base_spec, bits_of, corrected_spec, pair_flops, rank_of
from compress.methods.lut import LUT
from compress.methods.rtn import RTN, check_weight
from compress.methods.svd import SVD, SVDConfig
from compress.modules.corrected import CorrectedLinear
from compress.modules.corrected_spec import FACTORS, CorrectedSpec

LUT_BITS = 4
OWN_MEANING = {"refit"}  # of lut: rounds of fitting its tables, and another thing here
NOT_CALIBRATED = "NOT CALIBRATED: no calibration token reached this layer; its weight alone was rounded and corrected"


class LQERConfig(GPTQConfig):
    """Settings of what rounds, and of the correction."""

    clip: Literal["none", "mse"] = Field("mse", description="how ranges are found, as in gptq")
    quantizer: Literal["gptq", "rtn", "lut"] = Field(
        "gptq",
        description="what rounds; settings of gptq alone are of no effect with rtn, those of the grid are of none with lut",
    )
    rank: int = Field(16, ge=1, description="rank of the correction; at most the smaller side of the layer is used")
    bits_per_weight: float | None = Field(
        None, gt=0, lt=16, description="in place of rank: size of a layer, codes, scales and correction together"
    )
    rank_multiple: int = Field(1, ge=1, description="ranks are rounded down to a multiple of it, but not to 0")
    factor_bits: Literal[16, 8, 4] = Field(
        4, description="bits of the correction's factors: 16 as the model's floats, or integers with a scale per row"
    )
    objective: Literal["plain", "diagonal", "whitened"] = Field(
        "whitened",
        description="what the correction minimises: the weight's error, or the outputs' by ever better knowledge",
    )
    refit: float = Field(
        0.0, ge=0, le=1, description="strength of matching what the original model computes from its own inputs; 0 off"
    )

    @model_validator(mode="after")
    def _one_stream(self) -> LQERConfig:
        if self.gptaq:
            raise ValueError(
                "gptaq belongs to gptq alone; drop it, or use refit, which rounds and corrects to that end"
            )
        if self.widths is not None:
            raise ValueError(
                "widths is not there beside a correction; drop it, and give layers their bits by overrides"
            )
        if self.refit and self.objective != "whitened":
            raise ValueError(f"refit={self.refit:g} needs objective=whitened, not {self.objective}")
        if self.quantizer == "lut" and self.bits > LUT_BITS:
            raise ValueError(f"quantizer=lut has tables for 2 to {LUT_BITS} bits, not {self.bits}")
        return self

    def turns(self) -> tuple[int, bool]:
        """How many roundings at most, and whether the low rank comes first."""
        return 1, False

    def rounding(self, bits: int | None = None) -> tuple[type[SiteMethod], MethodConfig]:
        """What rounds the weight; with `bits`, what rounds a factor: integers with a scale per row."""
        method: type[SiteMethod] = RTN if self.quantizer == "rtn" else GPTQ
        if self.quantizer == "lut" and bits is None:
            method = LUT
        names = (method.Config.model_fields.keys() & type(self).model_fields.keys()) - OWN_MEANING
        fields = {name: getattr(self, name) for name in names if name != "widths"}  # settled for the whole
        if bits is not None:
            fields |= {"bits": bits, "group_size": -1, "symmetric": True, "signed_scales": False}
        return method, method.Config(**fields)


class LQER(MixedWidths):
    name = "lqer"
    summary = "integer weights of 2 to 8 bits and a low-rank correction of their error on the calibration inputs"
    Config = LQERConfig
    on_leaves = False

    @classmethod
    def plan(cls, shape: LayerShape, config: LQERConfig) -> CorrectedSpec | Kept:
        if shape.kind != "linear":
            raise RecipeError(f"{shape.name}: {cls.name} is for linears, not for tables; leave it out of layers")
        base = base_spec(shape, config)
        if isinstance(base, Kept):
            return base
        spec = corrected_spec(shape, config, base, rank_of(shape, config, base))
        bits = bits_of(spec)
        if bits >= DENSE_BITS:
            return Kept(f"codes and a correction of rank {spec.rank} would take {bits:.1f} of 16 bits per weight")
        return spec

    @classmethod
    def in_multiple(cls, config: LQERConfig) -> int:
        method, rounding = config.rounding()
        return method.in_multiple(rounding)

    @classmethod
    def fitted(cls, config: LQERConfig, multiple: int) -> LQERConfig:
        return config.model_copy(update={"rank_multiple": lcm(config.rank_multiple, multiple)})

    @classmethod
    def statistics(cls, config: LQERConfig) -> tuple[Request, ...]:
        if config.quantizer == "rtn" and config.objective == "plain":
            return ()
        return (SecondMoment(), CrossMoment()) if config.refit else (SecondMoment(),)

    @classmethod
    def workspace(cls, shapes: tuple[LayerShape, ...], config: LQERConfig) -> int:
        method, rounding = config.rounding()
        held = (
            4 * 3 * sum(s.out_features * s.in_features for s in shapes)
        )  # W_s, what is rounded next, what became of it
        return held + max(method.workspace(shapes, rounding), SVD.workspace(shapes, SVDConfig(refit=config.refit)))

    @classmethod
    def flops(cls, shapes: tuple[LayerShape, ...], config: LQERConfig) -> float:
        method, rounding = config.rounding()
        rounds, low_rank_first = config.turns()
        n_rounded, n_decomposed = rounds + low_rank_first, rounds + 2 * low_rank_first
        return n_rounded * method.flops(shapes, rounding) + n_decomposed * sum(pair_flops(s, config) for s in shapes)

    @classmethod
    def compress(
        cls, site: SiteTask, statistics: SiteStatistics | None, generator: torch.Generator
    ) -> dict[str, Outcome]:
        known = SiteStatistics.usable(statistics, f"{', '.join(layer.name for layer in site.layers)}: {cls.name}")
        if known is not None and SecondMoment() not in known.values:  # nobody here asked for it
            known = None
        works = [_started(layer, known, cls) for layer in site.layers]
        n_rounds = 0
        while turning := [work for work in works if not work.turns.finished]:
            n_rounds += 1
            tasks = [_Rounding(work.layer, work.layer.config.rounding(), work.turns.target) for work in turning]
            done = _rounded(tasks, site, known, generator, site.continuous)
            for work in turning:
                outcome = done[work.layer.name]
                with _naming(work.layer.name, cls.name):
                    work.turns.take(outcome.module.dense(torch.float32), outcome)
                site.tell(
                    f"{work.layer.name}: round {n_rounds}, {_left(work.turns):.3f} of the error of rounding alone"
                )
        for work in works:
            work.module, work.rounded = _module(work, work.turns.best, work.turns.kept, cls.name), work.turns.kept
        _round_factors(works, site, known, generator)
        _turn_as_stored([work for work in works if work.turns_as_stored], cls.name, site, known, generator)
        return {work.layer.name: _outcome(work, known) for work in works}


@dataclass
class _Work:
    """A layer on its way. `target`: W, or W_s; `moment`: M; `module`, and what `rounded` its base: once the turns are over."""

    layer: Layer
    target: Tensor
    moment: Tensor | None
    turns: Alternation[Outcome]
    notes: list[str]
    report: dict[str, float]
    module: CorrectedLinear | None = None
    rounded: Outcome | None = None
    more_rounds: int = 0  # with the pair as it is stored

    @property
    def turns_as_stored(self) -> bool:
        return self.turns.by_turns and self.layer.config.factor_bits < DENSE_BITS

    def loss(self) -> float:
        """What was minimised, of the module as it is."""
        assert self.module is not None
        return _energy(self.target.float() - self.module.dense(torch.float32), self.moment)


@dataclass(frozen=True)
class _Rounding:
    """A matrix to be rounded in the place of a layer, and what rounds it."""

    layer: Layer
    how: tuple[type[SiteMethod], MethodConfig]
    weight: Tensor


def _started(layer: Layer, known: SiteStatistics | None, method: type[LQER]) -> _Work:
    check_weight(layer)
    config: LQERConfig = layer.config
    spec = method.plan(layer.shape, config)
    assert isinstance(spec, CorrectedSpec), f"{layer.name}: {spec}"
    target, moment, report, notes = layer.weight, None, {"rank": float(spec.rank)}, []
    if known is None and method.statistics(config):
        notes.append(NOT_CALIBRATED)
    if known is not None and config.objective != "plain":
        moment = known[SecondMoment()]
        if config.objective == "diagonal":
            moment = moment.diagonal()
        if config.refit:
            with _naming(layer.name, method.name):
                target, moment, used = shifted(layer.weight, moment, known[CrossMoment()], config.refit, config.damping)
            target, report["damping"] = target.float(), used
            if used > config.damping:
                notes.append(f"damping raised from {config.damping:g} to {used:.3g}: calibrate on more tokens")
    rounds, low_rank_first = config.turns()
    with _naming(layer.name, method.name):
        turns: Alternation[Outcome] = Alternation(target, spec.rank, moment, rounds, low_rank_first)
    return _Work(layer, target, moment, turns, notes, report)


@contextmanager
def _naming(layer: str, method: str) -> Iterator[None]:
    try:
        yield
    except NumericsError as error:
        raise NumericsError(f"{layer}: {method}: {error}") from None


def _left(turns: Alternation[Outcome]) -> float:
    return fraction(turns.best.loss, turns.alone)


def _rounded(
    tasks: Sequence[_Rounding],
    site: SiteTask,
    known: SiteStatistics | None,
    generator: torch.Generator,
    continuous: bool = False,
) -> dict[str, Outcome]:
    """Layer name -> what its quantizer made of the matrix. Those of one quantizer share its work on the statistics."""
    layers: dict[type[SiteMethod], list[Layer]] = {}
    for task in tasks:
        method, config = task.how
        layer = replace(task.layer, weight=task.weight, bias=None, config=config)
        layers.setdefault(method, []).append(layer)
    done: dict[str, Outcome] = {}
    for method, alike in layers.items():
        done |= method.compress(SiteTask(site.name, tuple(alike), continuous=continuous), known, generator)
    return done


def _module(work: _Work, pair: Pair, rounded: Outcome, method: str) -> CorrectedLinear:
    """A base and a pair, which is in the dtype in which floats are stored."""
    layer = work.layer
    left, right = (factor.to(layer.scale_dtype) for factor in (pair.left, pair.right))
    if not (all_finite(left) and all_finite(right)):
        raise NumericsError(
            f"{layer.name}: {method}: its factors overflow {layer.scale_dtype}; store the result with model.dtype=float32"
        )
    return CorrectedLinear.from_parts(rounded.module, left, right, layer.bias)


def _round_factors(
    works: Sequence[_Work], site: SiteTask, known: SiteStatistics | None, generator: torch.Generator
) -> None:
    """The pair in few bits, where it is stored so; the left factor is fitted anew to what becomes of the right one."""
    moment = None if known is None else known[SecondMoment()]
    for work in works:
        config: LQERConfig = work.layer.config
        for name in FACTORS if config.factor_bits < DENSE_BITS else ():
            assert work.module is not None
            leaf = work.module.leaves()[name]
            inputs = None if known is None else known.mapped(leaf.input_map)
            part = replace(work.layer, name=f"{work.layer.name}.{name}")
            task = _Rounding(part, config.rounding(config.factor_bits), leaf.weight)
            outcome = _rounded([task], site, inputs, generator)[part.name]
            work.module = work.module.with_leaf(name, outcome.module, moment)


def _turn_as_stored(
    works: Sequence[_Work], method: str, site: SiteTask, known: SiteStatistics | None, generator: torch.Generator
) -> None:
    """Turns with the pair as it is stored: what its few bits cost, the codes make good for, then the pair anew. They end where
    nothing is gained."""
    for _ in range(max((work.layer.config.turns()[0] for work in works), default=0)):
        tasks = []
        for work in works:
            assert work.module is not None
            rest = work.target.float() - work.module.correction()
            tasks.append(_Rounding(work.layer, work.layer.config.rounding(), rest))
        done = _rounded(tasks, site, known, generator, site.continuous)
        gained = []
        for work in works:
            before, rounded = (work.loss(), work.module, work.rounded), done[work.layer.name]
            work.more_rounds += 1
            assert work.module is not None
            parts = (rounded.module, work.module.right, work.module.left)
            work.module, work.rounded = CorrectedLinear(work.module.spec, *parts, bias=work.layer.bias), rounded
            between = work.loss(), work.module
            with _naming(work.layer.name, method):
                pair = best_pair(work.target - rounded.module.dense(torch.float32), work.module.spec.rank, work.moment)
            work.module = _module(work, pair, rounded, method)
            _round_factors([work], site, known, generator)
            if between[0] < work.loss():
                work.module = between[1]
            if work.loss() < before[0]:
                gained.append(work)
            else:
                _, work.module, work.rounded = before
        works = gained
        if not works:
            return


def _outcome(work: _Work, known: SiteStatistics | None) -> Outcome:
    """Report, of the layer as stored: `proxy_loss`, what was minimised, as a fraction of what no weights at all would give, and
    `proxy_loss_start`, that of rounding alone; `loss`, the mean over tokens of |W x - W' x|^2; `relative_error`, that over the
    mean of |W x|^2; `weight_error`; `rounds`, how many roundings there were."""
    assert work.module is not None and work.rounded is not None
    difference = work.target.float() - work.module.dense(torch.float32)
    total = _energy(work.target.float(), work.moment)
    report = work.report | {
        "proxy_loss": fraction(_energy(difference, work.moment), total),
        "proxy_loss_start": fraction(work.turns.alone, total),
        "rounds": float(len(work.turns.losses) + work.more_rounds),
        "weight_error": fraction(
            energy(work.layer.weight - work.module.dense(torch.float32), None), energy(work.layer.weight, None)
        ),
    }
    notes = list(work.notes)
    if known is not None:
        hessian = known[SecondMoment()]
        loss = energy(difference, hessian)
        report["loss"] = loss / known.n_tokens
        report["relative_error"] = fraction(loss, energy(work.target.float(), hessian))
        report["n_tokens"] = float(known.n_tokens)
        notes += work.rounded.notes
    return Outcome(work.module, report, notes, continuous=work.rounded.continuous)


def _energy(matrix: Tensor, moment: Tensor | None) -> float:
    """tr(A M A^T)."""
    if moment is not None and moment.ndim == 1:
        return max(float((matrix.double().square() @ moment.double()).sum()), 0.0)
    return energy(matrix, moment)
