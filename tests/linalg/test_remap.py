"""Factors in 8 bits: near to what they were, symmetric, and never worse for being refitted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.errors import NumericsError
from compress.linalg import remap
from compress.linalg.remap import product_svd, rounded_vectors
from compress.modules.remapped import RemappedLinear
from compress.modules.remapped_spec import RemappedSpec

SHAPES = [(96, 64), (64, 96), (64, 64)]


def factors(out_features: int, in_features: int, rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    mix = torch.randn(rank, rank, generator=generator, dtype=torch.float64)  # any factors of the same product
    return u[:, :rank] * s[:rank] @ mix, torch.linalg.solve(mix, vh[:rank])


def built(left: Tensor, right: Tensor, dtype=torch.float32, moment: Tensor | None = None) -> RemappedLinear:
    spec = RemappedSpec(right.shape[1], left.shape[0], left.shape[1])
    return RemappedLinear(spec, remap.remap(left, right, dtype, moment))


def moment(n: int) -> Tensor:
    x = torch.randn(4 * n, n, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return (x * torch.logspace(-2, 2, n, dtype=torch.float64)).T @ (x * torch.logspace(-2, 2, n, dtype=torch.float64))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_full_rank_is_the_weight_to_eight_bits(shape, dtype):
    left, right = factors(*shape, min(shape))
    weight = left @ right
    assert (built(left, right, dtype).dense(torch.float32) - weight).norm() < 0.01 * weight.norm()


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_a_transpose_is_stored_as_the_transpose(shape):
    left, right = factors(*shape, 20)
    one, other = built(left, right), built(right.T, left.T)
    assert one.nbytes == other.nbytes
    torch.testing.assert_close(one.dense(torch.float32), other.dense(torch.float32).T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_refit_takes_up_what_rounding_did(shape, monkeypatch):
    for rank in (10, min(shape)):
        left, right = factors(*shape, rank)
        fitted = (built(left, right).dense(torch.float32) - left @ right).norm()
        with monkeypatch.context() as patched:
            patched.setattr(remap, "refitted_left", lambda left, right, changed, moment, damping: left)
            plain = (built(left, right).dense(torch.float32) - left @ right).norm()
        assert fitted < plain


def test_inputs_that_are_known_are_refitted_for():
    left, right = factors(96, 64, 24)
    hessian = moment(64)

    def loss(module: RemappedLinear) -> float:
        difference = module.dense(torch.float32).double() - left @ right
        return float((difference @ hessian * difference).sum())

    assert loss(built(left, right, moment=hessian)) < loss(built(left, right))


def test_codes_fit_the_scale_as_it_is_stored():
    vectors = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    codes, scale = rounded_vectors(vectors, torch.bfloat16)
    assert codes.dtype == torch.int8 and scale.dtype == torch.bfloat16
    error = (codes.double() * scale.double() - vectors).abs()
    assert (error <= scale.double() * (0.5 + 127 * 2**-8)).all()  # the largest may be cut by the scale's rounding
    assert (error.sort(dim=0).values[:-1] <= scale.double() / 2 * (1 + 1e-9)).all()
    negative, _ = rounded_vectors(-vectors, torch.bfloat16)
    assert (negative == -codes).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_vectors_of_zeros_stay_zeros(shape):
    codes, scale = rounded_vectors(torch.zeros(5, 3, dtype=torch.float64), torch.float16)
    assert not codes.any() and not scale.any()
    left, right = torch.zeros(shape[0], 4), torch.zeros(4, shape[1])
    assert not built(left, right).dense().any()
    left[:, 0], right[0] = 1, 1  # of rank 1 in truth
    torch.testing.assert_close(built(left, right).dense(torch.float32), left @ right, rtol=0.01, atol=0)


def test_the_products_decomposition_without_the_product():
    left, right = factors(30, 20, 7)
    u, sigma, v = product_svd(left, right)
    torch.testing.assert_close((u * sigma) @ v.T, left @ right)
    torch.testing.assert_close(sigma, torch.linalg.svdvals(left @ right)[:7])
    torch.testing.assert_close(u.T @ u, torch.eye(7, dtype=torch.float64))


def test_what_is_not_finite_is_refused():
    left, right = factors(30, 20, 7)
    left[0, 0] = float("nan")
    with pytest.raises(NumericsError):
        remap.remap(left, right, torch.float32)
