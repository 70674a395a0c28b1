"""Ranks of all layers under one budget (`allocation` of svd): what every rule must keep to, gradients, runs, resuming."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn.functional import cross_entropy

from compress.calibration.statistics import AbsMean, SecondMoment, SiteStatistics
from compress.errors import NumericsError, RecipeError
from compress.linalg.ranks import break_even_rank, lorap_ranks, uniform_rank
from compress.methods.base import Extent, Kept, LayerShape, SiteTask
from compress.methods.dobi_svd import DobiSVDConfig
from compress.methods.svd import SVD, SVDConfig
from compress.methods.svd_ranks import check, expected_losses, settle, spectrum_of
from compress.methods.whole_model import SKETCH_ROWS, gradient_sketches
from compress.modules.low_rank_spec import LowRankSpec
from compress.pipeline.plan import plan
from compress.pipeline.progress import Silent
from compress.pipeline.run import run
from tests.methods.layers import inputs, layer, weight
from tests.methods.test_dobi_svd_ranks import SHAPES, Model, Toy
from tests.runs import fingerprints, recipe_for
from tests.tiny_models import save_tiny

SPECTRAL = ["loss", "effective_rank", "energy", "heavy_tail"]
ALLOCATIONS = [*SPECTRAL, "learned"]


class Watched(Toy):
    """The model of `Toy`, whose layers can also be seen one by one, each a site of its own."""

    shown = 0

    def __init__(self, config: SVDConfig, memory: dict | None = None, names: tuple[str, ...] = tuple(SHAPES)):
        super().__init__(memory)
        self.configs = dict.fromkeys(names, config)
        self.shapes = {name: SHAPES[name] for name in names}
        self.blocks = dict.fromkeys(names, 0)

    def nbytes(self, name, spec):
        shape = self.shapes[name]
        return 2 * shape.out_features * shape.in_features if spec is None else spec.nbytes("BF16")

    def sites(self):
        self.shown += 1
        model = Model()
        seen = {name: [] for name in self.shapes}
        for name, found in seen.items():
            getattr(model.block, name).register_forward_pre_hook(
                lambda _, args, found=found: found.append(args[0].flatten(0, -2).double())
            )
        with torch.no_grad():
            for ids in self.batches:
                model(ids, use_cache=False)
        for name in self.shapes:
            x = torch.cat(seen[name])
            values = {SecondMoment(): x.T @ x, AbsMean(): x.abs().mean(0)}
            config = self.configs[name]
            asked = SiteStatistics(len(x), {request: values[request] for request in SVD.statistics(config)})
            w = getattr(model.block, name).weight.detach()
            yield SiteTask(name, (layer(name, w, config),)), asked if asked.values else None


class Made(Watched):
    """Layers and statistics as given."""

    def __init__(
        self, weights: dict[str, Tensor], config: SVDConfig, x: Tensor, memory: dict | None = None, roles=None
    ):
        super().__init__(config, memory, names=())
        self.weights, self.x = weights, x
        self.shapes = {n: LayerShape(n, *w.shape, role=(roles or {}).get(n)) for n, w in weights.items()}
        self.configs = dict.fromkeys(weights, config)
        self.blocks = dict.fromkeys(weights, 0)

    def sites(self):
        x = self.x.double()
        for name, w in self.weights.items():
            yield (
                SiteTask(name, (layer(name, w, self.configs[name]),)),
                SiteStatistics(len(x), {SecondMoment(): x.T @ x}),
            )


def settled(view: Watched) -> dict[str, int | None]:
    return {name: None if isinstance(found, Kept) else found.rank for name, found in settle(view, view.configs).items()}


def same_gradients(monkeypatch, squares: dict[str, float]) -> None:
    """Gradients whose mean square along every direction of 48 outputs is `squares` of the layer."""
    sketches = {name: value**0.5 * torch.eye(48) for name, value in squares.items()}
    monkeypatch.setattr("compress.methods.svd_ranks.gradient_sketches", lambda view, names, n_tokens: sketches)


def size(ranks: dict[str, int | None], shapes: dict[str, LayerShape]) -> int:
    sizes = {name: (shapes[name].out_features, shapes[name].in_features) for name in ranks}
    return sum(2 * (m * n if ranks[name] is None else ranks[name] * (m + n)) for name, (m, n) in sizes.items())


def quick(allocation: str, **settings) -> SVDConfig:
    return SVDConfig(**{"allocation": allocation, "steps": 8, "learning_rate": 0.02, **settings})


# ---- what every rule keeps to


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize(("keep", "multiple"), [(0.37, 1), (0.8, 1), (0.9, 4)])
def test_the_budget_is_met_to_less_than_a_step_and_no_factors_outweigh_their_layer(allocation, keep, multiple):
    view = Watched(quick(allocation, keep_ratio=keep, rank_multiple=multiple))
    ranks = settled(view)
    budget = int(keep * sum(2 * s.out_features * s.in_features for s in SHAPES.values()) + 1e-9)
    left = budget - size(ranks, SHAPES)
    assert left >= 0
    for name, rank in ranks.items():
        if rank is not None:
            m, n = SHAPES[name].out_features, SHAPES[name].in_features
            assert rank % multiple == 0 and rank <= break_even_rank(m, n)
            assert left < min(2 * multiple * (m + n), 2 * m * n - 2 * rank * (m + n))  # one step more does not fit
            assert isinstance(SVD.plan(SHAPES[name], view.configs[name].model_copy(update={"rank": rank})), LowRankSpec)
    assert any(f"{budget - left:,} of {budget:,} bytes" in note for note in view.notes)


@pytest.mark.parametrize("allocation", SPECTRAL)
def test_equal_layers_get_the_uniform_rank(allocation, monkeypatch):
    same_gradients(monkeypatch, dict.fromkeys("abcd", 0.3))
    view = Made(dict.fromkeys("abcd", weight(48, 64)), quick(allocation, keep_ratio=0.6), inputs(300, 64))
    uniform = uniform_rank(48, 64, 0.6)
    ranks = settled(view)
    assert set(ranks.values()) <= {uniform, uniform + 1} and ranks["a"] >= ranks["d"]
    assert sum(ranks.values()) == int(0.6 * 4 * 48 * 64) // (48 + 64)


@pytest.mark.parametrize("allocation", SPECTRAL)
def test_a_layer_of_low_rank_gets_less(allocation):
    view = Watched(quick(allocation, keep_ratio=0.4))
    ranks = settled(view)
    assert ranks["low"] <= 4 < uniform_rank(32, 32, 0.4)  # its rank is 3
    assert view.shown == 1


def test_what_the_loss_feels_more_gets_more(monkeypatch):
    def ranks(**gradients):
        same_gradients(monkeypatch, gradients)
        w = weight(48, 64)
        return settled(Made({"a": w, "b": w}, quick("loss", keep_ratio=0.6), inputs(300, 64)))

    even, tilted, never = ranks(a=1, b=1), ranks(a=4, b=1), ranks(a=1, b=0)
    assert abs(even["a"] - even["b"]) <= 1
    assert (tilted["a"] or 48) > tilted["b"]
    assert never["a"] is None and never["b"] >= 1  # all that one takes goes to it


def test_the_expected_loss_is_the_least_that_the_bytes_buy():
    view = Watched(quick("loss", keep_ratio=0.5))
    ranks = settled(view)
    worth = expected_losses(view, list(SHAPES))

    def rise(own):
        return sum(float(worth[name][rank:].sum()) for name, rank in own.items() if rank is not None)

    budget, step = size(ranks, SHAPES), max(float(own.max()) for own in worth.values())
    for more in SHAPES:
        for less in SHAPES:
            other = dict(ranks)
            if more != less and None not in (other[more], other[less]):
                other[more] += 1
                while size(other, SHAPES) > budget and other[less] > 1:
                    other[less] -= 1
                assert rise(other) >= rise(ranks) - 1e-3 * step
    note = next(note for note in view.notes if "expected" in note)
    assert f"{rise(ranks):.4f} nats" in note


@pytest.mark.parametrize("objective", ["whitened", "scaled", "awsvd"])
def test_what_a_direction_is_worth(objective):
    """Half the mean square of the gradient along it, times that of the output that leaving it out takes away."""
    view = Watched(quick("loss", objective=objective))
    worth = expected_losses(view, list(SHAPES))
    sketches = gradient_sketches(Watched(quick("loss")), list(SHAPES), 10**6)
    for task, statistics in Watched(quick("loss", objective=objective)).sites():
        (own,) = task.layers
        w, second = own.weight.double(), statistics[SecondMoment()]
        moment = {"whitened": second, "awsvd": second.diagonal().diag()}.get(objective)
        if moment is None:
            moment = statistics[AbsMean()].double().diag()  # alpha 1/2
        values, vectors = torch.linalg.eigh(w @ moment @ w.T)
        rank = int((values > 1e-9 * values.max()).sum())
        u = vectors.flip(1)[:, : min(rank, 2)]  # the others lie close together
        energies = ((u.T @ w) @ second * (u.T @ w)).sum(1) / statistics.n_tokens
        felt = (sketches[own.name].double() @ u).square().sum(0)
        torch.testing.assert_close(
            torch.from_numpy(worth[own.name][: u.shape[1]]), energies * felt / 2, rtol=1e-5, atol=0
        )


def test_heavy_tail_without_data_is_of_the_weights_themselves():
    view = Watched(quick("heavy_tail", keep_ratio=0.5, objective="plain"))
    assert not SVD.needs_tokens(view.configs["low"])
    assert None not in settled(view).values()
    wide = Model().block.wide.weight.detach()
    found = spectrum_of(layer("wide", wide, view.configs["wide"]), None)
    torch.testing.assert_close(
        torch.from_numpy(found).sqrt(), torch.linalg.svdvals(wide.double()), rtol=1e-9, atol=1e-9
    )


def test_a_layer_that_no_token_reached_has_its_uniform_rank():
    class Half(Watched):
        def sites(self):
            for task, statistics in super().sites():
                yield (
                    task,
                    SiteStatistics(0, {SecondMoment(): torch.zeros(32, 32)}) if task.name == "wide" else statistics,
                )

    view = Half(quick("loss", keep_ratio=0.5))
    ranks = settled(view)
    assert ranks["wide"] == uniform_rank(64, 32, 0.5)
    assert size(ranks, SHAPES) <= 0.5 * sum(2 * s.out_features * s.in_features for s in SHAPES.values())


# ---- gradients


def direct_gradients(view: Watched) -> dict[str, Tensor]:
    """[tokens, out] of every layer, of the summed loss of each batch by the layer's outputs."""
    model, found = Model(), {name: [] for name in SHAPES}
    for ids in view.batches:
        added = {name: torch.zeros(*ids.shape, s.out_features, requires_grad=True) for name, s in SHAPES.items()}
        hooks = [
            getattr(model.block, name).register_forward_hook(lambda _, __, y, extra=extra: y + extra)
            for name, extra in added.items()
        ]
        logits = model(ids, use_cache=False).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        for name, gradient in zip(added, torch.autograd.grad(loss, list(added.values())), strict=True):
            found[name].append(gradient.flatten(0, -2))
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def test_sketches_know_the_mean_square_of_gradients_along_any_direction(monkeypatch):
    view = Watched(quick("loss"))
    exact = direct_gradients(view)
    u = torch.linalg.qr(torch.randn(32, 8, generator=torch.Generator().manual_seed(0))).Q

    def along(sketch, u):
        return (sketch @ u).square().sum(0)

    for name, found in gradient_sketches(view, list(SHAPES), 10**6).items():
        assert found.shape == (SKETCH_ROWS, SHAPES[name].out_features)
        total = float(exact[name].square().sum(1).mean())
        assert float(found.square().sum()) == pytest.approx(total, rel=0.1)
    assert len(view.advanced) == len(view.batches)
    monkeypatch.setattr("compress.methods.whole_model.SKETCH_ROWS", 10**6)  # every token has a row of its own
    for name in ("low", "narrow"):
        found = gradient_sketches(view, [name], 10**6)[name]
        mean = (exact[name] @ u).square().mean(0)
        torch.testing.assert_close(along(found, u), mean, rtol=0.03, atol=0)
    assert len(view.advanced) == 3 * len(view.batches)
    first = view.batches[0].numel()
    gradient_sketches(view, ["low"], first)
    gradient_sketches(view, ["low"], first + 1)
    assert len(view.advanced) == 3 * len(view.batches) + 1 + 2


def test_a_model_whose_loss_is_nan_is_an_error():
    class Broken(Watched):
        def model(self):
            model = super().model()
            model.block.wide.weight.data[0, 0] = float("nan")
            return model

    view = Broken(quick("loss"))
    with pytest.raises(
        NumericsError, match="^svd: the loss of the calibration rows is not a number; check the checkpoint"
    ):
        settle(view, view.configs)


# ---- LoRAP


@pytest.mark.parametrize("keep", [0.5, 0.8])
def test_lorap_gives_attention_the_papers_ranks(keep):
    roles = {"a": "q", "b": "k", "c": "v", "d": "o"}
    weights = {name: torch.empty(64, 64) for name in roles} | {"e": torch.empty(128, 64)}
    ranks = settled(Made(weights, quick("lorap", keep_ratio=keep), inputs(8, 64), roles=roles))
    papers = lorap_ranks(dict.fromkeys("qkvo", (64, 64)), keep)
    for name, role in roles.items():  # what rounding leaves of the budget is spent too
        assert ranks[name] == papers[role] if papers[role] is None else 0 <= ranks[name] - papers[role] <= 1
    assert 0 <= ranks["e"] - uniform_rank(128, 64, keep) <= 1


def test_lorap_needs_the_four_apart():
    with pytest.raises(
        RecipeError, match="allocation=lorap shares bytes among q, k, v and o of attention, but not all"
    ):
        check(SHAPES, dict.fromkeys(SHAPES, quick("lorap")), Watched(quick("lorap")).nbytes)


@pytest.mark.parametrize(
    ("family", "expected"), [("llama_gqa_tied", "qkvo"), ("opt", "qkvo"), ("phi3", "o"), ("gpt2", "o")]
)
def test_roles_come_from_the_sites(family, expected, tmp_path):
    from compress.models.families import architecture_of
    from tests.tiny_models import tiny_config

    architecture = architecture_of(tiny_config(family).to_dict())
    roles = {site.role(name): name for site in architecture.sites(1) for name in site.linears}
    assert "".join(role for role in roles if role) == expected
    assert all(f"{role}_proj" in roles[role] for role in "qkv" if expected == "qkvo")


# ---- settings


def test_settings_of_learning_are_those_of_dobi_svd():
    mine, theirs = SVDConfig(), DobiSVDConfig()
    assert (mine.steps, mine.learning_rate) == (theirs.steps, theirs.learning_rate)


def test_what_cannot_be_asked_for():
    with pytest.raises(ValidationError, match="allocation=loss needs to know the outputs' errors, and objective=plain"):
        SVDConfig(allocation="loss", objective="plain")
    mixed = {"low": quick("loss"), "wide": quick("energy")}
    with pytest.raises(
        RecipeError, match="allocation is energy for wide and loss for low, but one budget is spent by one"
    ):
        check(SHAPES, mixed, Watched(quick("loss")).nbytes)


def test_a_rank_that_is_given_needs_no_look():
    assert SVD.observes(SVDConfig(allocation="energy"))
    assert not SVD.observes(SVDConfig(allocation="energy", rank=3))
    assert not SVD.observes(SVDConfig())


def test_the_plan_states_the_memory_of_the_backward_pass():
    shapes = tuple(LayerShape(f"{i}", 4096, 4096) for i in range(224))
    large = Extent(6_700_000_000, 32, 4096, 32000, 128 * 2048, 2048, shapes)
    assert 26.8e9 < SVD.observation_bytes(large, SVDConfig(allocation="loss")) < 32e9  # the weights are 26.8 GB of it
    assert SVD.observation_bytes(large, SVDConfig(allocation="learned")) > 30e9
    for allocation in ("effective_rank", "energy", "heavy_tail", "lorap"):
        assert SVD.observation_bytes(large, SVDConfig(allocation=allocation)) == 0


# ---- whole runs


class Phases(Silent):
    """What was done, and a stop at the first block that is compressed, or at a gradient."""

    def __init__(self, stop: str = ""):
        super().__init__()
        self.stop, self.begun = stop, []

    def begin(self, phase, total, unit):
        self.begun.append(phase)

    def advance(self, steps=1, detail=""):
        if self.begun[-1] == self.stop:
            raise KeyboardInterrupt


@pytest.fixture
def make(tmp_path: Path, text: Path):
    save_tiny("llama_gqa_tied", tmp_path / "model")
    return lambda *steps: recipe_for(tmp_path / "model", list(steps), text, evaluation=False)


def test_an_interrupted_run_does_not_look_twice(make, tmp_path):
    recipe = make({"svd": {"keep_ratio": 0.6, "allocation": "loss"}})
    whole = run(recipe, tmp_path / "whole")
    for stop, skipped in (("observe", set()), ("compress", {"gradients", "observe"})):
        cut, again = Phases(stop), Phases()
        with pytest.raises(KeyboardInterrupt):
            run(recipe, tmp_path / stop, progress=cut)
        assert {"gradients", "observe"} <= set(cut.begun)
        resumed = run(recipe, tmp_path / stop, progress=again)
        assert not skipped & set(again.begun)
        assert fingerprints(tmp_path / stop) == fingerprints(tmp_path / "whole")
        assert resumed.plan.specs == whole.plan.specs


@pytest.mark.parametrize("group", [8, 16])
def test_bytes_are_counted_behind_later_steps(make, tmp_path, group):
    rounded = {"gptq": {"bits": 4, "group_size": group}}
    dense = plan(make(rounded)).bytes_after
    step = {"svd": {"keep_ratio": 0.8, "allocation": "loss"}}
    planned = plan(make(step, rounded))
    assert planned.bytes_after <= 0.8 * dense and any("settles 21 layers" in warning for warning in planned.warnings)
    result = run(make(step, rounded), tmp_path / "out")
    layers = result.plan.layers.values()  # dense ones are rounded too
    assert len(layers) == 21 and {layer.method for layer in layers} >= {"svd+gptq"}
    ranks = [layer.spec.rank for layer in layers if layer.method == "svd+gptq"]
    assert len(set(ranks)) > 1 and all(rank % group == 0 for rank in ranks)
    largest = max((layer.out_features + layer.in_features) * group for layer in layers) * (0.5 + 4 / group)
    assert 0.8 * dense - largest < result.plan.bytes_after <= 0.8 * dense


def test_a_layer_that_stays_dense_is_named_with_the_reason(make, tmp_path):
    result = run(make({"svd": {"keep_ratio": 0.9, "allocation": "lorap"}}), tmp_path / "out")
    kept = [warning for warning in result.report["warnings"] if "kept as before" in warning]
    assert (
        len(kept) == 1 and "its rank is so high that factors would take no fewer bytes than the layer itself" in kept[0]
    )
    assert all(f"model.layers.[0-2].self_attn.{name}_proj" in kept[0] for name in "vo")
    assert not any("settles" in warning for warning in result.report["warnings"])


@pytest.mark.parametrize("model", ["mixtral", "gpt2"])
def test_experts_and_conv1d_are_settled_too(model, tmp_path, text):
    save_tiny(model, tmp_path / model)
    step = {"svd": {"keep_ratio": 0.7, "allocation": "loss", "refit": 0.0 if model == "mixtral" else 0.5}}
    result = run(recipe_for(tmp_path / model, [step], text, evaluation=False), tmp_path / "out")
    assert len({layer.spec.rank for layer in result.plan.layers.values()}) > 2


def test_on_the_model_that_ships_it_loses_less_than_uniform_ranks_of_the_same_bytes(tmp_path):
    from compress.recipe import Recipe

    found = {}
    for allocation in ("uniform", "loss"):
        recipe = Recipe.from_dict(
            {
                "model": "shipped",
                "calibration": {"data": "shipped", "samples": 16, "length": 256, "batch_size": 8},
                "steps": [{"svd": {"keep_ratio": 0.9, "allocation": allocation}}],
                "evaluation": {"data": "shipped", "length": 256, "max_tokens": 2048},
            }
        )
        result = run(recipe, tmp_path / allocation)
        found[allocation] = result.report["evaluation"]["fidelity"]["kl_mean"], result.plan.bytes_total_after
    assert found["loss"][0] < 0.7 * found["uniform"][0]
    assert found["loss"][1] == pytest.approx(found["uniform"][1], rel=0.003)
