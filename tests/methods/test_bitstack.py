from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.calibration.statistics import SiteStatistics, SquareSum
from compress.errors import NumericsError, RecipeError
from compress.methods.base import Kept, LayerShape, Outcome, StackView
from compress.methods.bitstack import FLOOR, BitStack, BitStackConfig, input_scale, power_of_two
from compress.methods.bitstack_order import LEAST, by_levels, by_proxy, credible, greedy, sorted_levels
from compress.models.families import architecture_of, module_name
from compress.modules.bitstack_spec import BitStackSpec
from compress.pipeline.folding import scale_module, takes_scale
from tests.methods.layers import compress, inputs, layer, weight
from tests.tiny_models import TINY, tiny_config, tiny_model

OUT, IN = 40, 52  # no multiple of 8


def stacked(matrix: Tensor, x: Tensor | None, folds: bool = False, **fields) -> Outcome:
    config = BitStackConfig(**{"rank": 4, "blocks": 5, **fields})
    known = None if x is None else SiteStatistics(len(x), {SquareSum(): x.square().sum(0)})
    return compress(BitStack, [layer("l", matrix, config, folds=folds)], known)["l"]


def prefix(module, n: int) -> Tensor:
    while module.n_blocks > n:
        module.drop_block()
    return module.dense(torch.float32)


@pytest.mark.parametrize("folds", [False, True])
def test_each_block_lowers_the_error_of_the_outputs_as_reported(folds: bool) -> None:
    matrix, x = weight(OUT, IN), inputs(300, IN)
    outcome = stacked(matrix, x, folds)
    squares, undone = x.square().sum(0), 1 / outcome.fold if folds else torch.ones(IN)
    whole = float((matrix.square() @ squares).sum())
    errors = []
    for n in range(5, 0, -1):
        difference = matrix - prefix(outcome.module, n) / undone
        errors.insert(0, float((difference.square() @ squares).sum()) / whole)
        scale = undone if folds else 1 / outcome.module.scale.float()
        own = float(((difference * scale) ** 2).sum() / ((matrix * scale) ** 2).sum())
        assert outcome.report[f"residual_{n}"] == pytest.approx(own, rel=1e-3)
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.02 and errors[0] < 0.4
    assert outcome.module.spec == BitStackSpec(IN, OUT, 4, 1, scaled=not folds)


def test_loud_inputs_are_fitted_better_than_without_their_scale() -> None:
    matrix, x = weight(OUT, IN), inputs(300, IN)
    x[:, ::7] *= 20
    squares = x.square().sum(0)

    def error(outcome: Outcome) -> float:
        return float(((matrix - prefix(outcome.module, 2)).square() @ squares).sum())

    assert error(stacked(matrix, x)) < 0.5 * error(stacked(matrix, x, scaling=False))
    plain = stacked(matrix, None, scaling=False)
    assert plain.module.scale is None and not plain.notes
    (note,) = stacked(matrix, None).notes
    assert "NOT CALIBRATED" in note


def test_the_scale_has_mean_one_and_a_floor() -> None:
    squares = torch.rand(50, generator=torch.Generator().manual_seed(0)) + 0.1
    squares[3], squares[4] = 0, 1e6
    scale = input_scale(squares)
    assert float(scale.double().log().mean()) == pytest.approx(0, abs=1e-5)
    norms = squares.sqrt()
    assert float(scale[3] / scale[0]) == pytest.approx(FLOOR * float(norms[norms > 0].median() / norms[0]), rel=1e-4)
    assert torch.equal(input_scale(torch.zeros(5)), torch.ones(5))
    assert torch.allclose(input_scale(squares * 1e8), scale)
    powers = power_of_two(scale).log2()
    assert torch.equal(powers, powers.round()) and float((powers - scale.log2()).abs().max()) <= 0.5


def folded(family: str) -> tuple[Tensor, Tensor, set[str]]:
    """Logits of a tiny model before and after random powers of two went into all that takes a scale, and their sites' kinds."""
    model, config = tiny_model(family), tiny_config(family).to_dict()
    from compress.models.experts import unfuse_experts

    architecture = architecture_of(config)
    ids, generator = torch.arange(3, 30)[None], torch.Generator().manual_seed(0)
    unfuse_experts(model, architecture)
    infos = {f"{module_name(architecture, site.producer.name)}.weight" for sites in architecture.block_sites
             for site in sites if site.producer}  # fmt: skip
    infos = {name for name in infos if name.removesuffix(".weight") in dict(model.named_modules())}
    disk = {f"{site.producer.name}.weight": None for sites in architecture.block_sites for site in sites
            if site.producer and f"{module_name(architecture, site.producer.name)}.weight" in infos}  # fmt: skip
    kinds = set()
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        for site in (site for sites in architecture.block_sites for site in sites):
            if not takes_scale(site, architecture, disk):
                continue
            linears = [model.get_submodule(module_name(architecture, name)) for name in site.linears]
            width = linears[0].weight.shape[0 if architecture.transposed else 1]
            scale = torch.exp2(torch.randint(-3, 4, (width,), generator=generator).float())
            maker = model.get_submodule(module_name(architecture, site.producer.name))
            scale_module(maker, scale, architecture.transposed)
            for linear in linears:
                linear.weight /= scale[:, None] if architecture.transposed else scale
            kinds.add(site.kind)
        return before, model(ids, use_cache=False).logits, kinds


@pytest.mark.parametrize("family", [name for name in TINY if name != "opt_post_norm"])
def test_folding_leaves_the_model_the_same_bit_for_bit(family: str) -> None:
    before, after, kinds = folded(family)
    assert torch.equal(before, after)
    expected = {"attn_in", "attn_out", "mlp_in", "mlp_out"}
    if family in ("llama", "gemma"):
        assert kinds == expected - ({"attn_in", "mlp_in", "attn_out"} if family == "gemma" else set())
    if family == "llama_gqa_tied":
        assert kinds == expected - {"attn_out"}  # several query heads read one value: its scale stays explicit


@pytest.mark.parametrize(
    ("fields", "says"),
    [({"rank": 41}, "rank=41 is more than a matrix of 40 x 52 has; use at most 40"), ({"rank": 53}, "use at most 40")],
)
def test_refusals_name_what_works(fields: dict, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        BitStack.plan(LayerShape("l", OUT, IN), BitStackConfig(**fields))
    with pytest.raises(RecipeError, match="for linears, not for tables"):
        BitStack.plan(LayerShape("t", 100, 64, "embedding"), BitStackConfig())


def test_the_default_number_of_blocks_never_outweighs_the_original() -> None:
    large = BitStack.plan(LayerShape("l", 4096, 4096), BitStackConfig())
    assert large.blocks == 14 and large.nbytes("F16") < 2 * 4096 * 4096  # 1.125 bits each
    assert BitStack.plan(LayerShape("l", 4096, 4096), BitStackConfig(blocks=16)).blocks == 16
    kept = BitStack.plan(LayerShape("l", 16, 16), BitStackConfig(rank=16))
    assert isinstance(kept, Kept) and "smaller rank" in kept.reason
    for shape in (LayerShape("l", 256, 640), LayerShape("l", 64, 64)):
        spec = BitStack.plan(shape, BitStackConfig(rank=4))
        assert spec.nbytes("F16") <= 2 * shape.out_features * shape.in_features


def test_values_that_are_no_numbers_name_the_layer() -> None:
    matrix = weight(OUT, IN)
    matrix[0, 0] = torch.nan
    with pytest.raises(NumericsError, match="l: 1 of"):
        stacked(matrix, inputs(10, IN))


# ---- the order


FALLS = st.lists(st.integers(1, 1000), min_size=2, max_size=5)


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.text("abc", min_size=1, max_size=3), st.tuples(FALLS, st.sampled_from([1, 2, 4, 8])), min_size=1, max_size=6
    )
)
def test_greedy_takes_every_block_once_in_rising_levels_and_falling_worth(made) -> None:
    left = {}
    for name, (falls, _) in made.items():
        falls = sorted(falls, reverse=True)  # falls get smaller: then greedy is sorted
        left[name] = [sum(falls[i:]) for i in range(len(falls) + 1)]
    sizes = {name: [made[name][1]] * (len(left[name]) - 1) for name in made}
    order = greedy(left, sizes)
    assert sorted(order) == sorted((n, i) for n in sizes for i in range(1, len(sizes[n])))
    worth = [(left[n][i] - left[n][i + 1]) / sizes[n][i] for n, i in order]
    assert worth == sorted(worth, reverse=True)
    for name in sizes:
        assert [i for n, i in order if n == name] == list(range(1, len(sizes[name])))


def test_levels_are_sorted_one_by_one_and_what_is_no_number_comes_last() -> None:
    nan, inf = math.nan, math.inf
    scores = [{"a": 3.0, "b": 2.0, "c": nan}, {"a": 1.0, "b": inf, "c": 5.0}, {"b": 1.0, "c": 0.5}]
    order = sorted_levels(scores)
    assert order == [("b", 1), ("a", 1), ("c", 1), ("a", 2), ("c", 2), ("b", 2), ("c", 3), ("b", 3)]
    assert sorted_levels([{"a": nan, "b": inf}, {"a": 2.0, "b": 1.0}])[:2] == [("b", 1), ("a", 1)]


def test_rises_of_the_loss_are_made_credible() -> None:
    found = credible({"a": 0.4, "b": -0.1, "c": 0.0, "d": math.nan, "e": 0.2})
    assert found == {"a": 0.4, "b": pytest.approx(LEAST * 0.3), "c": pytest.approx(LEAST * 0.3), "d": 0.4, "e": 0.2}
    assert credible({"a": -1.0}) == {"a": LEAST}


class View(StackView):
    """A model whose loss is a weighted sum of what its layers leave."""

    def __init__(self, worth: dict[str, float], left: dict[str, list[float]]):
        self.worth, self.left, self.asked = worth, left, 0
        self.levels = {name: [10] * len(shares) for name, shares in left.items()}
        self.figures = {n: {f"residual_{i}": v for i, v in enumerate(shares, 1)} for n, shares in left.items()}

    def loss(self, others: int) -> float:
        self.asked += 1
        return sum(self.worth[n] * self.left[n][min(others, len(self.left[n])) - 1] for n in self.left)

    def losses(self, modules, level: int, others: int) -> dict[str, float]:
        whole = self.loss(others)
        self.asked += len(modules) - 1
        return {
            n: whole + self.worth[n] * (self.left[n][min(level, len(self.left[n])) - 1]
                                        - self.left[n][min(others, len(self.left[n])) - 1])
            for n in modules
        }  # fmt: skip

    def note(self, message: str) -> None:
        raise AssertionError(message)


def test_the_proxy_finds_the_best_order_of_a_loss_that_is_what_it_takes_it_for() -> None:
    left = {"a": [0.3, 0.1, 0.03], "b": [0.4, 0.2, 0.1], "c": [0.3, 0.05, 0.01]}
    view = View({"a": 1.0, "b": 10.0, "c": 0.5}, left)
    assert by_proxy(view, measured=True) == greedy(
        {n: [v * view.worth[n] for v in (1, *left[n])] for n in left}, view.levels
    )
    asked, view.asked = view.asked, 0
    assert by_proxy(view, measured=False)[0] == ("c", 1) and view.asked == 0
    levels = by_levels(view)
    assert [level for _, level in levels] == [1, 1, 1, 2, 2, 2] and levels[0] == ("b", 1)
    assert asked < view.asked
