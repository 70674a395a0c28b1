from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from compress.calibration.statistics import CrossMoment, SecondMoment, SiteStatistics
from compress.errors import NumericsError, RecipeError
from compress.linalg.lookup import Lookup
from compress.linalg.quadratic import row_energy
from compress.methods.base import Kept, LayerShape, Outcome
from compress.methods.gptq import GPTQ, GPTQConfig
from compress.methods.lut import LUT, LUTConfig
from compress.modules.lut_spec import LUTSpec
from tests.methods.layers import compress, inputs, layer, statistics, weight

OUT, IN = 24, 64
NEAREST = {"error_feedback": False, "refit": 0}
KINDS = [{"table": "normal_float", "group_size": 16}, {"group_size": 16}, {}, {"group_size": -1}]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)


def done(x: Tensor | None, matrix: Tensor | None = None, dtype: torch.dtype = torch.bfloat16, **settings) -> Outcome:
    matrix = weight(OUT, IN) if matrix is None else matrix
    task = layer("l", matrix, LUTConfig(**settings), scale_dtype=dtype, bias=torch.ones(len(matrix)))
    return compress(LUT, [task], None if x is None else statistics(x))["l"]


def loss(outcome: Outcome, x: Tensor, matrix: Tensor | None = None) -> float:
    """Mean over tokens of |W x - Q x|^2."""
    difference = (weight(OUT, IN) if matrix is None else matrix) - outcome.module.dense(torch.float32)
    return float((x @ difference.T).square().sum()) / len(x)


@every_kind
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_what_is_stored_is_what_was_planned_and_counted(kind, bits):
    x = inputs(200, IN)
    outcome = done(x, bits=bits, **kind)
    config = LUTConfig(bits=bits, **kind)
    assert outcome.module.spec == LUT.plan(LayerShape("l", OUT, IN), config)
    assert outcome.module.nbytes == outcome.module.spec.nbytes("BF16")
    assert torch.equal(outcome.module.stored()["bias"], torch.ones(OUT))
    assert outcome.report["loss"] == pytest.approx(loss(outcome, x), rel=1e-3)
    energy = float(row_energy(weight(OUT, IN), x.T @ x).sum())
    assert outcome.report["relative_error"] == pytest.approx(outcome.report["loss"] * 200 / energy, rel=1e-4)
    assert outcome.report["loss"] < outcome.report["loss_start"]
    assert not outcome.notes


@every_kind
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_feedback_loses_less_than_the_nearest_value_and_refit_less_than_that(kind, bits):
    x = inputs(200, IN)
    losses = [
        done(x, bits=bits, **kind, **settings).report["loss"]
        for settings in (NEAREST, {"refit": 0}, {"refit": 1}, {"refit": 4})
    ]
    assert losses[0] > 1.2 * losses[1] and losses[1] > losses[2] >= losses[3]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_at_equal_bytes_it_loses_less_than_an_integer_grid(bits):
    x, matrix = inputs(400, IN), weight(OUT, IN)
    grid = GPTQConfig(bits=bits, group_size=16, clip="mse", signed_scales=True)
    integers = compress(GPTQ, [layer("l", matrix, grid)], statistics(x))["l"]
    tables = done(x, bits=bits, group_size=16)
    assert tables.module.nbytes == integers.module.nbytes - 16 + 2 * 2**bits  # a shape there, a table here
    assert tables.report["loss"] < integers.report["loss"]


def test_sensitivity_is_that_of_the_inputs():
    x = inputs(400, IN)
    x[:, : IN // 2] *= 8
    for kind in KINDS:
        weighed, alike = (done(x, bits=3, sensitivity=s, **kind, **NEAREST) for s in ("activations", "none"))
        assert weighed.report["loss"] < alike.report["loss"]
        errors = [(weight(OUT, IN) - o.module.dense(torch.float32)).square().sum() for o in (weighed, alike)]
        assert errors[1] < errors[0]


@every_kind
def test_without_feedback_and_refit_every_weight_takes_the_nearest_value(kind):
    module = done(inputs(200, IN), **kind, **NEAREST).module
    assert torch.equal(module.codes(), Lookup(module.weight_table, module.weight_scale).encode(weight(OUT, IN)))


def test_uncorrelated_inputs_of_one_size_need_no_feedback():
    x = torch.eye(IN) * 3
    for kind in KINDS:
        assert torch.equal(
            done(x, dtype=torch.float32, refit=0, **kind).module.dense(),
            done(x, dtype=torch.float32, **kind, **NEAREST).module.dense(),
        )


@pytest.mark.parametrize("order", ["act", "none"])
@pytest.mark.parametrize("kind", KINDS[:3], ids=str)
def test_matching_brings_outputs_to_those_of_the_original_inputs(kind, order):
    """The compressed layers before it changed the inputs; what W makes of the original ones is the aim."""
    original = inputs(400, IN)
    x = original + 0.3 * inputs(400, IN, seed=5) @ (torch.randn(IN, IN, generator=torch.Generator().manual_seed(6)) / 8)
    known, matrix = statistics(x, original), weight(OUT, IN)
    losses = []
    for match in (0.0, 0.5, 1.0):
        config = LUTConfig(bits=4, match=match, order=order, damping=1e-4, **kind)
        assert (CrossMoment() in LUT.statistics(config)) == (match > 0)
        module = compress(LUT, [layer("l", matrix, config, scale_dtype=torch.float32)], known)["l"].module
        losses.append(float((original @ matrix.T - x @ module.dense().T).square().sum()))
    assert losses[0] > 1.5 * losses[1] and losses[1] > losses[2]
    best = torch.linalg.lstsq(x, original @ matrix.T).solution
    floor = float((original @ matrix.T - x @ best).square().sum())
    assert floor < losses[2] < 1.3 * floor


def test_matching_changes_nothing_where_inputs_are_the_original_ones():
    x = inputs(200, IN)
    outcomes = [
        compress(LUT, [layer("l", weight(OUT, IN), LUTConfig(match=match))], statistics(x, x))["l"]
        for match in (0.0, 1.0)
    ]
    assert torch.equal(outcomes[0].module.dense(), outcomes[1].module.dense())


@pytest.mark.parametrize("order", ["none", "gar"])
def test_scales_that_follow_the_loop(order):
    x, matrix = inputs(600, 256), weight(8, 256)
    settings = {"bits": 3, "group_size": 64, "refit": 0, "order": order}
    found, static = (done(x, matrix, static_groups=s, **settings) for s in (False, True))
    same = (found.module.weight_scale == static.module.weight_scale).all(0)
    assert same.sum() == 2 and (same[:2].all() or order == "gar")  # those of the first 128 columns of the loop
    assert found.report["loss"] == pytest.approx(loss(found, x, matrix), rel=1e-3)
    assert found.report["loss"] < done(x, matrix, bits=3, group_size=64, **NEAREST).report["loss"]


def test_rows_are_taken_a_few_at_a_time(monkeypatch):
    x = inputs(200, IN)
    whole = {str(kind): done(x, dtype=torch.float32, **kind).module for kind in KINDS}
    monkeypatch.setattr("compress.methods.gptq.MAX_ROWS", 7)
    for kind in KINDS:
        pieces = done(x, dtype=torch.float32, **kind).module
        assert (pieces.codes() == whole[str(kind)].codes()).float().mean() > 0.995
        torch.testing.assert_close(pieces.weight_table, whole[str(kind)].weight_table, rtol=1e-2, atol=1e-3)


@every_kind
def test_inputs_that_were_never_there(kind):
    x = inputs(200, IN)
    x[:, :5] = 0
    outcome = done(x, **kind)
    assert outcome.report["n_dead"] == 5 and "5 of 64 inputs were 0" in outcome.notes[0]
    matrix = weight(OUT, IN)
    matrix[:, :5] = 0
    assert torch.equal(done(x, matrix, **kind).module.dense(), outcome.module.dense())
    every = done(torch.zeros(4, IN), **kind)
    assert torch.isfinite(every.module.dense()).all() and every.report["loss"] == 0


@every_kind
def test_layers_without_tokens_take_the_nearest_value_and_say_so(kind):
    empty = SiteStatistics(0, {SecondMoment(): torch.zeros(IN, IN)})
    task = layer("l", weight(OUT, IN), LUTConfig(**kind))
    outcome = compress(LUT, [task], empty)["l"]
    assert outcome.notes[0].startswith("NOT CALIBRATED") and 0 < outcome.report["weight_error"] < 0.02
    module = outcome.module
    assert torch.equal(module.codes(), Lookup(module.weight_table, module.weight_scale).encode(weight(OUT, IN)))


def test_normal_float_alone_needs_no_data():
    config = {"table": "normal_float", "scales": "absmax", **NEAREST}
    assert LUT.statistics(LUTConfig(**config)) == () and not LUT.needs_tokens(LUTConfig(**config))
    assert not done(None, **config).notes
    for more in ({"refit": 1}, {"error_feedback": True}, {"scales": "fitted"}, {"table": "kmeans", "scales": "fitted"}):
        assert LUT.needs_tokens(LUTConfig(**{**config, **more}))
    assert not LUT.needs_tokens(LUTConfig(sensitivity="none", **NEAREST))


def test_zeros_stay_zeros_and_few_values_are_exact():
    x = inputs(200, IN)
    assert not done(x, torch.zeros(4, IN)).module.dense().any()
    assert not done(x, torch.zeros(4, IN), table="normal_float").module.dense().any()
    few = torch.tensor([-0.5, 0.25, 0.75])[torch.randint(3, (8, IN), generator=torch.Generator().manual_seed(0))]
    outcome = done(x, few, bits=2)
    assert torch.equal(outcome.module.dense(torch.float32), few) and outcome.report["loss"] == 0


def test_numbers_that_cannot_be_are_named():
    x = inputs(200, IN)
    bad = weight(OUT, IN)
    bad[1, 2] = torch.nan
    with pytest.raises(NumericsError, match=r"^l: 1 of 1536 weights are NaN or infinite"):
        done(x, bad)
    for kind in KINDS:
        with pytest.raises(NumericsError, match=r"^l: lut: .*float16 cannot hold"):
            done(x, weight(OUT, IN) * 1e8, torch.float16, **kind)
    x[0, 0] = torch.inf
    with pytest.raises(NumericsError, match="l: lut: the second moment"):
        done(x)


def test_few_tokens_are_told():
    outcome = done(inputs(20, IN))
    assert "calibrated on 20 tokens for 64 inputs" in outcome.notes[-1]


@pytest.mark.parametrize("settings", [{"group_size": 64}, {"table": "normal_float"}])
def test_groups_that_do_not_divide_are_refused_with_those_that_do(settings):
    said = r"^l: group_size=64 does not divide in_features=96; use one of \[16, 24, 32, 48, 96\], or -1 for one scale per row$"
    with pytest.raises(RecipeError, match=said):
        LUT.plan(LayerShape("l", 8, 96), LUTConfig(**settings))


def test_tables_are_refused_and_rows_too_short_for_one_are_kept():
    with pytest.raises(RecipeError, match="for linears, not for tables"):
        LUT.plan(LayerShape("t", 100, 64, "embedding"), LUTConfig())
    kept = LUT.plan(LayerShape("l", 64, 16), LUTConfig())
    assert isinstance(kept, Kept) and kept.reason == "codes and tables would take 20.0 of 16 bits per weight"
    assert isinstance(LUT.plan(LayerShape("l", 64, 16), LUTConfig(bits=2)), LUTSpec)
    assert LUT.in_multiple(LUTConfig(group_size=16)) == 16 and LUT.in_multiple(LUTConfig()) == 1


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"bits": 5}, "bits"),
        ({"bits": 1}, "bits"),
        ({"group_size": 0}, "group_size=0 is no group"),
        ({"group_size": -2}, "group_size"),
        ({"scales": "absmax"}, "has no scales for scales: absmax; give a group_size"),
        ({"static_groups": False, "order": "none"}, "has no scales for static_groups: false"),
        ({"table": "normal_float", "static_groups": False}, "use order=gar, or static_groups=true"),
        ({"refit": -1}, "refit"),
        ({"table": "uniform"}, "table"),
        ({"sensitivity": "fisher"}, "sensitivity"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong, said):
    with pytest.raises(ValidationError, match=said):
        LUTConfig(**wrong)
