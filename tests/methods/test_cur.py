from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from compress.calibration.statistics import CrossMoment, SecondMoment, SiteStatistics
from compress.errors import NumericsError, RecipeError
from compress.linalg.low_rank import decompose, whitener
from compress.methods.base import Kept, LayerShape
from compress.methods.cur import CUR, CURConfig
from compress.methods.cur_choice import angular_distances, settle
from compress.modules.cur_spec import CURSpec
from tests.methods.layers import compress, inputs, layer, weight
from tests.reference import cur as reference
from tests.runs import recipe_for
from tests.tiny_models import save_tiny

CHOICES = [
    {"selection": selection, "matrix": matrix}
    for selection in ("deim", "qr", "greedy")
    for matrix in ("scaled", "full", "wanda", "weight")
    if (selection, matrix) != ("greedy", "wanda")
]


def statistics(x: Tensor, original: Tensor | None = None) -> SiteStatistics:
    x = x.double()
    values = {SecondMoment(): x.T @ x}
    if original is not None:
        values[CrossMoment()] = (original.double() - x).T @ x
    return SiteStatistics(x.shape[0], values)


def cur(w, x, original=None, **settings):
    """One layer's outcome, in float32 so that rounding to storage does not count."""
    dtype, bias = settings.pop("scale_dtype", torch.float32), settings.pop("bias", None)
    stats = None if x is None else statistics(x, original)
    return compress(CUR, [layer("a", w, CURConfig(**settings), scale_dtype=dtype, bias=bias)], stats)["a"]


def output_loss(outcome, w, x) -> float:
    return float(((w.double() - outcome.module.dense(torch.float64)) @ x.double().T).square().sum())


# ---- what is chosen


@pytest.mark.parametrize("matrix", ["scaled", "full", "wanda", "weight"])
def test_deim_equals_the_formulas(matrix):
    w, x = weight(40, 48), inputs(400, 48)
    h = x.double().T @ x.double()
    scale = h.diagonal().sqrt()
    m = {
        "scaled": w.double() * scale,
        "full": w.double() @ whitener(h),
        "wanda": w.double().abs() * scale,
        "weight": w.double(),
    }[matrix]
    u = torch.linalg.svd(m, full_matrices=False).U
    vh = torch.linalg.svd(w.double() * scale if matrix == "full" else m, full_matrices=False).Vh
    rows, columns = torch.tensor(reference.deim(u[:, :9])), torch.tensor(reference.deim(vh[:9].T))
    link = reference.link(w.double(), rows, columns, whitener(h))
    expected = w.double()[:, columns] @ link @ w.double()[rows]
    made = cur(w, x, rank=9, selection="deim", matrix=matrix, damping=0)
    torch.testing.assert_close(made.module.dense(torch.float64), expected, rtol=0, atol=1e-5 * float(w.abs().max()))


@pytest.mark.parametrize("matrix", ["scaled", "full", "weight"])
@pytest.mark.parametrize("shape", [(24, 30), (30, 24)], ids=str)
def test_greedy_equals_the_formulas(shape, matrix):
    w, x = weight(*shape), inputs(400, shape[1])
    h = x.double().T @ x.double()
    seen = {"scaled": h.diagonal().sqrt().diag(), "full": whitener(h), "weight": torch.eye(len(h)).double()}[matrix]
    outputs = w.double() @ seen
    rows = torch.tensor(reference.greedy(outputs.T, outputs.T, 9))
    columns = torch.tensor(reference.greedy(w.double(), outputs, 9))
    expected = w.double()[:, columns] @ reference.link(w.double(), rows, columns, whitener(h)) @ w.double()[rows]
    made = cur(w, x, rank=9, selection="greedy", matrix=matrix, damping=0)
    torch.testing.assert_close(made.module.dense(torch.float64), expected, rtol=0, atol=1e-5 * float(w.abs().max()))
    if matrix == "full":  # as it comes
        assert torch.equal(cur(w, x, rank=9, damping=0).module.dense(), made.module.dense())


@pytest.mark.parametrize("choice", CHOICES, ids=lambda c: "-".join(c.values()))
@pytest.mark.parametrize("shape", [(40, 48), (48, 40), (16, 96)], ids=str)
def test_factors_are_the_weight_s_own_and_figures_are_what_they_say(shape, choice):
    w, x = weight(*shape).bfloat16().float(), inputs(300, shape[1])
    made = cur(w, x, keep_ratio=0.7, scale_dtype=torch.bfloat16, **choice)
    digits = {tuple(torch.frexp(v)[0].tolist()) for v in (*w, *w.T)}
    module = made.module
    assert all(tuple(torch.frexp(v.float())[0].tolist()) in digits for v in module.rows.weight)
    assert all(tuple(torch.frexp(v.float())[0].tolist()) in digits for v in module.columns.weight.T)
    total = float((w.double() @ x.double().T).square().sum())
    assert made.report["relative_error"] == pytest.approx(output_loss(made, w, x) / total, rel=1e-3)
    assert made.report["loss"] == pytest.approx(output_loss(made, w, x) / 300, rel=1e-3)
    h = x.double().T @ x.double()
    assert output_loss(made, w, x) > decompose(w, module.spec.rank, h).loss


def test_fit_is_the_best_for_what_it_names():
    w, x = weight(40, 48), inputs(400, 48)
    h = x.double().T @ x.double()
    made = {fit: cur(w, x, rank=10, fit=fit, damping=0) for fit in ("full", "scaled", "weight")}
    difference = {fit: w.double() - m.module.dense(torch.float64) for fit, m in made.items()}
    measures = {"full": h, "scaled": h.diagonal().diag(), "weight": torch.eye(48, dtype=torch.float64)}
    for fit, moment in measures.items():
        losses = {other: float(((d @ moment) * d).sum()) for other, d in difference.items()}
        assert losses[fit] == min(losses.values()), fit


def test_few_tokens_are_damped():
    """About as many tokens as rows: the U that fits them exactly fits nothing else."""
    w, x = weight(40, 48), inputs(500, 48)
    exact = cur(w, x[:12], rank=12, damping=0)
    damped = cur(w, x[:12], rank=12)
    assert output_loss(damped, w, x) < 0.5 * output_loss(exact, w, x)
    assert any("too few" in note for note in damped.notes)
    fewer = cur(w, x[:5], rank=12, damping=0)
    assert any("U has rank 5 of 12" in note for note in fewer.notes)
    assert torch.isfinite(fewer.module.dense()).all()


def test_layers_of_a_site_are_as_if_alone():
    x = inputs(300, 64)
    tasks = [
        layer("q", weight(64, 64, 1), CURConfig(matrix="full")),
        layer("k", weight(16, 64, 2), CURConfig(keep_ratio=0.5, matrix="full")),
        layer("v", weight(16, 64, 3), CURConfig(selection="qr", rank=3), scale_dtype=torch.float16),
    ]
    stats = statistics(x)
    before = stats[SecondMoment()].clone()
    together = compress(CUR, tasks, stats)
    assert list(together) == ["q", "k", "v"] and torch.equal(stats[SecondMoment()], before)
    for task in tasks:
        alone = compress(CUR, [task], statistics(x))[task.name]
        assert together[task.name].module.spec == alone.module.spec == CUR.plan(task.shape, task.config)
        assert together[task.name].report == alone.report
        for name, tensor in alone.module.stored().items():
            assert torch.equal(together[task.name].module.stored()[name], tensor)
            assert tensor.dtype == task.scale_dtype


def test_bias_is_kept_and_applied_once():
    w, x, bias = weight(48, 64), inputs(100, 64), torch.arange(48.0)
    module = cur(w, x, bias=bias).module
    assert torch.equal(module(torch.zeros(2, 64)), bias.expand(2, 48))


def test_without_data():
    w = weight(40, 48)
    assert CUR.statistics(CURConfig(matrix="weight", fit="weight")) == ()
    blind = cur(w, None, matrix="weight", fit="weight", rank=8)
    seeing = cur(w, inputs(300, 48), matrix="weight", fit="weight", rank=8)
    assert torch.equal(blind.module.dense(), seeing.module.dense())
    assert not blind.notes and "relative_error" not in blind.report
    unreached = compress(
        CUR, [layer("a", w, CURConfig(rank=8))], SiteStatistics(0, {SecondMoment(): torch.zeros(48, 48)})
    )
    assert any("NOT CALIBRATED" in note for note in unreached["a"].notes)


# ---- healing


def test_healing_fits_the_original_outputs_and_u_alone():
    w, original = weight(40, 48), inputs(400, 48)
    x = original + 0.3 * inputs(400, 48, seed=7)
    made = [cur(w, x, original, rank=10, heal=strength) for strength in (0.0, 0.5, 1.0)]
    wanted = original.double() @ w.double().T
    missed = [float((wanted - x.double() @ m.module.dense(torch.float64).T).square().sum()) for m in made]
    assert missed[2] < missed[1] < missed[0]
    for healed in made[1:]:
        assert torch.equal(healed.module.rows.weight, made[0].module.rows.weight)
        assert torch.equal(healed.module.columns.weight, made[0].module.columns.weight)
        assert not torch.equal(healed.module.link.weight, made[0].module.link.weight)


def test_healing_is_ridge_regression_on_the_inputs():
    w, original = weight(20, 24), inputs(300, 24)
    x = original + 0.3 * inputs(300, 24, seed=7)
    made = cur(w, x, original, rank=6, heal=1.0, damping=0.05)
    ridge = (0.05 * x.double().square().sum() / 24).sqrt()
    seen = torch.cat([x.double(), ridge * torch.eye(24, dtype=torch.float64)])  # tokens, and the ridge as more tokens
    wanted = torch.cat([original.double(), ridge * torch.eye(24, dtype=torch.float64)]) @ w.double().T
    rows, columns = made.module.rows.weight.double(), made.module.columns.weight.double()
    design = torch.einsum("tj,oi->toij", seen @ rows.T, columns).reshape(-1, 36)
    expected = torch.linalg.lstsq(design, wanted.reshape(-1)).solution.reshape(6, 6)
    torch.testing.assert_close(made.module.link.weight.double(), expected, rtol=1e-4, atol=1e-5)


def test_where_teacher_and_student_see_the_same_there_is_nothing_to_heal():
    w, x = weight(40, 48), inputs(400, 48)
    plain, healed = cur(w, x, rank=10), cur(w, x, x, rank=10, heal=1.0)
    assert torch.equal(plain.module.link.weight, healed.module.link.weight)


# ---- ranks and bytes


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.8, 0.95])
@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("shape", [(64, 64), (16, 64), (160, 64), (64, 160)], ids=str)
def test_factors_take_what_is_kept_and_no_more(shape, keep, multiple):
    spec = CUR.plan(LayerShape("a", *shape), CURConfig(keep_ratio=keep, rank_multiple=multiple))
    assert isinstance(spec, CURSpec)
    out, n = shape
    assert spec.rank % multiple == 0
    assert spec.nbytes("BF16") == 2 * spec.rank * (out + n + spec.rank)
    assert spec.nbytes("BF16") <= keep * 2 * out * n or spec.rank == multiple


def test_limits_and_multiples_of_ranks():
    shape = LayerShape("a", 640, 256)
    assert CUR.plan(shape, CURConfig(rank=9, keep_ratio=0.5)).rank == 9
    assert CUR.plan(shape, CURConfig(rank=9, rank_multiple=4)).rank == 8
    assert CUR.plan(shape, CURConfig(keep_ratio=0.9, max_rank=50)).rank == 50
    assert CUR.plan(shape, CURConfig(keep_ratio=0.1, min_rank=40)).rank == 40
    assert CUR.plan(shape, CURConfig(keep_ratio=0.9, max_rank=50, rank_multiple=16)).rank == 48
    assert CUR.fitted(CURConfig(rank_multiple=6), 16).rank_multiple == 48


def test_a_rank_that_saves_nothing_is_refused_with_the_next_best():
    shape = LayerShape("blocks.3.k", 1024, 4096)
    assert CUR.plan(shape, CURConfig(rank=718)).rank == 718
    with pytest.raises(RecipeError, match=r"^blocks\.3\.k: rank=719 would hold 1\.0. times .* use rank=718 or less"):
        CUR.plan(shape, CURConfig(rank=719))
    with pytest.raises(RecipeError, match=r"use rank=640 or less"):
        CUR.plan(shape, CURConfig(rank=800, rank_multiple=128))
    kept = CUR.plan(LayerShape("a", 64, 64), CURConfig(keep_ratio=0.3, rank_multiple=32))
    assert isinstance(kept, Kept) and "rank 32 would hold" in kept.reason
    assert isinstance(CUR.plan(LayerShape("a", 2, 2), CURConfig(rank=1)), Kept)
    with pytest.raises(RecipeError, match="not for tables"):
        CUR.plan(LayerShape("a", 64, 64, "embedding"), CURConfig())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "greater than or equal to 1"),
        ({"keep_ratio": 1.0}, "less than 1"),
        ({"rank": 4, "energy": 0.9}, "two ways to set a rank"),
        ({"min_rank": 9, "max_rank": 8}, "above max_rank"),
        ({"heal": 0.5, "fit": "weight"}, "needs fit=full"),
        ({"selection": "greedy", "matrix": "wanda"}, "use selection=deim for matrix=wanda"),
        ({"selection": "random"}, "'greedy', 'deim' or 'qr'"),
        ({"n_blocks": 0}, "greater than or equal to 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        CURConfig(**settings)


def test_nan_names_the_layer():
    w, x = weight(40, 48), inputs(300, 48)
    stats = statistics(x)
    stats.values[SecondMoment()][3, 3] = math.nan
    with pytest.raises(NumericsError, match=r"^a: cur: the second moment .* NaN"):
        compress(CUR, [layer("a", w, CURConfig())], stats)
    w[0, 0] = math.nan
    with pytest.raises(NumericsError, match=r"^a: 1 of 1920 weights are NaN"):
        cur(w, x)


def test_weights_of_the_range_s_ends_fit_float16():
    """Columns of 10^-4 and rows that sum to thousands: scaled, all three factors stay in range."""
    w = weight(40, 48) * torch.logspace(-3, 2, 48)
    made = cur(w, inputs(300, 48), rank=12, scale_dtype=torch.float16)
    single = cur(w, inputs(300, 48), rank=12)
    assert made.report["relative_error"] == pytest.approx(single.report["relative_error"], rel=0.02)
    assert all(1e-4 < float(t.abs().amax()) < 100 for t in made.module.stored().values())


# ---- which blocks, which ranks


def test_angular_distance():
    one = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    turned = torch.tensor([[0.0, 3.0], [1.0, 0.0]])
    assert angular_distances([one, one * 5, turned, -turned]) == pytest.approx([0.0, 0.5, 1.0])


def _view(angles: list[float], names: dict[str, int | None]):
    """States turned by so much of half a turn at each block."""
    at, states = 0.0, [torch.tensor([[1.0, 0.0]])]
    for angle in angles:
        at += angle * math.pi
        states.append(torch.tensor([[math.cos(at), math.sin(at)]]))
    notes: list[str] = []
    return SimpleNamespace(
        blocks=names,
        n_blocks=len(angles),
        states=lambda: iter(states),
        sites=lambda: pytest.fail("no rank is open"),
        remember=lambda key, make: make(),
        note=notes.append,
        notes=notes,
    )


def test_blocks_that_turn_least_are_compressed():
    names = {f"b{i}.{n}": i for i in range(6) for n in ("q", "k")} | {"lm_head": None}
    view = _view([0.01, 0.3, 0.1, 0.2, 0.4, 0.0], names)
    configs = {name: CURConfig(n_blocks=2, rank=3) for name in names}
    settled = settle(view, configs)
    assert settled.keys() == configs.keys()
    compressed = {name for name, choice in settled.items() if not isinstance(choice, Kept)}
    assert compressed == {"b2.q", "b2.k", "b3.q", "b3.k"}  # never the first or the last, which turn less
    assert settled["b2.q"] == CURConfig(rank=3)
    assert "blocks 2, 3" in settled["b1.q"].reason and "0.1000, 0.2000" in view.notes[0]
    del configs["b2.q"], configs["b2.k"]
    settled = settle(view, configs)  # among the blocks with layers of the step
    assert {n for n, c in settled.items() if not isinstance(c, Kept)} == {"b3.q", "b3.k", "b1.q", "b1.k"}


def test_more_blocks_than_can_be_chosen_are_refused():
    names: dict[str, int | None] = {f"b{i}.q": i for i in range(6)}
    with pytest.raises(RecipeError, match=r"n_blocks=5, but 4 blocks can be chosen: .* use n_blocks=4 or less"):
        settle(_view([0.1] * 6, names), {name: CURConfig(n_blocks=5) for name in names})
    configs = {name: CURConfig(n_blocks=1 + (name == "b1.q")) for name in names}
    with pytest.raises(RecipeError, match=r"one number for all layers of a step, not \[1, 2\]"):
        settle(_view([0.1] * 6, names), configs)


@pytest.mark.parametrize("matrix", ["scaled", "full", "wanda", "weight"])
def test_energy_is_the_least_rank_that_holds_it(matrix):
    w, x = weight(40, 48) @ torch.diag(torch.logspace(0, -2, 48)), inputs(400, 48)
    h = x.double().T @ x.double()
    m = {
        "scaled": w.double() * h.diagonal().sqrt(),
        "full": w.double() @ whitener(h),
        "wanda": w.double().abs() * h.diagonal().sqrt(),
        "weight": w.double(),
    }[matrix]
    energies = torch.linalg.svdvals(m).square()
    config = CURConfig(energy=0.8, matrix=matrix, selection="deim")
    task = layer("a", w, config)
    view = SimpleNamespace(sites=lambda: iter([(SimpleNamespace(layers=(task,)), statistics(x))]))
    rank = settle(view, {"a": config})["a"].rank
    assert energies[:rank].sum() >= 0.8 * energies.sum() > energies[: rank - 1].sum()
    multiple = settle(view, {"a": config.model_copy(update={"rank_multiple": 4})})
    task_4 = layer("a", w, config.model_copy(update={"rank_multiple": 4}))
    assert multiple["a"].rank == math.ceil(rank / 4) * 4 and CUR.plan(task_4.shape, multiple["a"]).rank % 4 == 0


def test_energy_that_saves_nothing_keeps_the_layer():
    w, x = weight(40, 48), inputs(400, 48)
    config = CURConfig(energy=0.999, matrix="weight")
    view = SimpleNamespace(sites=lambda: iter([(SimpleNamespace(layers=(layer("a", w, config),)), statistics(x))]))
    kept = settle(view, {"a": config})["a"]
    assert isinstance(kept, Kept) and "energy=0.999 needs rank" in kept.reason


# ---- on real models


@pytest.fixture(scope="module")
def real(shipped_model, shipped_tokenizer, root) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight and inputs of a few layers of the model that ships, on its calibration text."""
    from compress.checkpoint.load import load

    model = load(shipped_model, dtype=torch.float32)
    ids = shipped_tokenizer(
        (root / "compress/data/calibration.txt").read_text()[:60_000], return_tensors="pt"
    ).input_ids
    seen: dict[str, Tensor] = {}
    names = [f"model.layers.2.{n}" for n in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj")]
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.__setitem__(name, args[0].flatten(0, 1))
        )
    with torch.no_grad():
        model(ids[0, :4096].reshape(16, 256))
    return {name: (model.get_submodule(name).weight.detach(), seen[name]) for name in names}


def test_on_real_layers_each_improvement_improves(real):
    """U for the outputs, DEIM in the outputs, greedy selection; none beats the truncated SVD at equal rank."""
    for name, (w, x) in real.items():
        h = x.double().T @ x.double()
        losses = {
            "paper": output_loss(cur(w, x, selection="deim", matrix="wanda", fit="weight"), w, x),
            "scaled": output_loss(cur(w, x, selection="deim", matrix="scaled", fit="scaled"), w, x),
            "deim": output_loss(cur(w, x, selection="deim", matrix="scaled"), w, x),
            "default": output_loss(cur(w, x), w, x),
        }
        rank = CUR.plan(LayerShape(name, *w.shape), CURConfig()).rank
        assert decompose(w, rank, h).loss < losses["default"] < losses["deim"] < losses["scaled"], name
        assert losses["deim"] < losses["paper"], name


def test_bfloat16_loses_nothing_on_real_layers(real):
    for w, x in real.values():
        single, half = cur(w, x), cur(w, x, scale_dtype=torch.bfloat16)
        assert half.report["relative_error"] == pytest.approx(single.report["relative_error"], rel=1e-2)
        assert half.report["largest_link"] < 100


def test_blocks_and_ranks_of_a_model_are_settled_and_reported(tmp_path: Path, text: Path):
    from compress.checkpoint.load import load
    from compress.pipeline.run import run

    save_tiny("llama", tmp_path / "model")
    step = {"cur": {"energy": 0.7, "n_blocks": 1, "heal": 1.0}, "layers": ["*.q_proj", "*.gate_proj"]}
    result = run(recipe_for(tmp_path / "model", [step], text), tmp_path / "out")
    names = [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.gate_proj",
    ]  # of three blocks, the one in the middle
    assert list(result.plan.layers) == names
    assert any("n_blocks=1: blocks 1 turn" in warning for warning in result.report["warnings"])
    loaded = load(tmp_path / "out")
    for name in names:
        module, planned = loaded.get_submodule(name), result.plan.layers[name].spec
        assert module.spec == planned and isinstance(planned, CURSpec)
    figures = {found["name"]: found["figures"] for found in result.report["layers"]}
    assert all(0 < figures[name]["relative_error"] < 1 for name in names)


def test_more_blocks_than_a_model_has_end_the_run_before_it_begins(tmp_path: Path, text: Path):
    from compress.pipeline.run import run

    save_tiny("llama", tmp_path / "model")
    with pytest.raises(RecipeError, match="n_blocks=2, but 1 blocks can be chosen"):
        run(recipe_for(tmp_path / "model", [{"cur": {"n_blocks": 2}}], text), tmp_path / "out")
