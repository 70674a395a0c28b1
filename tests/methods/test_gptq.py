from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from compress.calibration.statistics import CrossMoment, SecondMoment, SiteStatistics
from compress.errors import NumericsError
from compress.linalg.cholesky import inverse_factor
from compress.linalg.grid import Grid
from compress.methods import gptq as gptq_module
from compress.methods.base import SiteTask
from compress.methods.gptq import GPTQ, GPTQConfig, asymmetric_feedback
from compress.methods.rtn import RTN, RTNConfig
from tests.methods.layers import compress, inputs, layer, statistics, weight


def output_error(outcome, w: torch.Tensor, x: torch.Tensor) -> float:
    return float(((outcome.module.dense(torch.float32) - w) @ x.T).square().sum() / x.shape[0])


def same_as_rounding(outcome, task) -> bool:
    fields = {name: getattr(task.config, name) for name in RTNConfig.model_fields}
    plain = layer(task.name, task.weight, RTNConfig(**fields), kind=task.kind)
    return torch.equal(outcome.module.dense(), compress(RTN, [plain], None)[task.name].module.dense())


@pytest.mark.parametrize("order", ["none", "act", "gar"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_report_is_the_error_of_what_is_stored(bits, symmetric, order):
    x, w = inputs(200, 64), weight(24, 64)
    config = GPTQConfig(bits=bits, group_size=16, symmetric=symmetric, order=order)
    task = layer("a", w, config, bias=torch.randn(24))
    outcome = compress(GPTQ, [task], statistics(x))["a"]
    assert outcome.report["loss"] == pytest.approx(output_error(outcome, w, x), rel=2e-3)
    relative = output_error(outcome, w, x) / float((w @ x.T).square().sum() / 200)
    assert outcome.report["relative_error"] == pytest.approx(relative, rel=2e-3)
    assert outcome.report["damping"] == 0.01
    assert outcome.report["n_tokens"] == 200
    assert outcome.report["n_dead"] == 0
    assert outcome.notes == []
    assert outcome.module.spec == GPTQ.plan(task.shape, config)
    assert set(outcome.module.stored()) == {*outcome.module.spec.tensors("BF16"), "bias"}  # no index of groups


def test_act_order_beats_group_aware_beats_none_beats_rounding():
    losses = {}
    for order in ("act", "gar", "none"):
        losses[order] = 0.0
        for seed in range(5):
            x, w = inputs(400, 128, seed), weight(48, 128, seed)
            outcome = compress(GPTQ, [layer("a", w, GPTQConfig(bits=3, group_size=32, order=order))], statistics(x))[
                "a"
            ]
            losses[order] += outcome.report["loss"]
    plain = 0.0
    for seed in range(5):
        x, w = inputs(400, 128, seed), weight(48, 128, seed)
        plain += output_error(compress(RTN, [layer("a", w, RTNConfig(bits=3, group_size=32))], None)["a"], w, x)
    assert losses["act"] < losses["gar"] < losses["none"] < 0.8 * plain


def test_layers_of_a_site_are_as_if_alone():
    x = inputs(300, 64)
    fine, coarse = GPTQConfig(bits=8, group_size=16), GPTQConfig(bits=3, group_size=32, symmetric=False, order="gar")
    tasks = [
        layer("q", weight(24, 64, 1), coarse),
        layer("k", weight(8, 64, 2), fine),
        layer("v", weight(8, 64, 3), coarse, scale_dtype=torch.float32),
        layer("g", weight(40, 64, 4), coarse),
    ]
    together = compress(GPTQ, tasks, statistics(x))
    assert list(together) == ["q", "k", "v", "g"]
    for task in tasks:
        alone = compress(GPTQ, [task], statistics(x))[task.name]
        mine = together[task.name]
        assert mine.module.spec == alone.module.spec == GPTQ.plan(task.shape, task.config)
        assert mine.module.stored()["weight_scale"].dtype == task.scale_dtype
        different = (mine.module.codes() != alone.module.codes()).float().mean()
        assert different < 0.03  # a product of other shape rounds differently; ties fall either way
        assert mine.report["loss"] == pytest.approx(alone.report["loss"], rel=0.02)


def test_one_factor_per_damping_and_order(monkeypatch):
    calls = []
    monkeypatch.setattr(gptq_module, "inverse_factor", lambda *args: calls.append(args[1]) or inverse_factor(*args))
    base = {"group_size": 16}
    configs = [
        GPTQConfig(**base), GPTQConfig(**base, bits=8), GPTQConfig(**base, symmetric=False),
        GPTQConfig(**base, damping=0.05), GPTQConfig(**base, order="gar"), GPTQConfig(group_size=32, order="gar"),
    ]  # fmt: skip
    compress(GPTQ, [layer(str(i), weight(8, 64, i), c) for i, c in enumerate(configs)], statistics(inputs(100, 64)))
    assert calls == [0.01, 0.05, 0.01, 0.01]


@pytest.mark.parametrize("max_rows", [1, 7, 24])
def test_rows_at_a_time_change_nothing(max_rows, monkeypatch):
    tasks = [
        layer("a", weight(10, 64, 1), GPTQConfig(group_size=16)),
        layer("b", weight(14, 64, 2), GPTQConfig(group_size=16)),
    ]
    expected = compress(GPTQ, tasks, statistics(inputs(300, 64)))
    monkeypatch.setattr(gptq_module, "MAX_ROWS", max_rows)
    for name, outcome in compress(GPTQ, tasks, statistics(inputs(300, 64))).items():
        assert (outcome.module.codes() != expected[name].module.codes()).float().mean() < 0.03
        assert torch.equal(outcome.module.stored()["weight_scale"], expected[name].module.stored()["weight_scale"])
        assert outcome.report["loss"] == pytest.approx(expected[name].report["loss"], rel=0.02)


def test_same_input_same_bits():
    tasks = [layer("a", weight(64, 128), GPTQConfig(bits=3, group_size=32))]
    first, second = (compress(GPTQ, tasks, statistics(inputs(300, 128)))["a"].module for _ in range(2))
    assert all(torch.equal(first.stored()[name], tensor) for name, tensor in second.stored().items())


def test_nothing_given_is_changed():
    x, w = inputs(100, 32), weight(8, 32)
    x[:, 3] = 0
    stats = statistics(x, inputs(100, 32, seed=5))
    before = {request: value.clone() for request, value in stats.values.items()}, w.clone()
    compress(GPTQ, [layer("a", w, GPTQConfig(group_size=16, gptaq=0.5))], stats)
    assert torch.equal(w, before[1])
    assert all(torch.equal(stats[request], value) for request, value in before[0].items())


@pytest.mark.parametrize("order", ["none", "act", "gar"])
@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_dead_inputs_become_zero_and_cost_nothing(symmetric, static, order):
    x, w = inputs(300, 64), weight(16, 64)
    dead = [0, 17, 18, 63]
    x[:, dead] = 0
    w[:, dead] *= 100  # must not widen any grid
    config = GPTQConfig(bits=4, group_size=16, symmetric=symmetric, order=order, static_groups=static or order == "act")
    outcome = compress(GPTQ, [layer("a", w, config)], statistics(x))["a"]
    dense = outcome.module.dense(torch.float32)
    assert not dense[:, dead].any()
    assert outcome.report["n_dead"] == 4
    assert outcome.report["loss"] == pytest.approx(output_error(outcome, w, x), rel=2e-3)
    assert outcome.report["relative_error"] < 0.02
    assert "4 of 64 inputs were 0" in outcome.notes[0]


def test_all_inputs_dead():
    outcome = compress(GPTQ, [layer("a", weight(4, 16), GPTQConfig(group_size=8))], statistics(torch.zeros(9, 16)))["a"]
    assert not outcome.module.dense().any()
    assert outcome.report["loss"] == outcome.report["relative_error"] == 0


@pytest.mark.parametrize("stats", [None, SiteStatistics(0, {SecondMoment(): torch.zeros(64, 64)})])
def test_without_tokens_it_rounds_and_says_so(stats):
    task = layer("expert", weight(8, 64), GPTQConfig(bits=3, group_size=16))
    outcome = compress(GPTQ, [task], stats)["expert"]
    assert same_as_rounding(outcome, task)
    assert outcome.notes == ["NOT CALIBRATED: no calibration token reached this layer; it was rounded to nearest"]


def test_embedding_is_rounded_without_a_word():
    task = layer("embed", weight(40, 64), GPTQConfig(group_size=16), kind="embedding")
    outcome = compress(GPTQ, [task], None)["embed"]
    assert same_as_rounding(outcome, task)
    assert outcome.module.spec.kind == "embedding"
    assert outcome.notes == []


def test_fewer_tokens_than_inputs_are_enough_and_noted():
    x, w = inputs(5, 64), weight(16, 64)
    outcome = compress(GPTQ, [layer("a", w, GPTQConfig(group_size=16))], statistics(x))["a"]
    assert outcome.report["damping"] == 0.01
    assert outcome.report["loss"] == pytest.approx(output_error(outcome, w, x), rel=0.05)
    assert "5 tokens for 64 inputs" in outcome.notes[0]


def indefinite(off_diagonal: float) -> SiteStatistics:
    hessian = torch.eye(32)
    hessian[0, 1] = hessian[1, 0] = off_diagonal
    return SiteStatistics(100, {SecondMoment(): hessian})


def test_more_damping_than_asked_is_reported():
    outcome = compress(GPTQ, [layer("a", weight(8, 32), GPTQConfig(group_size=16))], indefinite(1.095))["a"]
    assert outcome.report["damping"] == pytest.approx(0.1)
    assert "damping raised from 0.01 to 0.1" in outcome.notes[0]


def test_when_nothing_helps_the_layers_are_rounded_loudly():
    tasks = [
        layer("a", weight(8, 32), GPTQConfig(group_size=16)),
        layer("b", weight(4, 32), GPTQConfig(bits=8, group_size=16)),
    ]
    outcomes = compress(GPTQ, tasks, indefinite(1e6))
    for task in tasks:
        assert same_as_rounding(outcomes[task.name], task)
        assert "NOT CALIBRATED" in outcomes[task.name].notes[0]
        assert "could not be factored" in outcomes[task.name].notes[0]


def test_bad_weights_are_named():
    w = weight(4, 32)
    w[0, 0] = float("nan")
    with pytest.raises(NumericsError, match=r"^model\.a: 1 of 128 weights"):
        compress(GPTQ, [layer("model.a", w, GPTQConfig(group_size=16))], statistics(inputs(50, 32)))


def test_bad_statistics_are_named():
    stats = statistics(inputs(50, 32))
    stats[SecondMoment()][3, 3] = float("nan")
    with pytest.raises(NumericsError, match=r"model\.a.*NaN or inf"):
        compress(GPTQ, [layer("model.a", weight(4, 32), GPTQConfig(group_size=16))], stats)


def test_second_moment_in_float64_is_welcome():
    x = inputs(200, 64)
    stats = SiteStatistics(200, {SecondMoment(): x.double().T @ x.double()})
    outcome = compress(GPTQ, [layer("a", weight(8, 64), GPTQConfig(group_size=16))], stats)["a"]
    assert outcome.report["loss"] == pytest.approx(output_error(outcome, weight(8, 64), x), rel=2e-3)


def test_requests_follow_the_settings():
    assert GPTQ.statistics(GPTQConfig()) == (SecondMoment(),)
    assert GPTQ.statistics(GPTQConfig(gptaq=0.25)) == (SecondMoment(), CrossMoment())


@pytest.mark.parametrize("order", ["none", "act", "gar"])
def test_gptaq_with_the_same_inputs_is_gptq(order):
    x, w = inputs(300, 64), weight(16, 64)
    plain = compress(GPTQ, [layer("a", w, GPTQConfig(group_size=16, order=order))], statistics(x))["a"]
    both = compress(GPTQ, [layer("a", w, GPTQConfig(group_size=16, order=order, gptaq=1.0))], statistics(x, x))["a"]
    assert torch.equal(both.module.codes(), plain.module.codes())
    assert both.report["loss"] == pytest.approx(plain.report["loss"], rel=2e-3)


@pytest.mark.parametrize("order", ["none", "act", "gar"])
def test_gptaq_comes_closer_to_the_original_output(order):
    original, w = inputs(600, 64), weight(32, 64)
    x = original + 0.3 * inputs(600, 64, seed=9)
    errors = {}
    for alpha in (0.0, 0.25, 1.0):
        config = GPTQConfig(bits=4, group_size=16, order=order, gptaq=alpha)
        dense = compress(GPTQ, [layer("a", w, config)], statistics(x, original))["a"].module.dense(torch.float32)
        errors[alpha] = float((original @ w.T - x @ dense.T).square().sum())
    assert errors[1.0] < errors[0.25] < errors[0.0]


def test_gptaq_feedback_is_least_squares_on_the_later_columns():
    original = inputs(600, 12).double()
    x = original + 0.3 * inputs(600, 12, seed=9).double()
    feedback = asymmetric_feedback((original - x).T @ x, inverse_factor(x.T @ x, 1e-7).upper.double())
    assert torch.equal(feedback, feedback.triu(1))
    for i in range(11):
        best = torch.linalg.lstsq(x[:, i + 1 :], (original - x)[:, i : i + 1]).solution[:, 0]
        torch.testing.assert_close(feedback[i, i + 1 :], best, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "fields",
    [
        {"damping": 0.0},
        {"damping": 1.0},
        {"order": "desc"},
        {"block_size": 0},
        {"gptaq": 1.5},
        {"order": "act", "static_groups": False},
    ],
)
def test_settings_out_of_range_are_refused(fields):
    with pytest.raises(ValidationError):
        GPTQConfig(**fields)


def test_workspace_and_flops_grow_with_the_site():
    from compress.methods.base import LayerShape

    small, large = (LayerShape("a", 64, 128),), (LayerShape("a", 64, 128), LayerShape("b", 64, 128))
    for config in (GPTQConfig(), GPTQConfig(gptaq=0.25)):
        assert 0 < GPTQ.workspace(small, config) < GPTQ.workspace(large, config)
        assert 0 < GPTQ.flops(small, config) < GPTQ.flops(large, config)


@pytest.mark.parametrize("order", ["none", "act", "gar"])
def test_the_weight_before_rounding_rounds_to_the_codes(order: str) -> None:
    x, w = inputs(400, 64), weight(24, 64)
    config = GPTQConfig(bits=3, group_size=16, order=order, signed_scales=True, clip="mse")
    task = SiteTask("site", (layer("a", w, config),), continuous=True)
    outcome = GPTQ.compress(task, statistics(x), torch.Generator())["a"]
    module, before = outcome.module, outcome.continuous
    assert before is not None and not torch.equal(before, w)
    grid = Grid(3, module.weight_scale.detach(), None)
    assert (grid.encode(before) != module.codes()).float().mean() < 1e-3  # but for ties
