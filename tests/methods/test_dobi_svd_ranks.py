"""Ranks that are learned: the truncated model, the budget, what learning does on a model whose ranks are known, resuming."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compress.checkpoint.load import load
from compress.errors import NumericsError, RecipeError
from compress.methods.base import Kept, LayerShape, View
from compress.methods.dobi_svd import DobiSVDConfig
from compress.methods.dobi_svd_ranks import Costs, Learner, TruncatedLinear, settle
from compress.pipeline.plan import Plan, plan
from compress.pipeline.progress import Silent
from compress.pipeline.run import run
from tests.runs import fingerprints, recipe_for
from tests.tiny_models import save_tiny

WIDTH, VOCABULARY = 32, 48
SHAPES = {
    "low": LayerShape("low", WIDTH, WIDTH),
    "wide": LayerShape("wide", 2 * WIDTH, WIDTH),
    "narrow": LayerShape("narrow", WIDTH, 2 * WIDTH),
}


class Block(nn.Module):
    def __init__(self, generator: torch.Generator):
        super().__init__()
        for name, shape in SHAPES.items():
            linear = nn.Linear(shape.in_features, shape.out_features, bias=name != "narrow")
            linear.weight.data = torch.randn(linear.weight.shape, generator=generator) / shape.in_features**0.5
            if linear.bias is not None:
                linear.bias.data = torch.randn(linear.bias.shape, generator=generator) / 4
            setattr(self, name, linear)
        u, s, vh = torch.linalg.svd(self.low.weight.data)
        self.low.weight.data = 3 * (u[:, :3] * s[:3]) @ vh[:3]  # of rank 3

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.low(h)
        return h + self.narrow(torch.tanh(self.wide(h)))


class Model(nn.Module):
    """Logits of the next token from the last one."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.table.weight.data = torch.randn(VOCABULARY, WIDTH, generator=generator)
        self.block = Block(generator)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight.data = torch.randn(VOCABULARY, WIDTH, generator=generator) / 3

    def forward(self, input_ids: Tensor, use_cache: bool) -> object:
        return type("Output", (), {"logits": self.head(self.block(self.table(input_ids)))})


class Toy(View):
    """A model whose own words are what it is measured on, so that it is best as it is."""

    def __init__(self, memory: dict | None = None):
        self.shapes, self.blocks, self.n_blocks = SHAPES, dict.fromkeys(SHAPES, 0), 1
        self.memory = {} if memory is None else memory
        self.notes: list[str] = []
        self.advanced: list[str] = []
        generator = torch.Generator().manual_seed(1)
        ids = [torch.randint(VOCABULARY, (32,), generator=generator)]
        with torch.no_grad():
            model = Model()
            for _ in range(47):
                chances = model(ids[-1], use_cache=False).logits.softmax(-1)
                ids.append(torch.multinomial(chances, 1, generator=generator)[:, 0])
        self.batches = torch.stack(ids, dim=1).split(8)

    def sites(self):
        raise NotImplementedError

    states = weight = keep = sites

    def model(self) -> nn.Module:
        return Model().eval().requires_grad_(False)

    def place(self, model, name):
        return model.block, name

    def block_modules(self, model):
        return [model.block]

    def generator(self, purpose):
        return torch.Generator().manual_seed(len(purpose))

    def remember(self, key, make):
        if key not in self.memory:
            self.memory[key] = make()
        return self.memory[key]

    @contextmanager
    def track(self, phase, total, unit):
        yield self.advanced.append

    def note(self, message):
        self.notes.append(message)


def configs(**settings) -> dict[str, DobiSVDConfig]:
    return {
        name: DobiSVDConfig(**{"keep_ratio": 0.4, "steps": 60, "learning_rate": 0.02, **settings}) for name in SHAPES
    }


def learner(view: Toy, **settings) -> Learner:
    asked = configs(**settings)
    return Learner(view, asked, asked["low"], Costs.of(SHAPES, asked))


def test_learning_finds_the_layer_of_low_rank():
    view = Toy()
    start = Costs.of(SHAPES, configs()).settled(Costs.of(SHAPES, configs()).start())
    low, wide, narrow = (config.rank for config in settle(view, configs()).values())
    assert low <= 0.7 * start[0] and wide + narrow > start[1] + start[2]
    uniform, learned = (view.memory["settled ranks"][key] for key in ("uniform", "learned"))
    assert learned < 0.998 * uniform
    assert len(view.advanced) == 60 and any("learned ranks" in note for note in view.notes)
    penalty = Toy()  # the paper's way to the budget moves them the same way, but less
    assert low < settle(penalty, configs(budget_weight=200.0))["low"].rank < start[0]


@pytest.mark.parametrize("remap", [True, False])
def test_the_budget_is_met_to_less_than_a_rank(remap):
    asked = configs(remap=remap, keep_ratio=0.37)
    costs = Costs.of(SHAPES, asked)
    assert costs.budget == 757 + 2 * 1515  # 0.37 of 2 * 32 * 32 and of 2 * 32 * 64, down to whole bytes
    for seed in range(20):
        fractions = torch.rand(3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).clamp(min=0.05)
        ranks = costs.settled(fractions)
        spent = [
            float(dense if rank is None else rank * per)
            for rank, per, dense in zip(ranks, costs.per_rank, costs.dense, strict=True)
        ]
        left = costs.budget - sum(spent)
        assert left >= 0
        more = [
            min(float(per), float(dense) - own)
            for rank, per, dense, own in zip(ranks, costs.per_rank, costs.dense, spent, strict=True)
            if rank is not None
        ]
        assert left < max(more, default=float("inf"))
        whole = [rank for rank in ranks if rank is not None]
        assert all(1 <= rank <= WIDTH for rank in whole)


def test_ranks_are_in_proportion_and_a_full_layer_stays_dense():
    costs = Costs.of(SHAPES, configs(keep_ratio=0.6))
    low, wide, narrow = costs.settled(torch.tensor([0.1, 0.4, 0.8], dtype=torch.float64))
    assert low * 4 == pytest.approx(wide, abs=3) and wide * 2 == pytest.approx(narrow, abs=2)
    asked = configs(keep_ratio=0.6, steps=0, remap=False)
    asked["low"] = asked["low"].model_copy(update={"keep_ratio": 0.99})
    found = settle(Toy(), asked)
    assert isinstance(found["low"], Kept) or found["low"].rank == 15
    assert Costs.of(SHAPES, asked).settled(torch.tensor([1.0, 1e-6, 1e-6], dtype=torch.float64))[0] is None


def test_real_ranks_cost_what_whole_ones_do():
    costs = Costs.of(SHAPES, configs())
    fractions = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    spent = (costs.per_rank * costs.full * fractions).sum()
    assert float(costs.ratio(fractions)) == pytest.approx(float(spent / costs.dense.sum()))
    assert float(costs.ratio(costs.start())) == pytest.approx(costs.aim, abs=1e-3)
    assert float(costs.ratio(torch.ones(3, dtype=torch.float64))) == 1  # no layer costs more than it does dense


def test_what_cannot_be_met_is_refused_before_anything_is_learned():
    view = Toy()
    with pytest.raises(RecipeError, match="cannot be met: the least ranks of 3 layers"):
        settle(view, configs(keep_ratio=0.3, rank_multiple=16, remap=False))
    assert not view.advanced
    different = configs()
    different["wide"] = different["wide"].model_copy(update={"beta": 3.0})
    with pytest.raises(RecipeError, match="beta is 3.0 for wide and 10.0 for low, but ranks are learned together"):
        settle(view, different)


def test_what_cannot_be_met_is_refused_in_the_plan(tiny, text):
    """gptq rounds in groups of 32 here, so that ranks are multiples of 32: half of full rank."""

    def planned(ratio: float) -> Plan:
        steps = [{"dobi_svd": {"keep_ratio": ratio, "remap": False}}, {"gptq": {"bits": 4, "group_size": 32}}]
        return plan(recipe_for(tiny("llama"), steps, text, evaluation=False))

    with pytest.raises(
        RecipeError, match=r"steps.0.dobi_svd: .*layers at their least ranks \(a multiple of 32\)"
    ) as refused:
        planned(0.4)
    least = float(str(refused.value).split("at least ")[1].split(",")[0])
    assert 0.4 < least < 1
    with pytest.raises(RecipeError, match="cannot be met"):
        planned(least - 0.0002)
    planned(least)


@pytest.mark.parametrize("name", SHAPES)
def test_a_truncated_linear_is_the_linear_until_it_is_truncated(name):
    model = Model().block
    original = getattr(model, name)
    found = TruncatedLinear(name, original, SHAPES[name], configs()["low"])
    x = torch.randn(3, 40, SHAPES[name].in_features, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(found(x), original(x), rtol=1e-3, atol=1e-3)  # at full rank
    found.rank = torch.tensor(64.0, dtype=torch.float64)
    torch.testing.assert_close(found(x), original(x), rtol=1e-4, atol=1e-5)
    found.rank, found.beta = torch.tensor(5.0, dtype=torch.float64), 1e4
    bias = 0 if original.bias is None else original.bias
    outputs = (original(x) - bias).flatten(0, 1)
    u, s, vh = torch.linalg.svd(outputs, full_matrices=False)
    torch.testing.assert_close((found(x) - bias).flatten(0, 1), (u[:, :5] * s[:5]) @ vh[:5], rtol=1e-3, atol=1e-4)
    few = found(x[:1, :16])  # fewer tokens than directions: a rank of 5 in 32 is one of 2.5 in 16
    assert torch.linalg.matrix_rank((few - bias)[0], rtol=1e-3) in (2, 3)
    assert found(x[:0]).shape == (0, 40, SHAPES[name].out_features)


def test_the_gradient_of_the_ranks_is_what_finite_differences_give():
    view = Toy()
    own = learner(view, beta=2.0, budget_weight=200)
    ids, step = view.batches[0], 1e-3
    fractions = torch.tensor([0.08, 0.4, 0.6], dtype=torch.float64)
    value, perplexity, gradient = own._step(fractions, ids)
    assert value > perplexity  # it pays for the deviation
    for i in range(3):
        shift = torch.zeros(3, dtype=torch.float64)
        shift[i] = step
        more, less = (own._step(fractions + sign * shift, ids)[0] for sign in (1, -1))
        assert float(gradient[i]) == pytest.approx((more - less) / (2 * step), rel=0.02, abs=0.05)


def test_without_a_penalty_the_budget_is_never_left():
    own = learner(Toy())
    fractions = own.costs.start()
    _, _, gradient = own._step(fractions, own.view.batches[0])
    price = own.costs.per_rank * own.costs.full
    assert abs(float(gradient @ price)) < 1e-6 * float(gradient.abs() @ price)
    for fractions in (torch.tensor([0.9, 0.9, 0.9]), torch.tensor([0.01, 0.01, 1.0]), torch.tensor([1.0, 1.0, 0.1])):
        assert float(own.costs.ratio(own.costs.met(fractions.double()))) == pytest.approx(0.4, abs=1e-3)


def test_what_was_learned_is_not_learned_again():
    whole = settle(Toy(), configs(steps=10))
    memory: dict = {}
    settle(Toy(memory), configs(steps=10))
    cut = {key: memory[key] for key in ("pass 0", "pass 1")}  # of 10 steps on 4 batches
    again = Toy(cut)
    assert settle(again, configs(steps=10)) == whole
    assert again.advanced.count("remembered") == 8 and len(again.advanced) == 10
    finished = Toy(memory)
    finished.model = None  # type: ignore[method-assign,assignment]
    assert settle(finished, configs(steps=10)) == whole


def test_a_model_that_computes_nan_is_named():
    class Broken(Toy):
        def model(self):
            model = super().model()
            model.block.wide.weight.data[0, 0] = float("nan")
            return model

    with pytest.raises(NumericsError, match="^wide: dobi_svd: the outputs hold NaN or infinity"):
        settle(Broken(), configs())


# ---- a whole run


STEP = {"dobi_svd": {"keep_ratio": 0.6, "steps": 7, "learning_rate": 0.02}}


@pytest.fixture
def recipe(tmp_path: Path, text: Path):
    save_tiny("llama_gqa_tied", tmp_path / "model")
    return recipe_for(tmp_path / "model", [STEP], text, evaluation=False)


def test_a_run_stays_in_its_budget_and_goes_on_where_it_was_cut(recipe, tmp_path):
    class Stop(Silent):
        steps = 0

        def begin(self, phase, total, unit):
            self.phase = phase

        def advance(self, steps=1, detail=""):
            self.steps += self.phase == "learn ranks" and detail != "remembered"
            if self.steps == 5:
                raise KeyboardInterrupt

    planned = plan(recipe)
    assert any("settles 21 layers" in warning for warning in planned.warnings)
    whole = run(recipe, tmp_path / "whole")
    layers = whole.plan.layers.values()
    dense = sum(2 * layer.out_features * layer.in_features for layer in layers)
    spent = sum(layer.spec.nbytes("BF16") for layer in layers)
    assert 0.6 * dense - 2 * 128 - 4 < spent <= 0.6 * dense
    assert len({layer.spec.rank / min(layer.out_features, layer.in_features) for layer in layers}) > 2
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "cut", progress=Stop())
    seen = Stop()
    seen.steps = -100
    run(recipe, tmp_path / "cut", progress=seen)
    assert seen.steps == -100 + 7 - 3  # three steps, a pass over the batches, were remembered
    assert fingerprints(tmp_path / "cut") == fingerprints(tmp_path / "whole")
    model = load(tmp_path / "whole")
    model.save_pretrained(tmp_path / "again")
    ids = torch.arange(3, 43)[None]
    torch.testing.assert_close(load(tmp_path / "again")(ids).logits, model(ids).logits)


def test_the_plan_says_what_memory_learning_takes(recipe):
    from compress.methods.base import Extent
    from compress.methods.dobi_svd import DobiSVD

    shapes = tuple(LayerShape(f"{i}", 4096, 4096) for i in range(224))
    large = Extent(6_700_000_000, 32, 4096, 32000, 128 * 2048, 2048, shapes)
    assert 27e9 < DobiSVD.observation_bytes(large, DobiSVDConfig()) < 40e9  # the weights are 27 GB of it
    assert DobiSVD.observation_bytes(large, DobiSVDConfig(steps=0)) == 0


def test_a_run_with_incremental_pca_loses_more(recipe, text, tmp_path):
    losses = {}
    for update in ("closed_form", "ipca"):
        step = {"dobi_svd": {"keep_ratio": 0.6, "steps": 0, "update": update}}
        asked = recipe_for(tmp_path / "model", [step], text, evaluation=False)
        report = run(asked, tmp_path / update).report
        losses[update] = {layer["name"]: layer["figures"]["loss"] for layer in report["layers"]}
    first = [name for name in losses["ipca"] if ".0.self_attn.q" in name or ".0.self_attn.k" in name]
    assert len(first) == 2 and all(losses["closed_form"][name] < losses["ipca"][name] for name in first)
