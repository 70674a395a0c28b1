from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from compress.calibration.statistics import AbsMean, CrossMoment, SecondMoment, SiteStatistics
from compress.errors import NumericsError, RecipeError
from compress.linalg.low_rank import decompose
from compress.linalg.ranks import break_even_rank
from compress.methods.base import Kept, LayerShape
from compress.methods.gptq import GPTQ, GPTQConfig
from compress.methods.svd import SVD, SVDConfig
from compress.modules.low_rank import LowRankLinear
from compress.modules.low_rank_spec import LowRankSpec
from tests.methods.layers import compress, inputs, layer, weight
from tests.reference import low_rank as reference

OBJECTIVES = ["plain", "scaled", "awsvd", "whitened"]
every_objective = pytest.mark.parametrize("objective", OBJECTIVES)


def statistics(x: Tensor, original: Tensor | None = None) -> SiteStatistics:
    x = x.double()
    values = {SecondMoment(): x.T @ x, AbsMean(): x.abs().mean(0)}
    if original is not None:
        values[CrossMoment()] = (original.double() - x).T @ x
    return SiteStatistics(x.shape[0], values)


def svd(w, x, original=None, **settings):
    """One layer's outcome, in float32 so that rounding to storage does not count."""
    dtype, bias = settings.pop("scale_dtype", torch.float32), settings.pop("bias", None)
    stats = None if x is None else statistics(x, original)
    return compress(SVD, [layer("a", w, SVDConfig(**settings), scale_dtype=dtype, bias=bias)], stats)["a"]


def output_error(outcome, w, x):
    return reference.output_error(w.double().numpy(), outcome.module.dense(torch.float64).numpy(), x.double().numpy())


# ---- what is chosen


@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (16, 96), (96, 16)], ids=str)
@every_objective
def test_equals_the_papers_formula(shape, objective):
    w, x = weight(*shape), inputs(300, shape[1])
    for rank in (2, 7, 12):
        made = svd(w, x, objective=objective, rank=rank, alpha=0.3)
        exact = w.double().numpy(), x.double().numpy()
        paper = {
            "plain": reference.plain(exact[0], rank),
            "scaled": reference.asvd(*exact, rank, 0.3),
            "awsvd": reference.awsvd(*exact, rank),
            "whitened": reference.svd_llm(*exact, rank),
        }[objective]
        torch.testing.assert_close(
            made.module.dense(torch.float64), torch.from_numpy(paper), rtol=0, atol=1e-6 * float(w.abs().max())
        )


@pytest.mark.parametrize("shape", [(48, 64), (64, 48)], ids=str)
def test_whitened_loses_least_and_says_beforehand_how_much(shape):
    w, x = weight(*shape), inputs(300, shape[1])
    for rank in range(1, break_even_rank(*shape) + 1, 3):
        made = {objective: svd(w, x, objective=objective, rank=rank) for objective in OBJECTIVES}
        losses = {objective: output_error(outcome, w, x) for objective, outcome in made.items()}
        assert losses["whitened"] == min(losses.values())
        report = made["whitened"].report
        total = float((w.double() @ x.double().T).square().sum())
        assert report["predicted_error"] == pytest.approx(losses["whitened"] / total, rel=1e-5)
        for objective, outcome in made.items():
            assert outcome.report["relative_error"] == pytest.approx(losses[objective] / total, rel=1e-4)
            assert outcome.report["loss"] == pytest.approx(losses[objective] / 300, rel=1e-4)
        blind = svd(w, None, objective="plain", rank=rank)
        assert torch.equal(blind.module.dense(), made["plain"].module.dense())
        assert blind.report["weight_error"] == pytest.approx(blind.report["predicted_error"], rel=1e-5)
        assert "relative_error" not in blind.report


def test_layers_of_a_site_are_as_if_alone():
    x = inputs(300, 64)
    tasks = [
        layer("q", weight(64, 64, 1), SVDConfig()),
        layer("k", weight(16, 64, 2), SVDConfig(keep_ratio=0.5)),
        layer("v", weight(16, 64, 3), SVDConfig(objective="awsvd", rank=3), scale_dtype=torch.float16),
    ]
    together = compress(SVD, tasks, statistics(x))
    assert list(together) == ["q", "k", "v"]
    for task in tasks:
        alone = compress(SVD, [task], statistics(x))[task.name]
        assert together[task.name].module.spec == alone.module.spec == SVD.plan(task.shape, task.config)
        assert together[task.name].report == alone.report
        for name, tensor in alone.module.stored().items():
            assert torch.equal(together[task.name].module.stored()[name], tensor)
            assert tensor.dtype == task.scale_dtype


def test_same_input_same_bits_and_nothing_given_is_changed():
    w, x = weight(48, 64), inputs(300, 64)
    stats = statistics(x, inputs(300, 64, seed=5))
    before = {request: value.clone() for request, value in stats.values.items()}, w.clone()
    task = layer("a", w, SVDConfig(refit=0.5))
    first, second = (compress(SVD, [task], stats)["a"].module.stored() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(w, before[1])
    assert all(torch.equal(stats[request], value) for request, value in before[0].items())


def test_bias_is_kept_and_applied_once():
    w, x = weight(48, 64), inputs(100, 64)
    bias = torch.arange(48.0)
    module = svd(w, x, bias=bias).module
    assert torch.equal(module(torch.zeros(2, 64)), bias.expand(2, 48))
    torch.testing.assert_close(module(x), x @ module.dense().T + bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_figures_are_those_of_the_weight_as_stored(dtype):
    w, x = weight(48, 64), inputs(300, 64)
    made = svd(w, x, rank=20, scale_dtype=dtype)
    total = float((w.double() @ x.double().T).square().sum())
    assert made.report["relative_error"] == pytest.approx(output_error(made, w, x) / total, rel=1e-3)
    assert made.report["relative_error"] != made.report["predicted_error"]
    assert made.report["relative_error"] == pytest.approx(made.report["predicted_error"], rel=0.05)


# ---- refit


@pytest.mark.parametrize("shape", [(48, 64), (64, 48)], ids=str)
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_refit_is_the_best_of_its_rank_for_the_original_outputs(shape, strength):
    w, original = weight(*shape), inputs(400, shape[1])
    x = original + 0.2 * inputs(400, shape[1], seed=7)
    made = svd(w, x, original, rank=10, refit=strength, damping=0.05)
    target = (x + strength * (original - x)).double() @ w.double().T
    ridge = 0.05 * float(x.double().square().sum(0).mean())
    best = reference.reduced_rank_ridge(x.double().numpy(), target.numpy(), w.double().numpy(), ridge, 10)
    torch.testing.assert_close(
        made.module.dense(torch.float64), torch.from_numpy(best), rtol=0, atol=1e-6 * float(w.abs().max())
    )
    assert made.report["damping"] == 0.05


def test_refit_brings_outputs_closer_to_the_original_models():
    w, original = weight(48, 64), inputs(400, 64)
    x = original @ (torch.eye(64) + 0.05 * torch.randn(64, 64, generator=torch.Generator().manual_seed(3)))
    wanted = original.double() @ w.double().T

    def missed(made):
        return float((wanted - x.double() @ made.module.dense(torch.float64).T).square().sum())

    losses = [missed(svd(w, x, original, rank=20, refit=strength)) for strength in (0.0, 0.5, 1.0)]
    assert losses[2] < losses[1] < losses[0]


def test_undisturbed_inputs_leave_nothing_to_refit():
    w, x = weight(48, 64), inputs(400, 64)
    plain, refitted = svd(w, x, rank=16), svd(w, x, x, rank=16, refit=1.0, damping=1e-9)
    torch.testing.assert_close(refitted.module.dense(), plain.module.dense(), rtol=0, atol=1e-6)


# ---- ranks and bytes


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.8, 0.95])
@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("shape", [(64, 64), (16, 64), (160, 64), (64, 160)], ids=str)
def test_factors_take_what_is_kept_and_no_more(shape, keep, multiple):
    config = SVDConfig(keep_ratio=keep, rank_multiple=multiple)
    spec = SVD.plan(LayerShape("a", *shape), config)
    assert isinstance(spec, LowRankSpec)
    out, n = shape
    assert spec.rank % multiple == 0
    assert spec.nbytes("BF16") == 2 * spec.rank * (out + n)
    assert spec.nbytes("BF16") <= keep * 2 * out * n or spec.rank == multiple
    assert 2 * (spec.rank + multiple) * (out + n) > keep * 2 * out * n


def test_rank_in_place_of_a_ratio():
    assert SVD.plan(LayerShape("a", 64, 64), SVDConfig(rank=9, keep_ratio=0.5)).rank == 9
    assert SVD.plan(LayerShape("a", 64, 64), SVDConfig(rank=9, rank_multiple=4)).rank == 8


@pytest.mark.parametrize(
    ("settings", "rank"), [({"rank": 32}, 32), ({"rank": 500}, 500), ({"keep_ratio": 0.3, "rank_multiple": 32}, 32)]
)
def test_a_layer_that_its_factors_would_outweigh_is_kept(settings, rank):
    kept = SVD.plan(LayerShape("a", 64, 64), SVDConfig(**settings))
    assert isinstance(kept, Kept)
    assert f"factors of rank {rank} would hold {rank / 32:.2f} times the numbers of the 64 x 64 weight" in kept.reason
    assert isinstance(SVD.plan(LayerShape("a", 64, 64), SVDConfig(rank=31)), LowRankSpec)


def test_a_later_step_decides_what_ranks_are_multiples_of():
    config = SVD.fitted(SVDConfig(keep_ratio=0.8, rank_multiple=6), 16)
    assert config.rank_multiple == 48
    assert config.keep_ratio == 0.8
    assert SVD.fitted(SVDConfig(), 1) == SVDConfig()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rank": 0}, "greater than or equal to 1"), ({"keep_ratio": 0}, "greater than 0"), ({"keep_ratio": 1.0}, "less than 1"),
        ({"objective": "best"}, "plain"), ({"refit": 0.5, "objective": "awsvd"}, "refit=0.5 needs objective=whitened, not awsvd"),
        ({"ranks": 3}, "Extra inputs"),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(settings, said):
    with pytest.raises(ValidationError, match=said):
        SVDConfig(**settings)


def test_tables_are_refused():
    with pytest.raises(RecipeError, match=r"^wte: svd is for linears, not for tables; leave it out of layers$"):
        SVD.plan(LayerShape("wte", 100, 64, "embedding"), SVDConfig())


@pytest.mark.parametrize(
    ("settings", "requests"),
    [
        ({"objective": "plain"}, ()), ({"objective": "scaled"}, (AbsMean(), SecondMoment())),
        ({"objective": "awsvd"}, (SecondMoment(),)), ({}, (SecondMoment(),)), ({"refit": 0.1}, (SecondMoment(), CrossMoment())),
    ],
)  # fmt: skip
def test_data_are_asked_for_only_where_they_are_used(settings, requests):
    assert SVD.statistics(SVDConfig(**settings)) == requests


# ---- what goes wrong


@pytest.mark.parametrize("objective", ["scaled", "awsvd", "whitened"])
def test_a_layer_without_tokens_is_truncated_by_its_weight_and_says_so(objective):
    w = weight(48, 64)
    nothing = statistics(torch.zeros(0, 64))
    nothing.values[AbsMean()] = torch.zeros(64)
    task = layer("a", w, SVDConfig(objective=objective, rank=9), scale_dtype=torch.float32)
    made = compress(SVD, [task], nothing)["a"]
    plain = svd(w, None, objective="plain", rank=9)
    assert torch.equal(made.module.dense(), plain.module.dense())
    assert made.notes == [
        "NOT CALIBRATED: no calibration token reached this layer; it was truncated as by objective=plain"
    ]
    assert plain.notes == [] and "relative_error" not in made.report


def test_few_tokens_are_noted():
    w = weight(48, 64)
    made = svd(w, inputs(10, 64), rank=24)
    assert made.notes[0] == "calibrated on 10 tokens for 64 inputs: too few to know them all"
    assert made.notes[1].startswith(
        "the calibration inputs reach 10 directions of the outputs; the other 14 of rank 24"
    )
    assert torch.isfinite(made.module.dense()).all()
    assert made.report["relative_error"] < 1e-9
    assert svd(w, inputs(10, 64), rank=24, objective="awsvd").notes == []


@every_objective
def test_zero_and_repeated_inputs_do_no_harm(objective):
    w, x = weight(48, 64), inputs(300, 64)
    x[:, 5] = 0
    x[:, 20:24] = x[:, 20:21]
    made = svd(w, x, objective=objective, rank=24)
    assert torch.isfinite(made.module.dense()).all()
    assert 0 < made.report["predicted_error"] < 0.5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_names_the_layer(bad):
    w, x = weight(48, 64), inputs(100, 64)
    broken = w.clone()
    broken[3, 4] = bad
    with pytest.raises(NumericsError, match=r"^a: 1 of 3072 weights are NaN or infinite"):
        svd(broken, x)
    x[2, 3] = bad
    with pytest.raises(NumericsError, match=r"^a: svd: the second moment of the inputs holds NaN or infinity"):
        svd(w, x)


def test_factors_that_their_dtype_cannot_hold_are_an_error():
    w = weight(48, 64) * 1e12
    with pytest.raises(NumericsError, match=r"^a: svd: its factors overflow torch\.float16; .*model\.dtype=float32"):
        svd(w, inputs(100, 64), scale_dtype=torch.float16)
    assert torch.isfinite(svd(w * 1e-9, inputs(100, 64), scale_dtype=torch.float16).module.dense(torch.float32)).all()


def test_a_zero_weight_stays_zero():
    made = svd(torch.zeros(48, 64), inputs(100, 64))
    assert not made.module.dense().any()
    assert made.report["relative_error"] == made.report["predicted_error"] == 0


# ---- what comes after


def test_left_factor_is_orthogonal_so_that_errors_of_the_right_one_are_errors_of_the_outputs():
    w, x = weight(48, 64), inputs(300, 64)
    module = svd(w, x, rank=16).module
    assert isinstance(module, LowRankLinear)
    left, right = (module.leaves()[name].weight.double() for name in ("left", "right"))
    disturbance = torch.randn(right.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inside = (disturbance @ x.double().T).square().sum()
    outside = (left @ disturbance @ x.double().T).square().sum()
    scale = float((left.T @ left).diagonal().mean())
    assert float(outside) == pytest.approx(scale * float(inside), rel=1e-5)


@pytest.mark.parametrize("bits", [4, 3])
def test_rounding_the_factors_loses_less_than_in_the_basis_of_singular_vectors(bits):
    """Mixing (compress/linalg/low_rank.py): GPTQ has correlations to work with behind the left factor."""
    w, x = weight(96, 128), inputs(1000, 128) @ torch.diag(0.95 ** torch.arange(128.0))
    stats = statistics(x)
    settings = GPTQConfig(bits=bits, group_size=32)

    def both(module: LowRankLinear) -> float:
        for name in ("right", "left"):
            leaf = module.leaves()[name]
            inside = SiteStatistics(1000, {SecondMoment(): stats[SecondMoment()].float()}).mapped(leaf.input_map)
            made = compress(GPTQ, [layer(name, leaf.weight, settings)], inside)[name].module
            module = module.with_leaf(name, made, stats[SecondMoment()])
        return reference.output_error(w.double().numpy(), module.dense(torch.float64).numpy(), x.double().numpy())

    mixed = svd(w, x, rank=32)
    basis = decompose(w, 32, stats[SecondMoment()]).basis.float()
    unmixed = LowRankLinear.from_factors(basis, basis.T @ w)
    truncation = output_error(mixed, w, x)
    assert both(mixed.module) - truncation < 0.8 * (both(unmixed) - truncation)


# ---- the model that ships


@pytest.fixture(scope="module")
def real_layers(shipped_model, shipped_tokenizer) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Every linear of block 2: weight, second moment and mean size of its inputs, float64, over 4096 tokens."""
    import compress as package
    from compress import shipped

    model = package.load(shipped_model, dtype=torch.float32)
    text = shipped.heldout_text_path().read_text(encoding="utf-8")[:40_000]
    ids = torch.tensor(shipped_tokenizer(text)["input_ids"][:4096]).reshape(16, 256)
    found: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def watch(name, module):
        def hook(_, args):
            x = args[0].flatten(0, -2).double()
            found[name] = (module.weight.detach().double(), x.T @ x, x.abs().mean(0))

        return module.register_forward_pre_hook(hook)

    for name, module in model.model.layers[2].named_modules():
        if isinstance(module, torch.nn.Linear):
            watch(name, module)
    with torch.no_grad():
        model(ids)
    return found


@pytest.mark.parametrize("keep", [0.9, 0.6, 0.3])
def test_on_real_layers_the_loss_is_as_predicted_and_whitened_has_the_least(real_layers, keep):
    assert len(real_layers) == 7
    for name, (w, h, size) in real_layers.items():
        stats = SiteStatistics(4096, {SecondMoment(): h, AbsMean(): size})
        losses = {}
        for objective in OBJECTIVES:
            config = SVDConfig(objective=objective, keep_ratio=keep)
            made = compress(SVD, [layer(name, w.float(), config, scale_dtype=torch.float32)], stats)[name]
            assert made.notes == []
            difference = w - made.module.dense(torch.float64)
            losses[objective] = float(((difference @ h) * difference).sum() / ((w @ h) * w).sum())
            if objective == "whitened":
                assert made.report["predicted_error"] == pytest.approx(losses[objective], rel=1e-4)
        assert losses["whitened"] <= min(losses.values())
        assert losses["whitened"] < 0.8 * losses["plain"], name


def test_on_real_layers_both_routes_agree(real_layers, monkeypatch):
    from compress.linalg import low_rank

    for name, (w, h, _) in real_layers.items():
        rank = min(w.shape) // 3
        fast = decompose(w, rank, h)
        monkeypatch.setattr(low_rank, "GRAM_FLOOR", 2.0)
        exact = decompose(w, rank, h)
        monkeypatch.undo()
        assert (fast.route, exact.route) == ("gram", "svd")
        ours, theirs = (f.basis @ f.basis.T @ w for f in (fast, exact))
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-8, name
        assert fast.loss == pytest.approx(exact.loss, rel=1e-8)
