from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.calibration.statistics import SiteStatistics, SquareSum
from compress.errors import NumericsError, RecipeError
from compress.methods.armor import Armor, ArmorConfig
from compress.methods.base import Kept, LayerShape, Outcome, SiteTask
from compress.methods.prune import Prune, PruneConfig
from tests.methods.layers import compress, inputs, layer, weight

OUT, IN = 48, 96
CONFIG = {"block_size": 8, "n_iters": 20, "step": "sequential"}


def statistics(x: Tensor) -> SiteStatistics:
    return SiteStatistics(len(x), {SquareSum(): x.square().sum(0)})


def armored(matrix: Tensor, x: Tensor | None = None, dtype: torch.dtype = torch.float32, **settings) -> Outcome:
    config = ArmorConfig(**{**CONFIG, **settings})
    return compress(Armor, [layer("l", matrix, config, scale_dtype=dtype)], None if x is None else statistics(x))["l"]


def nowag(matrix: Tensor, x: Tensor, dtype: torch.dtype = torch.float32) -> Outcome:
    return compress(Prune, [layer("l", matrix, PruneConfig(score="nowag"), scale_dtype=dtype)], statistics(x))["l"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_iterations_are_nowag_bit_for_bit(dtype):
    matrix, x = weight(OUT, IN), inputs(200, IN)
    found, expected = armored(matrix, x, dtype, n_iters=0).module, nowag(matrix, x, dtype).module
    for name, tensor in expected.stored().items():
        assert torch.equal(found.core.stored()[name], tensor), name
    assert torch.equal(found.dense(), expected.dense())
    assert torch.equal(found(x.to(dtype)), expected(x.to(dtype)))


@pytest.mark.parametrize("settings", [{}, {"step": "adam", "learning_rate": 1e-3}, {"out_block_size": 3}])
def test_loses_less_than_nowag(settings):
    matrix, x = weight(OUT, IN), inputs(200, IN)
    outcome = armored(matrix, x, **settings)
    assert outcome.report["proxy_loss"] < outcome.report["proxy_loss_start"]
    assert outcome.report["diagonal_error"] < nowag(matrix, x).report["diagonal_error"]
    assert outcome.report["iterations"] == 20 and not outcome.notes
    assert (outcome.module.core.mask().unflatten(1, (-1, 4)).sum(-1) == 2).all()


def test_the_reported_loss_is_that_of_what_is_stored():
    matrix, x = weight(OUT, IN), inputs(200, IN)
    outcome, squares = armored(matrix, x), x.square().sum(0)
    columns = matrix.norm(dim=0) + 1e-5
    rows = (matrix / columns).norm(dim=1, keepdim=True) + 1e-5
    normalised = matrix / columns / rows
    difference = normalised - outcome.module.dense() / columns / rows
    found = float((difference.square() @ squares).sum() / (normalised.square() @ squares).sum())
    assert outcome.report["proxy_loss"] == pytest.approx(found, rel=1e-4)


def test_rows_and_columns_of_zeros_stay_zero():
    matrix, x = weight(OUT, IN), inputs(200, IN)
    matrix[5], matrix[:, 7] = 0, 0
    dense = armored(matrix, x).module.dense()
    assert not dense[5].any() and not dense[:, 7].any() and torch.isfinite(dense).all()
    nothing = armored(torch.zeros(OUT, IN), x)
    assert not nothing.module.dense().any() and nothing.report["proxy_loss"] == 0 and not nothing.notes


def test_inputs_that_were_never_there_count_as_the_mean_input():
    matrix, x = weight(OUT, IN), inputs(200, IN)
    x[:, :6] = 0
    outcome = armored(matrix, x)
    assert outcome.report["n_dead"] == 6 and "6 of 96 inputs were 0" in outcome.notes[0]
    counted = x.square().sum(0)
    counted[:6] = counted[6:].mean()
    same = compress(Armor, [layer("l", matrix, ArmorConfig(**CONFIG), scale_dtype=torch.float32)],
                    SiteStatistics(200, {SquareSum(): counted}))["l"]  # fmt: skip
    assert torch.equal(outcome.module.dense(), same.module.dense())
    every = armored(matrix, torch.zeros(4, IN))
    assert torch.equal(every.module.dense(), armored(matrix).module.dense())


def test_without_tokens_all_inputs_count_alike_and_it_says_so():
    matrix = weight(OUT, IN)
    outcome = compress(Armor, [layer("l", matrix, ArmorConfig(**CONFIG), scale_dtype=torch.float32)],
                       SiteStatistics(0, {SquareSum(): torch.zeros(IN)}))["l"]  # fmt: skip
    assert outcome.notes[0].startswith("NOT CALIBRATED")
    assert torch.equal(outcome.module.dense(), armored(matrix, torch.ones(3, IN)).module.dense())


def test_steps_that_diverge_leave_nowag_and_it_says_so():
    matrix, x = weight(OUT, IN), inputs(200, IN)
    outcome = armored(matrix, x, step="adam", learning_rate=1.0, n_iters=3)
    assert "no iteration lowered the loss" in outcome.notes[0]
    assert torch.equal(outcome.module.dense(), nowag(matrix, x).module.dense())


def test_values_that_cannot_be_stored_are_named():
    with pytest.raises(NumericsError, match="l: armor: wrappers or core overflow torch.float16"):
        armored(weight(OUT, IN) * 1e8, inputs(200, IN), torch.float16, n_iters=0)
    x = inputs(20, IN)
    x[3, 3] = torch.inf
    with pytest.raises(NumericsError, match="l: armor"):
        armored(weight(OUT, IN), x)
    with pytest.raises(NumericsError, match="l"):
        armored(weight(OUT, IN) * torch.nan, inputs(20, IN))


def test_tells_of_iterations_and_loss():
    told: list[str] = []
    task = layer("block.q", weight(OUT, IN), ArmorConfig(**{**CONFIG, "n_iters": 100}))
    Armor.compress(SiteTask("site", (task,), told.append), statistics(inputs(200, IN)), torch.Generator())
    assert len(told) == 2 and told[1].startswith("block.q: iteration 100 of 100, loss 0.")


@pytest.mark.parametrize(
    ("shape", "settings", "said"),
    [
        ((64, 66), {}, r"in_features=66 is not a multiple of 4; skip it"),
        ((64, 96), {"block_size": 20}, r"block_size=20 does not divide in_features=96; use one of \[8, 16, 32\]"),
        ((64, 96), {"block_size": 48}, r"does not divide out_features=64; use one of \[8, 16, 32\], or out_block_size"),
        (
            (45, 96),
            {"block_size": 8},
            r"block_size=8 does not divide out_features=45; use out_block_size one of \[5, 9, 15\]",
        ),
        ((45, 96), {"block_size": 20}, r"use one of \[16, 24, 32\] and out_block_size to a divisor of out_features"),
        (
            (64, 96),
            {"block_size": 8, "out_block_size": 7},
            r"out_block_size=7 does not divide out_features=64; use out",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused_with_what_does(shape, settings, said):
    with pytest.raises(RecipeError, match=said):
        Armor.plan(LayerShape("block.q", *shape), ArmorConfig(**settings))


def test_tables_are_refused_and_layers_that_would_grow_are_kept():
    with pytest.raises(RecipeError, match="for linears, not for tables"):
        Armor.plan(LayerShape("table", 64, 64, "embedding"), ArmorConfig(block_size=8))
    kept = Armor.plan(LayerShape("block.q", 256, 256), ArmorConfig(block_size=128))
    assert isinstance(kept, Kept)
    assert kept.reason == "core and wrappers would take 25.0 of 16 bits per weight; block_size=32 saves some"
    assert not isinstance(Armor.plan(LayerShape("block.q", 256, 256), ArmorConfig(block_size=32)), Kept)


@pytest.mark.parametrize(
    "wrong", [{"block_size": 6}, {"block_size": 0}, {"n_iters": -1}, {"step": "newton"}, {"patience": 0}]
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ArmorConfig(**wrong)
