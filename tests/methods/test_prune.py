"""What prune plans, keeps and reports."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from compress.calibration.statistics import SecondMoment, SiteStatistics, SquareSum, gather
from compress.errors import NumericsError, RecipeError
from compress.linalg.sparsity import highest_of_groups, wanda_scores
from compress.methods.base import LayerShape
from compress.methods.gptq import GPTQ, GPTQConfig
from compress.methods.prune import NOT_CALIBRATED, Prune, PruneConfig
from compress.methods.rtn import RTN, RTNConfig
from tests.methods.layers import compress, inputs, layer, weight

SCORES = ["magnitude", "wanda", "nowag", "sparsegpt"]
KINDS = [{"pattern": "2:4"}, {"pattern": "3:8"}, {"sparsity": 0.5}]


def known(x: torch.Tensor) -> SiteStatistics:
    return SiteStatistics(len(x), {SecondMoment(): x.T @ x, SquareSum(): x.square().sum(0)})


def pruned(w: torch.Tensor, x: torch.Tensor | None, dtype: torch.dtype = torch.float32, **settings):
    config = PruneConfig(**settings)
    statistics = None if x is None or config.score == "magnitude" else known(x)
    return compress(Prune, [layer("a", w, config, scale_dtype=dtype)], statistics)["a"]


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("settings", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_module_is_as_planned_and_keeps_what_the_pattern_says(score, settings, dtype):
    w, x = weight(24, 48), inputs(300, 48)
    outcome = pruned(w, x, dtype, score=score, **settings)
    module, config = outcome.module, PruneConfig(score=score, **settings)
    assert module.spec == Prune.plan(LayerShape("a", 24, 48), config)
    dense, mask = module.dense(), module.mask()
    assert (dense[~mask] == 0).all() and mask.sum() == module.spec.kept == 24 * (18 if "3:8" in str(settings) else 24)
    if config.groups[1]:
        assert (mask.unflatten(1, (-1, config.groups[1])).sum(-1) == config.groups[0]).all()
    if score != "sparsegpt":
        torch.testing.assert_close(dense, w.to(dtype) * mask, rtol=0, atol=0)


def test_scores_are_the_papers():
    w, x = weight(16, 32), inputs(200, 32)
    mask = pruned(w, x, score="wanda").module.mask()
    assert torch.equal(mask, highest_of_groups(w.abs() * x.norm(dim=0), 2, 4))
    rows = pruned(w, x, score="wanda", sparsity=0.25).module.mask()
    assert (rows.sum(1) == 24).all()
    anywhere = pruned(w, x, score="wanda", sparsity=0.25, compare="layer").module.mask()
    threshold = wanda_scores(w, x.square().sum(0)).flatten().sort().values[16 * 8]
    assert torch.equal(anywhere, wanda_scores(w, x.square().sum(0)) >= threshold)
    by_size = pruned(w, None, score="magnitude", sparsity=0.25).module.mask()
    assert torch.equal(by_size, w.abs() >= w.abs().flatten().sort().values[16 * 8])
    assert not (by_size.sum(1) == 24).all()
    assert (pruned(w, None, score="magnitude", sparsity=0.25, compare="row").module.mask().sum(1) == 24).all()


def test_inputs_of_one_size_without_correlation_make_all_scores_but_nowag_magnitude():
    w = weight(16, 32)
    x = torch.linalg.qr(inputs(200, 32)).Q * 10  # H = 100 I
    expected = pruned(w, None, score="magnitude").module.dense()
    for score in ("wanda", "sparsegpt"):
        torch.testing.assert_close(pruned(w, x, score=score).module.dense(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "settings", [*KINDS, {"bits": 4, "group_size": 16}, {"sparsity": 0.4, "bits": 6, "group_size": -1}]
)
def test_sparsegpt_loses_least_and_reports_it(settings):
    w, x = weight(32, 64), inputs(500, 64)
    hessian = x.T @ x

    def lost(outcome) -> float:
        difference = (w - outcome.module.dense(torch.float32)).double()
        return float(torch.einsum("oi,ij,oj->", difference, hessian.double(), difference))

    best = pruned(w, x, torch.bfloat16, **settings)
    assert best.report["loss"] * 500 == pytest.approx(lost(best), rel=1e-2)
    whole = float(torch.einsum("oi,ij,oj->", w, hessian, w))
    assert best.report["relative_error"] == pytest.approx(lost(best) / whole, rel=1e-2)
    mask_only = {key: value for key, value in settings.items() if key not in ("bits", "group_size")}
    for score in ("magnitude", "wanda", "nowag"):
        assert lost(best) < lost(pruned(w, x, torch.bfloat16, score=score, **mask_only))


def test_the_better_order_is_taken():
    for seed in range(3):
        w, x = weight(32, 64, seed=seed), inputs(500, 64, seed=seed)
        loss = {order: pruned(w, x, order=order).report for order in ("none", "act", "best")}
        assert loss["best"]["loss"] == min(loss["none"]["loss"], loss["act"]["loss"])
        assert loss["best"]["act_order"] == float(loss["act"]["loss"] < loss["none"]["loss"])


def test_one_loop_for_both_loses_less_than_one_after_the_other():
    lost = {"joint": 0.0, "rtn": 0.0}
    for seed in range(3):
        w, x = weight(32, 64, seed=seed), inputs(500, 64, seed=seed)
        joint = pruned(w, x, torch.bfloat16, bits=3, group_size=16)
        lost["joint"] += joint.report["loss"]
        sparse = pruned(w, x, torch.bfloat16).module
        leaf = sparse.leaves()[""]
        after = compress(RTN, [layer("a", leaf.weight, RTNConfig(bits=3, group_size=16), mask=leaf.mask)], None)
        dense = sparse.with_leaf("", after["a"].module, None).dense(torch.float32)
        lost["rtn"] += float(((w - dense) @ x.T).square().sum()) / 500
        assert joint.module.spec == sparse.spec.with_leaf("", after["a"].module.spec)
    assert lost["joint"] < lost["rtn"]


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("settings", KINDS)
def test_a_later_step_keeps_the_mask_exactly(method, settings):
    w, x = weight(32, 64), inputs(500, 64)
    sparse = pruned(w, x, torch.bfloat16, **settings).module
    leaf = sparse.leaves()[""]
    cls, config = (GPTQ, GPTQConfig) if method == "gptq" else (RTN, RTNConfig)
    made = layer("a", leaf.weight, config(bits=3, group_size=16, clip="mse"), mask=leaf.mask)
    other = layer("b", w, config(bits=3, group_size=16, clip="mse"))
    outcomes = compress(cls, [made, other], known(x))
    dense = outcomes["a"].module.dense()
    assert (dense[~leaf.mask] == 0).all()
    kept = sparse.with_leaf("", outcomes["a"].module, None)
    torch.testing.assert_close(kept.dense(), dense, rtol=0, atol=0)
    alone = compress(cls, [other], known(x))["b"].module  # a pruned layer beside it changes nothing
    torch.testing.assert_close(outcomes["b"].module.dense(), alone.dense(), rtol=0, atol=0)


def test_feeding_errors_back_under_a_mask_beats_rounding_to_nearest():
    lost = {GPTQ: 0.0, RTN: 0.0}
    for seed in range(4):
        x = inputs(500, 64, seed=seed)
        leaf = pruned(weight(32, 64, seed=seed), x, torch.bfloat16).module.leaves()[""]
        for method, config in ((GPTQ, GPTQConfig(bits=3, group_size=16)), (RTN, RTNConfig(bits=3, group_size=16))):
            made = layer("a", leaf.weight, config, mask=leaf.mask)
            dense = compress(method, [made], known(x))["a"].module.dense(torch.float32)
            lost[method] += float(((leaf.weight - dense) @ x.T).square().sum())
    assert lost[GPTQ] < 0.95 * lost[RTN]


@pytest.mark.parametrize("score", ["wanda", "nowag", "sparsegpt"])
def test_weights_of_inputs_that_never_come_go_first(score):
    w, x = weight(8, 16), inputs(200, 16)
    x[:, [0, 5, 8, 9, 10, 11]] = 0  # one of a group, one of another, a whole group
    outcome = pruned(w, x, score=score)
    mask, dense = outcome.module.mask(), outcome.module.dense()
    assert not mask[:, [0, 5]].any() and (mask[:, 8:12].sum(1) == 2).all()
    assert outcome.report["n_dead"] == 6 and "6 of 16 inputs were 0 on every calibration token" in outcome.notes[0]
    expected = torch.zeros_like(w) if score == "sparsegpt" else w
    torch.testing.assert_close(dense[:, 8:12], (expected * mask)[:, 8:12], rtol=0, atol=0)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("settings", [*KINDS, {"bits": 4, "group_size": 8}])
def test_rows_of_zeros_and_inputs_of_zeros_do_no_harm(score, settings):
    if "bits" in settings and score != "sparsegpt":
        pytest.skip("bits are SparseGPT's")
    w, x = weight(8, 16), inputs(200, 16)
    w[2] = 0
    module = pruned(w, x, score=score, **settings).module
    assert torch.isfinite(module.dense()).all() and (module.dense()[2] == 0).all()
    nothing = pruned(w, torch.zeros(5, 16), score=score, **settings).module
    assert torch.isfinite(nothing.dense()).all()
    assert nothing.spec == module.spec


@pytest.mark.parametrize("score", ["wanda", "nowag", "sparsegpt"])
def test_without_tokens_it_is_magnitude_and_says_so(score):
    w = weight(8, 16)
    settings = {"bits": 4, "group_size": 8} if score == "sparsegpt" else {}
    config = PruneConfig(score=score, **settings)
    outcome = compress(Prune, [layer("a", w, config)], SiteStatistics(0, {}))["a"]
    assert outcome.notes == [NOT_CALIBRATED]
    assert outcome.module.spec == Prune.plan(LayerShape("a", 8, 16), config)
    assert torch.equal(outcome.module.mask(), highest_of_groups(w.abs(), 2, 4))


def test_only_what_is_needed_is_asked_for():
    assert Prune.statistics(PruneConfig(score="magnitude")) == ()
    assert (
        Prune.statistics(PruneConfig(score="wanda")) == Prune.statistics(PruneConfig(score="nowag")) == (SquareSum(),)
    )
    assert Prune.statistics(PruneConfig()) == (SecondMoment(),)
    assert Prune.in_multiple(PruneConfig(pattern="3:6", bits=4, group_size=16)) == 48


def test_sums_of_squares_are_the_diagonal():
    x = inputs(64, 12)
    gatherer = gather((SquareSum(), SecondMoment()), 12, 64, torch.Generator())
    for part in x.split(20):
        gatherer.add(part)
    found = gatherer.result("here")
    torch.testing.assert_close(found[SquareSum()], found[SecondMoment()].diagonal())


@pytest.mark.parametrize(
    ("shape", "settings", "said"),
    [
        ((8, 66), {"pattern": "2:4"}, '2:4 does not divide in_features=66; use "1:2"'),
        ((8, 65), {"pattern": "2:4"}, '2:4 does not divide in_features=65; use "6:13"'),
        ((8, 67), {"pattern": "2:4"}, "in_features=67; use sparsity in place of pattern"),
        ((8, 64), {"sparsity": 0.05}, "one bit per weight (6.25%); the nearest that works with in_features=64 is 0.07812"),
        ((8, 64), {"sparsity": 0.995}, "less than one weight per row; the nearest that works with in_features=64 is 0.9844"),
        ((8, 1), {"sparsity": 0.5}, "in_features=1 is too few to prune; skip it"),
        ((8, 64), {"bits": 4, "group_size": 24}, "group_size=24 does not divide in_features=64; use one of ["),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_what_can(shape, settings, said):
    with pytest.raises(RecipeError) as error:
        Prune.plan(LayerShape("blocks.3.k", *shape), PruneConfig(**settings))
    assert said in str(error.value) and str(error.value).startswith("blocks.3.k: ")


def test_the_values_that_are_suggested_work():
    for width in range(2, 200):
        if width % 4 == 0:
            continue
        try:
            Prune.plan(LayerShape("a", 8, width), PruneConfig())
        except RecipeError as error:
            if '"' in str(error):
                near = str(error).split('"')[1]
                Prune.plan(LayerShape("a", 8, width), PruneConfig(pattern=near)).validate()
    for sparsity in (0.01, 0.06, 0.99, 0.999):
        try:
            Prune.plan(LayerShape("a", 8, 40), PruneConfig(sparsity=sparsity))
        except RecipeError as error:
            nearest = float(str(error).rpartition(" ")[2])
            Prune.plan(LayerShape("a", 8, 40), PruneConfig(sparsity=nearest)).validate()


def test_tables_are_refused():
    with pytest.raises(RecipeError, match="wte: prune is for linears, not for tables"):
        Prune.plan(LayerShape("wte", 100, 64, "embedding"), PruneConfig())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"pattern": "4:4"}, "prunes nothing or everything"),
        ({"pattern": "0:4"}, "prunes nothing or everything"),
        ({"pattern": "two of four"}, "is not of the form"),
        ({"pattern": True}, "string"),
        ({"score": "wanda", "bits": 4}, "bits=4 needs score=sparsegpt"),
        ({"score": "wanda", "compare": "row"}, "compare=row needs sparsity and another score than sparsegpt; here: pattern=2:4"),
        ({"sparsity": 0.5, "compare": "row"}, "score=sparsegpt compares within block_size columns"),
        ({"group_size": 0}, "is no group"),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other_are_refused(settings, said):
    with pytest.raises(ValidationError, match=said.replace("(", r"\(")):
        PruneConfig(**settings)


def test_a_pattern_without_quotes_is_what_yaml_makes_of_it():
    import yaml

    read = yaml.safe_load("{a: 2:4, b: 1:16}\n")
    assert PruneConfig(pattern=read["a"]).groups == (2, 4)
    assert PruneConfig(pattern=read["b"]).groups == (1, 16)
    assert PruneConfig(pattern=yaml.safe_load("pattern: 2:4")["pattern"]).groups == (2, 4)


def test_a_layer_that_is_damaged_or_overflows_is_named():
    w = weight(8, 16)
    w[0, 0] = float("nan")
    with pytest.raises(NumericsError, match="a: 1 of 128 weights are NaN"):
        pruned(w, None, score="magnitude")
    with pytest.raises(NumericsError, match=r"a: prune: weights overflow torch\.float16"):
        pruned(weight(8, 16) * 1e7, None, torch.float16, score="magnitude")
