from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.calibration.statistics import SecondMoment, SiteStatistics
from compress.checkpoint.stream import rebuild_module
from compress.errors import NumericsError, RecipeError
from compress.linalg.quadratic import energy
from compress.methods.base import Kept, LayerShape, Outcome, SiteTask
from compress.methods.gptq import GPTQ, GPTQConfig
from compress.methods.lq_lora import LQLoRA, LQLoRAConfig
from compress.methods.lqer import LQER, LQERConfig
from compress.methods.lqer_sizes import bits_of
from compress.methods.lut import LUT, LUTConfig
from compress.methods.rtn import RTN, RTNConfig
from compress.modules.spec import spec_from_dict
from tests.methods.layers import compress, inputs, layer, statistics, weight

OUT, IN, TOKENS = 48, 96, 400
GRID = {"bits": 2, "group_size": 32, "clip": "mse"}
SHAPE = LayerShape("block.q", OUT, IN)


def corrected(matrix: Tensor, x: Tensor | None, method=LQER, dtype=torch.float32, original=None, **settings) -> Outcome:
    Config = LQERConfig if method is LQER else LQLoRAConfig
    config = Config(**{**GRID, "rank": 6, "factor_bits": 16, **settings})
    return compress(
        method, [layer("l", matrix, config, scale_dtype=dtype)], None if x is None else statistics(x, original)
    )["l"]


def rounded(matrix: Tensor, x: Tensor | None, dtype=torch.float32, **settings) -> Outcome:
    method, config = (RTN, RTNConfig(**GRID)) if x is None else (GPTQ, GPTQConfig(**{**GRID, **settings}))
    stats = None if x is None else statistics(x)
    return compress(method, [layer("l", matrix, config, scale_dtype=dtype)], stats)["l"]


def loss(matrix: Tensor, module, x: Tensor | None) -> float:
    return energy(matrix - module.dense(torch.float32), None if x is None else x.T @ x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_are_those_of_the_quantizer_and_the_pair_is_exact(dtype):
    """The residual is taken from the weights that will run, and no rank-6 pair leaves less of it under H."""
    matrix, x = weight(OUT, IN), inputs(TOKENS, IN)
    found, alone = corrected(matrix, x, dtype=dtype).module, rounded(matrix, x, dtype).module
    for name, tensor in alone.stored().items():
        assert torch.equal(found.base.stored()[name], tensor), name
    residual = (matrix - alone.dense(torch.float32)).double()
    values, vectors = torch.linalg.eigh((x.T @ x).double())
    root = vectors * values.clamp(min=0).sqrt()
    least = float(torch.linalg.svdvals(residual @ root)[6:].square().sum())
    assert loss(matrix, found, x) == pytest.approx(least, rel=1e-4 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("method", [LQER, LQLoRA])
@pytest.mark.parametrize("factor_bits", [16, 8, 4])
@pytest.mark.parametrize(("quantizer", "objective"), [("gptq", "whitened"), ("gptq", "diagonal"), ("rtn", "plain")])
def test_never_worse_than_rounding_alone(method, factor_bits, quantizer, objective):
    matrix, x = weight(OUT, IN), inputs(TOKENS, IN)
    data = x if quantizer == "gptq" else None
    outcome = corrected(
        matrix, data, method, torch.bfloat16, factor_bits=factor_bits, quantizer=quantizer, objective=objective
    )
    assert outcome.report["proxy_loss"] < outcome.report["proxy_loss_start"]
    assert outcome.module.spec == method.plan(SHAPE, outcome_config(method, factor_bits, quantizer, objective))
    if objective != "diagonal":
        assert loss(matrix, outcome.module, data) < loss(matrix, rounded(matrix, data, torch.bfloat16).module, data)


def outcome_config(method, factor_bits, quantizer, objective):
    Config = LQERConfig if method is LQER else LQLoRAConfig
    return Config(**GRID, rank=6, factor_bits=factor_bits, quantizer=quantizer, objective=objective)


@pytest.mark.parametrize("first", ["rounding", "low_rank"])
@pytest.mark.parametrize("quantizer", ["gptq", "rtn"])
@pytest.mark.parametrize("objective", ["plain", "diagonal", "whitened"])
def test_turns_are_never_worse_than_lqer(first, quantizer, objective):
    matrix, x = weight(OUT, IN), inputs(TOKENS, IN)
    settings = {"quantizer": quantizer, "objective": objective}
    once, turned = corrected(matrix, x, **settings), corrected(matrix, x, LQLoRA, first=first, **settings)
    assert turned.report["proxy_loss"] <= once.report["proxy_loss"] * (1 + 1e-5)
    assert turned.report["proxy_loss_start"] == pytest.approx(once.report["proxy_loss_start"], rel=1e-6)
    assert turned.report["rounds"] >= 2 and once.report["rounds"] == 1


def test_one_round_of_loftq_is_lqer_bit_for_bit():
    matrix, x = weight(OUT, IN), inputs(TOKENS, IN)
    once, turned = (
        corrected(matrix, x, factor_bits=8),
        corrected(matrix, x, LQLoRA, rounds=1, first="rounding", factor_bits=8),
    )
    assert all(torch.equal(t, once.module.stored()[name]) for name, t in turned.module.stored().items())


def test_codes_make_good_for_the_few_bits_of_the_pair(monkeypatch):
    """A pair of the weight's own strongest directions, in 4 bits: rounded behind it, the codes take up what that costs."""
    matrix = weight(OUT, IN) + weight(OUT, 4) @ weight(4, IN) / 0.02
    x = inputs(TOKENS, IN)
    settings = {"factor_bits": 4, "first": "low_rank", "rounds": 2}
    found = corrected(matrix, x, LQLoRA, **settings)
    monkeypatch.setattr("compress.methods.lqer._turn_as_stored", lambda *_: None)
    before = corrected(matrix, x, LQLoRA, **settings)
    assert found.report["proxy_loss"] < 0.95 * before.report["proxy_loss"]
    assert found.report["rounds"] > before.report["rounds"]
    assert found.report["proxy_loss"] == pytest.approx(
        loss(matrix, found.module, x) / energy(matrix, x.T @ x), rel=1e-4
    )


def test_alternation_pays_with_gptq_inside():
    matrix, x = weight(OUT, IN), inputs(TOKENS, IN)
    once = corrected(matrix, x).report["proxy_loss"]
    assert corrected(matrix, x, LQLoRA).report["proxy_loss"] < 0.9 * once
    assert corrected(matrix, x, LQLoRA, first="low_rank").report["proxy_loss"] < 0.9 * once


@pytest.mark.parametrize("method", [LQER, LQLoRA])
def test_full_rank_leaves_what_the_factors_bits_leave(method):
    matrix, x = weight(OUT, IN), inputs(TOKENS, IN)
    config = (LQERConfig if method is LQER else LQLoRAConfig)(**GRID, rank=OUT, factor_bits=8)
    spec = method.plan(SHAPE, config)
    assert spec.rank == OUT and not isinstance(spec, Kept)
    outcome = corrected(matrix, x, method, rank=OUT, factor_bits=8)
    assert outcome.report["proxy_loss"] < 1e-3  # the factors' 8 bits


def test_knowing_more_of_the_inputs_leaves_less_error_on_them():
    matrix, x = weight(OUT, IN), inputs(TOKENS, IN)
    errors = [corrected(matrix, x, objective=o).report["relative_error"] for o in ("plain", "diagonal", "whitened")]
    assert errors[2] < min(errors[:2])


def test_the_report_is_of_what_is_stored():
    matrix, x = weight(OUT, IN), inputs(TOKENS, IN)
    outcome = corrected(matrix, x, dtype=torch.bfloat16, factor_bits=4)
    found = loss(matrix, outcome.module, x)
    assert outcome.report["loss"] == pytest.approx(found / TOKENS, rel=1e-4)
    assert outcome.report["relative_error"] == pytest.approx(found / energy(matrix, x.T @ x), rel=1e-4)
    assert outcome.report["proxy_loss"] == pytest.approx(outcome.report["relative_error"], rel=1e-4)
    assert outcome.report["rank"] == 6


def test_tables_can_be_corrected_too():
    matrix, x = weight(OUT, IN), inputs(TOKENS, IN)
    config = LQERConfig(**GRID, rank=6, quantizer="lut", factor_bits=8)
    outcome = compress(LQER, [layer("l", matrix, config, scale_dtype=torch.float32)], statistics(x))["l"]
    alone = compress(
        LUT, [layer("l", matrix, LUTConfig(bits=2, group_size=32), scale_dtype=torch.float32)], statistics(x)
    )
    assert outcome.module.spec == LQER.plan(SHAPE, config) and outcome.module.spec.base == alone["l"].module.spec
    assert all(torch.equal(t, outcome.module.base.stored()[name]) for name, t in alone["l"].module.stored().items())
    assert loss(matrix, outcome.module, x) < 0.8 * loss(matrix, alone["l"].module, x)
    again = rebuild_module("l", outcome.module.spec, outcome.module.stored(), torch.float32)
    assert spec_from_dict(outcome.module.spec.to_dict(), "here") == outcome.module.spec
    assert torch.equal(again(x), outcome.module(x))
    turned = compress(
        LQLoRA, [layer("l", matrix, LQLoRAConfig(**dict(config)), scale_dtype=torch.float32)], statistics(x)
    )
    assert turned["l"].report["proxy_loss"] < outcome.report["proxy_loss"]


def test_refit_comes_closer_to_what_the_original_computes():
    matrix, x = weight(OUT, IN), inputs(TOKENS, IN)
    original = x + 0.3 * inputs(TOKENS, IN, seed=5)
    errors = []
    for refit in (0.0, 1.0):
        module = corrected(matrix, x, original=original, refit=refit).module
        errors.append(float((original @ matrix.T - x @ module.dense().T).square().sum()))
    assert errors[1] < 0.95 * errors[0]


def test_bias_and_settings_by_layer():
    x, bias = inputs(TOKENS, IN), torch.arange(OUT).float()
    layers = [
        layer("a", weight(OUT, IN), LQERConfig(**GRID, rank=4, factor_bits=8), bias=bias, scale_dtype=torch.float32),
        layer("b", weight(OUT, IN, 2), LQERConfig(**{**GRID, "quantizer": "rtn"}, rank=2), scale_dtype=torch.float32),
    ]
    found = compress(LQER, layers, statistics(x))
    assert (
        list(found) == ["a", "b"] and torch.equal(found["a"].module.bias, bias) and found["a"].module.base.bias is None
    )
    assert (found["a"].module.spec.rank, found["b"].module.spec.rank) == (4, 2)
    alone = compress(LQER, layers[:1], statistics(x))["a"].module
    assert all(torch.equal(t, alone.stored()[name]) for name, t in found["a"].module.stored().items())


def test_layers_without_tokens_are_rounded_and_corrected_by_the_weight_alone():
    matrix = weight(OUT, IN)
    nothing = SiteStatistics(0, {SecondMoment(): torch.zeros(IN, IN)})
    config = LQERConfig(**GRID, rank=6, factor_bits=16)
    outcome = compress(LQER, [layer("l", matrix, config, scale_dtype=torch.float32)], nothing)["l"]
    assert len(outcome.notes) == 1 and outcome.notes[0].startswith("NOT CALIBRATED")
    expected = corrected(matrix, None, quantizer="rtn", objective="plain")
    assert not expected.notes and torch.equal(outcome.module.dense(), expected.module.dense())
    config = LQERConfig(**GRID, rank=6, factor_bits=16, quantizer="rtn", objective="plain")
    unasked = compress(LQER, [layer("l", matrix, config, scale_dtype=torch.float32)], SiteStatistics(5, {}))["l"]
    assert not unasked.notes and torch.equal(unasked.module.dense(), expected.module.dense())
    assert "loss" not in expected.report and expected.report["weight_error"] == pytest.approx(
        expected.report["proxy_loss"]
    )


def test_dead_inputs_and_few_tokens_are_no_obstacle():
    matrix, x = weight(OUT, IN), inputs(20, IN)
    x[:, :5] = 0
    outcome = corrected(matrix, x, LQLoRA, factor_bits=8)
    assert torch.isfinite(outcome.module.dense()).all()
    assert outcome.report["proxy_loss"] <= outcome.report["proxy_loss_start"]
    assert any("too few" in note for note in outcome.notes)


def test_what_cannot_be_computed_is_named():
    x = inputs(20, IN)
    x[3, 3] = torch.inf
    with pytest.raises(NumericsError, match="l: lqer"):
        corrected(weight(OUT, IN), x)
    with pytest.raises(NumericsError, match="l: 4608 of 4608 weights are NaN"):
        corrected(weight(OUT, IN) * torch.nan, inputs(20, IN))


def test_tells_of_rounds():
    told: list[str] = []
    task = layer("block.q", weight(OUT, IN), LQLoRAConfig(**GRID, rank=4, rounds=2))
    LQLoRA.compress(SiteTask("site", (task,), told.append), statistics(inputs(TOKENS, IN)), torch.Generator())
    assert len(told) == 2 and told[1].startswith("block.q: round 2, 0.")


# ---- sizes


@pytest.mark.parametrize("factor_bits", [16, 8, 4])
@pytest.mark.parametrize("target", [3.2, 4.0, 7.77])
def test_bits_per_weight_is_the_largest_rank_that_fits(factor_bits, target):
    config = LQERConfig(bits=2, group_size=32, factor_bits=factor_bits, bits_per_weight=target)
    spec = LQER.plan(LayerShape("l", 128, 192), config)
    assert bits_of(spec) <= target
    more = LQER.plan(
        LayerShape("l", 128, 192), LQERConfig(bits=2, group_size=32, factor_bits=factor_bits, rank=spec.rank + 1)
    )
    assert isinstance(more, Kept) or bits_of(more) > target


def test_sizes_that_do_not_fit_are_refused_with_what_does():
    with pytest.raises(RecipeError, match=r"block.q: bits_per_weight=2.5 leaves no room .* take 3.\d+; use at least"):
        LQER.plan(SHAPE, LQERConfig(**GRID, bits_per_weight=2.5))
    with pytest.raises(RecipeError, match="group_size=36 does not divide in_features=96"):
        LQER.plan(SHAPE, LQERConfig(group_size=36))
    with pytest.raises(RecipeError, match="multiples of 64, and a 48 x 96 layer has none above 48"):
        LQER.plan(SHAPE, LQERConfig(**GRID, rank_multiple=64))
    with pytest.raises(RecipeError, match="lq_lora is for linears, not for tables"):
        LQLoRA.plan(LayerShape("table", 64, 64, "embedding"), LQLoRAConfig())
    kept = LQER.plan(SHAPE, LQERConfig(**GRID, rank=40, factor_bits=16))
    assert isinstance(kept, Kept) and "rank 40 would take 22.5 of 16 bits" in kept.reason
    assert LQER.plan(SHAPE, LQER.fitted(LQERConfig(**GRID, rank=13), 4)).rank == 12
    assert LQER.plan(SHAPE, LQERConfig(**GRID, rank=1000, factor_bits=4)).rank == OUT


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"gptaq": 0.25}, "use refit"),
        ({"refit": 0.5, "objective": "plain"}, "needs objective=whitened"),
        ({"quantizer": "lut", "bits": 5}, "tables for 2 to 4 bits"),
        ({"widths": [2, 3], "bits": 2}, "by overrides"),
        ({"factor_bits": 5}, "factor_bits"),
        ({"rank": 0}, "rank"),
        ({"rounds": 0}, "rounds"),
        ({"bits_per_weight": 16}, "bits_per_weight"),
    ],
)
def test_settings_out_of_range_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        LQLoRAConfig(**wrong)
