from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from compress.errors import NumericsError, RecipeError
from compress.linalg.grid import GridRule, fit_grid
from compress.methods.base import LayerShape
from compress.methods.rtn import RTN, RTNConfig, divisors
from tests.methods.layers import compress, layer, weight


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [-1, 16])
@pytest.mark.parametrize("clip", ["none", "mse"])
def test_what_is_stored_is_what_was_computed(bits, symmetric, group_size, clip):
    config = RTNConfig(bits=bits, group_size=group_size, symmetric=symmetric, clip=clip)
    task = layer("a", weight(24, 64), config, bias=torch.randn(24))
    outcome = compress(RTN, [task], None)["a"]
    grid = fit_grid(task.weight, group_size, GridRule(bits, symmetric, clip, torch.bfloat16))
    assert torch.equal(outcome.module.dense(torch.float32), grid.decode(grid.encode(task.weight)))
    assert outcome.module.spec == RTN.plan(task.shape, config)
    assert outcome.module.nbytes == outcome.module.spec.nbytes("BF16")
    assert torch.equal(outcome.module.stored()["bias"], task.bias)
    error = (outcome.module.dense(torch.float32) - task.weight).square().sum() / task.weight.square().sum()
    assert outcome.report["weight_error"] == pytest.approx(float(error), rel=1e-4)
    assert outcome.notes == []


def test_more_bits_smaller_groups_and_clipping_lose_less():
    w = weight(32, 128) ** 3

    def error(**fields) -> float:
        return compress(RTN, [layer("a", w, RTNConfig(**fields))], None)["a"].report["weight_error"]

    by_bits = [error(bits=bits, group_size=32) for bits in (2, 3, 4, 5, 6, 7, 8)]
    assert by_bits == sorted(by_bits, reverse=True)
    by_group = [error(bits=4, group_size=g) for g in (-1, 64, 32, 16)]
    assert by_group == sorted(by_group, reverse=True)
    assert error(bits=3, clip="mse") < error(bits=3)
    assert error(bits=3, symmetric=False) < error(bits=3)


def test_embedding_is_rounded_row_by_row():
    task = layer("embed", weight(40, 32), RTNConfig(bits=8, group_size=-1), kind="embedding")
    module = compress(RTN, [task], None)["embed"].module
    assert module.spec.kind == "embedding"
    ids = torch.tensor([3, 39, 3])
    torch.testing.assert_close(module(ids).float(), module.dense(torch.float32)[ids], rtol=1e-2, atol=1e-3)


def test_zeros_stay_zeros():
    outcome = compress(RTN, [layer("a", torch.zeros(4, 32), RTNConfig(group_size=16))], None)["a"]
    assert not outcome.module.dense(torch.float32).any()
    assert outcome.report["weight_error"] == 0


def test_groups_that_do_not_divide_are_refused_with_those_that_do():
    with pytest.raises(
        RecipeError, match=r"^model\.x: group_size=128 does not divide in_features=320; use one of"
    ) as error:
        RTN.plan(LayerShape("model.x", 8, 320), RTNConfig())
    assert str(error.value).endswith("use one of [64, 80, 160, 320], or -1 for one group per row") or "160" in str(
        error.value
    )
    for size in divisors(320, near=128):
        RTN.plan(LayerShape("model.x", 8, 320), RTNConfig(group_size=size))


@pytest.mark.parametrize("n", [1, 7, 64, 97, 2880, 4096])
@pytest.mark.parametrize("near", [1, 128, 10**6])
def test_divisors_divide(n, near):
    found = divisors(n, near)
    assert found
    assert found == sorted(found)
    assert all(n % d == 0 for d in found)


@pytest.mark.parametrize(
    "fields", [{"bits": 1}, {"bits": 9}, {"group_size": 0}, {"group_size": -2}, {"clip": "max"}, {"bit": 4}]
)
def test_settings_out_of_range_are_refused(fields):
    with pytest.raises(ValidationError):
        RTNConfig(**fields)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_weights_are_named(bad):
    w = weight(4, 32)
    w[1, 2] = bad
    with pytest.raises(NumericsError, match=r"^model\.a: 1 of 128 weights are NaN or infinite"):
        compress(RTN, [layer("model.a", w, RTNConfig(group_size=16))], None)


def test_scale_that_does_not_fit_names_the_layer():
    task = layer("model.a", torch.full((2, 16), 1e6), RTNConfig(bits=2, group_size=16), scale_dtype=torch.float16)
    with pytest.raises(NumericsError, match=r"^model\.a: .*float16"):
        compress(RTN, [task], None)
