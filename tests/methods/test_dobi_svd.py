"""Dobi-SVD: what is planned and stored, the factors, and the errors. How ranks are learned: test_dobi_svd_ranks.py."""

from __future__ import annotations

import pytest
import torch

from compress.calibration.statistics import Sample, SecondMoment, SiteStatistics
from compress.errors import NumericsError, RecipeError
from compress.linalg.incremental_pca import IncrementalPCA, output_basis
from compress.linalg.low_rank import decompose
from compress.methods.base import Kept, LayerShape
from compress.methods.dobi_svd import IPCA_TOKENS, DobiSVD, DobiSVDConfig
from compress.methods.svd import SVD, SVDConfig
from compress.modules.low_rank_spec import LowRankSpec
from compress.modules.remapped import RemappedLinear
from compress.modules.remapped_spec import RemappedSpec
from tests.methods.layers import compress, inputs, layer, statistics, weight

SHAPES = [(96, 64), (64, 96), (64, 64), (1024, 4096), (14336, 4096)]


def outcome(config: DobiSVDConfig, out_features: int = 48, n: int = 64, n_tokens: int = 400, **fields):
    found = compress(DobiSVD, [layer("l", weight(out_features, n), config, **fields)], statistics(inputs(n_tokens, n)))
    return found["l"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("remap", [True, False])
@pytest.mark.parametrize("ratio", [0.2, 0.29, 0.8, 0.95])
def test_the_ratio_is_one_of_bytes(shape, remap, ratio):
    """Also for grouped keys and values, and with the paper's formulas within rounding."""
    out_features, in_features = shape
    spec = DobiSVD.plan(LayerShape("l", *shape), DobiSVDConfig(keep_ratio=ratio, remap=remap))
    dense = 2 * out_features * in_features
    step = spec.nbytes("BF16") // spec.rank
    assert ratio * dense - step < spec.nbytes("BF16") <= ratio * dense
    if remap:
        assert isinstance(spec, RemappedSpec) and step == 2 * max(shape) + 4
        assert abs(spec.rank / min(shape) - ratio) < 1 / min(shape) + 2 / max(shape)
    else:
        assert isinstance(spec, LowRankSpec) and step == 2 * sum(shape)


def test_what_cannot_be_is_refused_in_the_plan():
    shape = LayerShape("layers.0.k_proj", 32, 64)
    with pytest.raises(
        RecipeError, match=r"^layers.0.k_proj: keep_ratio=0.01 is 40 bytes, less than rank 1 takes \(132\)"
    ):
        DobiSVD.plan(shape, DobiSVDConfig(keep_ratio=0.01))
    with pytest.raises(RecipeError, match=r"rank=33, but full rank is 32"):
        DobiSVD.plan(shape, DobiSVDConfig(rank=33))
    with pytest.raises(RecipeError, match="not for tables"):
        DobiSVD.plan(LayerShape("embed", 32, 64, "embedding"), DobiSVDConfig())
    with pytest.raises(ValueError, match="rank"):
        DobiSVDConfig(rank=0)
    least = DobiSVD.plan(shape, DobiSVDConfig(keep_ratio=0.0323))  # what the error says works
    assert isinstance(least, RemappedSpec) and least.rank == 1


def test_factors_that_would_be_no_smaller_are_not_made():
    shape = LayerShape("l", 64, 64)
    assert isinstance(DobiSVD.plan(shape, DobiSVDConfig(rank=32, remap=False)), Kept)
    assert isinstance(DobiSVD.plan(shape, DobiSVDConfig(rank=64)), Kept)  # scales come on top
    assert isinstance(DobiSVD.plan(shape, DobiSVDConfig(rank=31, remap=False)), LowRankSpec)
    assert isinstance(DobiSVD.plan(shape, DobiSVDConfig(rank=62)), RemappedSpec)


def test_a_later_step_has_its_groups():
    config = DobiSVD.fitted(DobiSVDConfig(remap=False, rank_multiple=2), 16)
    assert config.rank_multiple == 16
    assert DobiSVD.plan(LayerShape("l", 64, 128), config).rank == 32
    assert DobiSVD.fitted(DobiSVDConfig(), 16) == DobiSVDConfig()  # of remapped layers the whole weight is taken


@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (48, 48)])
def test_without_remap_it_is_whitened_svd(shape):
    own = outcome(DobiSVDConfig(rank=12, remap=False), *shape, scale_dtype=torch.float32)
    layers = [layer("l", weight(*shape), SVDConfig(rank=12), scale_dtype=torch.float32)]
    other = compress(SVD, layers, statistics(inputs(400, shape[1])))["l"]
    torch.testing.assert_close(own.module.dense(), other.module.dense())
    assert own.report["relative_error"] == pytest.approx(other.report["relative_error"])


@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (48, 48)])
def test_the_loss_is_the_sum_of_the_energies_left_out(shape):
    found = decompose(weight(*shape), 12, statistics(inputs(400, shape[1]))[SecondMoment()])
    own = outcome(DobiSVDConfig(rank=12, remap=False), *shape, scale_dtype=torch.float32)
    assert own.report["loss"] * 400 == pytest.approx(found.loss, rel=1e-3)
    remapped = outcome(DobiSVDConfig(rank=12), *shape, scale_dtype=torch.float32)
    assert own.report["loss"] <= remapped.report["loss"] <= 1.01 * own.report["loss"]  # 8 bits cost next to nothing


def test_full_rank_is_the_weight():
    own = outcome(DobiSVDConfig(rank=46), 48, 64, scale_dtype=torch.float32)  # the most that is smaller than the weight
    assert own.report["weight_error"] < 0.05
    basis = decompose(weight(48, 64), 48, statistics(inputs(400, 64))[SecondMoment()]).basis
    torch.testing.assert_close(basis @ basis.T @ weight(48, 64).double(), weight(48, 64).double())


@pytest.mark.parametrize("remap", [True, False])
@pytest.mark.parametrize("shape", [(48, 64), (64, 48)])
def test_stored_as_planned_with_its_bias(shape, remap):
    config = DobiSVDConfig(rank=9, remap=remap)
    own = outcome(config, *shape, bias=torch.arange(float(shape[0])))
    assert own.module.spec == DobiSVD.plan(LayerShape("l", *shape), config)
    assert own.module.nbytes == own.module.spec.nbytes("BF16")
    assert (own.module(torch.zeros(1, shape[1], dtype=torch.bfloat16)) == torch.arange(float(shape[0]))).all()


def ipca_statistics(n_tokens: int, n: int) -> SiteStatistics:
    x = inputs(n_tokens, n)
    return SiteStatistics(n_tokens, {SecondMoment(): x.T @ x, Sample(IPCA_TOKENS): x})


def test_the_closed_form_is_never_worse_than_incremental_pca():
    for shape in [(48, 64), (64, 48)]:
        for rank in (4, 16, 40):
            losses = {}
            for update in ("closed_form", "ipca"):
                config = DobiSVDConfig(rank=rank, update=update, remap=rank > 24)
                single = layer("l", weight(*shape), config, scale_dtype=torch.float32)
                found = compress(DobiSVD, [single], ipca_statistics(1024, shape[1]))["l"]
                losses[update] = found.report["loss"]
            assert losses["closed_form"] <= losses["ipca"] * (1 + 1e-6)
    assert {type(r) for r in DobiSVD.statistics(DobiSVDConfig(update="ipca"))} == {SecondMoment, Sample}


def test_incremental_pca_of_one_batch_is_pca():
    rows = inputs(60, 12).double()
    whole, split = IncrementalPCA(12), IncrementalPCA(12)
    whole.add(rows)
    for batch in rows.split(20):
        split.add(batch)
    centred = rows - rows.mean(0)
    for found in (whole, split):  # nothing is dropped at full width, so the batches do not matter
        torch.testing.assert_close(found.mean, rows.mean(0))
        torch.testing.assert_close(found.values, torch.linalg.svdvals(centred))
        torch.testing.assert_close(found.components.T * found.values.square() @ found.components, centred.T @ centred)


def test_incremental_pca_needs_tokens():
    assert output_basis(weight(48, 64), inputs(5, 64), 4) is None
    with pytest.raises(NumericsError, match=r"^l: dobi_svd: update=ipca: 5 tokens are too few for rank 4"):
        compress(DobiSVD, [layer("l", weight(48, 64), DobiSVDConfig(rank=4, update="ipca"))], ipca_statistics(5, 64))
    basis = output_basis(weight(48, 64), inputs(512, 64), 48)
    torch.testing.assert_close(basis.T @ basis, torch.eye(48, dtype=torch.float64))


def test_fewer_tokens_than_inputs_and_none_at_all():
    x = torch.cat([inputs(40, 8), torch.zeros(40, 56)], dim=1)
    single = layer("l", weight(48, 64), DobiSVDConfig(rank=20), scale_dtype=torch.float32)
    few = compress(DobiSVD, [single], statistics(x))["l"]
    assert any("too few to know them all" in note for note in few.notes)
    assert any("reach 8 directions of the outputs; the other 12" in note for note in few.notes)
    assert few.report["relative_error"] < 1e-4
    none = SiteStatistics(0, {SecondMoment(): torch.zeros(64, 64)})
    found = compress(DobiSVD, [layer("l", weight(48, 64), DobiSVDConfig(rank=20))], none)["l"]
    assert "NOT CALIBRATED" in found.notes[0] and "loss" not in found.report


def test_what_is_not_finite_names_the_layer():
    bad = weight(48, 64)
    bad[1, 2] = float("nan")
    with pytest.raises(NumericsError, match="^l: 1 of 3072 weights are NaN"):
        compress(DobiSVD, [layer("l", bad, DobiSVDConfig(rank=4))], statistics(inputs(100, 64)))
    x = inputs(100, 64)
    x[3, 3] = float("inf")
    with pytest.raises(NumericsError, match="^l: dobi_svd: the second moment"):
        compress(DobiSVD, [layer("l", weight(48, 64), DobiSVDConfig(rank=4))], statistics(x))
    with pytest.raises(NumericsError, match=r"^l: dobi_svd: its factors overflow torch.float16"):
        huge = layer("l", 1e7 * weight(96, 64), DobiSVDConfig(rank=4), scale_dtype=torch.float16)
        compress(DobiSVD, [huge], statistics(inputs(100, 64)))


def test_a_weight_of_zeros_stays_zero():
    for remap in (True, False):
        single = layer("l", torch.zeros(48, 64), DobiSVDConfig(rank=4, remap=remap))
        found = compress(DobiSVD, [single], statistics(inputs(100, 64)))["l"]
        assert isinstance(found.module, RemappedLinear) == remap and not found.module.dense().any()
        assert found.report["relative_error"] == 0
