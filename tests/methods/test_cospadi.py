from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.errors import NumericsError, RecipeError
from compress.methods.base import Kept, LayerShape, Outcome, SiteTask
from compress.methods.cospadi import CoSpaDi, CoSpaDiConfig, Member
from compress.methods.cospadi_shared import arranged
from compress.methods.cospadi_sizes import nbytes_of, sizes_of
from compress.methods.svd import SVD, SVDConfig
from compress.modules.dictionary_spec import DictionarySpec
from tests.methods.layers import compress, inputs, layer, statistics, weight

OUT, IN = 48, 32


def coded(matrix: Tensor, x: Tensor | None, dtype: torch.dtype = torch.float32, **settings) -> Outcome:
    task = layer("b.0.q", matrix, CoSpaDiConfig(**{"damping": 0.0, **settings}), scale_dtype=dtype)
    return compress(CoSpaDi, [task], None if x is None else statistics(x))["b.0.q"]


def truncated(matrix: Tensor, x: Tensor, **settings) -> Outcome:
    task = layer("b.0.q", matrix, SVDConfig(**settings), scale_dtype=torch.float32)
    return compress(SVD, [task], statistics(x))["b.0.q"]


@pytest.mark.parametrize("settings", [{}, {"engine": "ksvd", "rounds": 3}, {"rho": 3.0}, {"atoms": 20, "rho": 1.5}])
def test_reported_errors_are_those_of_what_is_stored(settings):
    matrix, x = weight(OUT, IN), inputs(300, IN)
    outcome = coded(matrix, x, **settings)
    error = ((matrix - outcome.module.dense()) @ x.T).square().sum() / (matrix @ x.T).square().sum()
    assert outcome.report["relative_error"] == pytest.approx(float(error), rel=1e-3)
    assert outcome.report["code_error"] == pytest.approx(float(error), rel=2e-2)
    assert outcome.module.spec == CoSpaDi.plan(LayerShape("b.0.q", OUT, IN), CoSpaDiConfig(**settings))
    assert (outcome.module.leaves()["codes"].mask.sum(1) == int(outcome.report["kept"])).all() and not outcome.notes


@pytest.mark.parametrize("ratio", [0.9, 0.7])
def test_loses_less_than_truncation_of_equal_bytes_and_ksvd_less_than_orthogonal(ratio):
    matrix, x = weight(OUT, 8, seed=3) @ weight(8, IN, seed=4) * 20 + weight(OUT, IN), inputs(300, IN)
    orthogonal, ksvd = (
        coded(matrix, x, keep_ratio=ratio, engine=e).report["relative_error"] for e in ("orthogonal", "ksvd")
    )
    assert ksvd < orthogonal < truncated(matrix, x, keep_ratio=ratio).report["relative_error"]


@pytest.mark.parametrize("engine", ["orthogonal", "ksvd"])
def test_every_atom_for_every_output_is_truncation(engine):
    matrix, x = weight(OUT, IN), inputs(300, IN)
    found = coded(matrix, x, rho=1.0, atoms=10, engine=engine)
    best = truncated(matrix, x, rank=10).report["relative_error"]
    assert best <= found.report["relative_error"] * (1 + 1e-5) and found.report["relative_error"] < 1.001 * best
    assert found.module.nbytes == 4 * 10 * (OUT + IN)


def test_rounding_is_made_good_by_the_coefficients():
    matrix, x = weight(OUT, IN), inputs(300, IN)
    x[:, 0] *= 100  # an input so large that rounding of its weights is what is lost
    refit, plain = (coded(matrix, x, torch.bfloat16, refit=refit).report["relative_error"] for refit in (True, False))
    assert refit < plain
    assert refit < 3 * coded(matrix, x).report["relative_error"]


def test_dead_inputs_few_tokens_and_none_at_all():
    matrix, x = weight(OUT, IN), inputs(300, IN)
    x[:, 3] = 0
    found = coded(matrix, x)
    assert "damping raised" in found.notes[0] and torch.isfinite(found.module.dense()).all()
    assert "calibrated on 12 tokens for 32 inputs" in coded(matrix, inputs(12, IN), damping=0.01).notes[0]
    for known in (None, torch.zeros(0, IN)):
        alone = coded(matrix, known)
        assert alone.notes[0].startswith("NOT CALIBRATED") and alone.report["weight_error"] < 0.5
    matrix[5] = 0
    assert not coded(matrix, x).module.dense()[5].any()
    assert not coded(torch.zeros(OUT, IN), x).module.dense().any()


def test_what_cannot_be_stored_or_computed_is_named():
    with pytest.raises(NumericsError, match="b.0.q: cospadi: dictionary or codes overflow torch.float16"):
        coded(weight(OUT, IN) * 1e8, inputs(300, IN), torch.float16)
    x = inputs(20, IN)
    x[3, 3] = torch.inf
    with pytest.raises(NumericsError, match="b.0.q: cospadi"):
        coded(weight(OUT, IN), x)
    with pytest.raises(NumericsError, match="b.0.q"):
        coded(weight(OUT, IN) * torch.nan, inputs(20, IN))


def test_tells_of_rounds_and_error():
    told: list[str] = []
    task = layer("b.0.q", weight(OUT, IN), CoSpaDiConfig(rounds=2))
    CoSpaDi.compress(SiteTask("site", (task,), told.append), statistics(inputs(300, IN)), torch.Generator())
    assert [line.split(", error 0.")[0] for line in told] == [f"b.0.q: round {i}" for i in range(3)]


# ---- sizes


@pytest.mark.parametrize("shape", [(64, 64), (4096, 4096), (12288, 4096), (1024, 4096), (4096, 14336), (128, 256)])
@pytest.mark.parametrize("ratio", [0.95, 0.8, 0.45])
@pytest.mark.parametrize("settings", [{}, {"rho": 3.0}, {"rho": 1.0}, {"engine": "ksvd"}, {"atoms_multiple": 16}])
def test_bytes_are_spent_and_not_more(shape, ratio, settings):
    layer_shape, config = LayerShape("l", *shape), CoSpaDiConfig(keep_ratio=ratio, **settings)
    for members in (1, 4):
        k, s = sizes_of(layer_shape, config, members)
        budget, spent = ratio * 2 * shape[0] * shape[1] * members, nbytes_of(layer_shape, k, s, members)
        one_more = 2 * max(shape[0] * members, shape[1]) * (1 if config.rho > 1 else 3)
        assert spent <= budget and (budget - spent < one_more or s == k - 1)
        assert k % config.atoms_multiple == 0 and (s < k or config.rho == 1)
        assert config.engine == "ksvd" or k <= shape[1]


def test_the_papers_example_and_the_cap():
    k, s = sizes_of(LayerShape("l", 12288, 4096), CoSpaDiConfig(keep_ratio=0.8, engine="ksvd"))
    assert abs(k - 3657) <= 4 and abs(s - 1828) <= 2
    assert sizes_of(LayerShape("l", 12288, 4096), CoSpaDiConfig(keep_ratio=0.95))[0] == 4096
    capped = sizes_of(LayerShape("l", 14336, 1024), CoSpaDiConfig(keep_ratio=0.9))
    assert capped[0] == 1024 and capped[1] > 512


@pytest.mark.parametrize(
    ("shape", "settings", "said"),
    [
        (
            (64, 64),
            {"keep_ratio": 0.02},
            r"keep_ratio=0.02 is 163 bytes, less than 2 atoms take \(640\); use at least 0.0782",
        ),
        ((64, 32), {"atoms": 40}, "atoms=40 is more than in_features=32; use at most 32, or engine: ksvd"),
        ((24, 32), {"atoms": 40}, "atoms=40 is more than out_features=24; use at most 24$"),
        ((64, 32), {"atoms": 80, "engine": "ksvd"}, "atoms=80 is more than out_features=64; use at most 64$"),
        ((64, 32), {"atoms_multiple": 64}, "needs atoms in multiples of 64, and 32 are the most"),
    ],
)
def test_what_the_format_cannot_express_is_refused_with_what_it_can(shape, settings, said):
    with pytest.raises(RecipeError, match=said):
        CoSpaDi.plan(LayerShape("b.0.q", *shape), CoSpaDiConfig(**settings))
    if "at least" in said:
        CoSpaDi.plan(LayerShape("b.0.q", *shape), CoSpaDiConfig(keep_ratio=float(said.rpartition(" ")[2])))


def test_tables_are_refused_layers_that_would_grow_are_kept_and_settings_checked():
    with pytest.raises(RecipeError, match="for linears, not for tables"):
        CoSpaDi.plan(LayerShape("table", 64, 64, "embedding"), CoSpaDiConfig())
    kept = CoSpaDi.plan(LayerShape("q", 64, 64), CoSpaDiConfig(atoms=60, rho=1.2))
    assert isinstance(kept, Kept) and "60 atoms, 50 per output, would take" in kept.reason
    for wrong in ({"rho": 0.5}, {"keep_ratio": 1.0}, {"engine": "mod"}, {"start": "columns"}, {"share": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            CoSpaDiConfig(**wrong)


# ---- sharing


def shapes(*sizes: tuple[int, int]) -> dict[str, LayerShape]:
    return {
        name: LayerShape(name, *size) for name, size in zip([f"m.{i}.q" for i in range(len(sizes))], sizes, strict=True)
    }


def test_windows_of_blocks_share_and_the_first_stores():
    layers = shapes(*[(64, 64)] * 5) | {"head": LayerShape("head", 100, 64)}
    found = arranged(layers, {name: CoSpaDiConfig(share=2) for name in layers})
    assert [getattr(config, "members", None) for config in found.values()] == [
        ("m.0.q", "m.1.q"), ("m.0.q", "m.1.q"), ("m.2.q", "m.3.q"), ("m.2.q", "m.3.q"), None, None
    ]  # fmt: skip
    assert arranged(layers, found) == found
    specs = {name: CoSpaDi.plan(layers[name], config) for name, config in found.items()}
    assert [spec.shared for spec in specs.values() if isinstance(spec, DictionarySpec)] == [
        None, "m.0.q", None, "m.2.q", None, None
    ]  # fmt: skip
    pair = specs["m.0.q"].nbytes("BF16") + specs["m.1.q"].nbytes("BF16")
    assert 0.99 * 0.8 * 4 * 64 * 64 < pair <= 0.8 * 4 * 64 * 64
    assert specs["m.0.q"].rank > specs["m.4.q"].rank
    assert [CoSpaDi.observes(config) for config in found.values()] == [True] * 4 + [False] * 2


def test_layers_that_differ_cannot_share():
    layers = shapes((64, 64), (32, 64))
    with pytest.raises(
        RecipeError, match="m.1.q is 32 x 64, and m.0.q, whose dictionary it would share, 64 x 64; use share: 1"
    ):
        arranged(layers, {name: CoSpaDiConfig(share=2) for name in layers})
    layers = shapes((64, 64), (64, 64))
    with pytest.raises(RecipeError, match="rho is 3.0 for m.1.q and 2.0 for m.0.q, but layers that share"):
        arranged(layers, {"m.0.q": CoSpaDiConfig(share=2), "m.1.q": CoSpaDiConfig(share=2, rho=3)})


def test_a_members_settings_go_back_to_what_a_recipe_says():
    config = Member(share=2, members=("m.0.q", "m.1.q"))
    assert CoSpaDiConfig(**config.model_dump(exclude={"members"})) == CoSpaDiConfig(share=2)
    assert "members" not in CoSpaDiConfig.model_fields
