"""The compiled Hadamard transform equals the product with the matrix, on every instruction set."""

from __future__ import annotations

import math

import pytest
import torch

from compress.kernels import native
from compress.kernels.ops import hadamard_transform
from compress.linalg.hadamard import hadamard, transformed
from compress.linalg.hadamard_orders import factors

ABSENT = native.absent()
pytestmark = pytest.mark.skipif(ABSENT is not None, reason=f"no compiled kernels: {ABSENT}")

ISAS = native.isas() or [""]
BLOCKS = [
    1,
    2,
    8,
    16,
    32,
    64,
    128,
    256,
    512,
    12,
    24,
    48,
    28,
    56,
    20,
    40,
    36,
    92,
    336,
    448,
    12 * 28,
    12 * 28 * 16,
    28 * 512,
]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("block", [b for b in BLOCKS if factors(b)])
def test_equals_the_product_with_the_matrix(block, isa):
    generator = torch.Generator().manual_seed(block)
    x = torch.randn(3, 2 * block if block < 4096 else block, generator=generator)
    for transposed in (False, True):
        expected = transformed(x.double(), block, transposed)
        with native.using_isa(isa):
            found = hadamard_transform(x, block, transposed)
        bound = 4 * math.log2(block + 1) * torch.finfo(torch.float32).eps * x.norm(dim=1).max().item()
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=max(bound, 1e-7))


@pytest.mark.parametrize("isa", ISAS)
def test_against_the_dense_matrix_and_back(isa):
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    with native.using_isa(isa):
        there = hadamard_transform(x, 48)
        torch.testing.assert_close(there, x @ torch.block_diag(*[hadamard(48).float()] * 2), rtol=0, atol=1e-5)
        torch.testing.assert_close(hadamard_transform(there, 48, True), x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_strides_and_no_rows(isa, dtype):
    wide = torch.randn(7, 200, generator=torch.Generator().manual_seed(0)).to(dtype)
    with native.using_isa(isa):
        for x in (
            wide[:, :56],
            wide[:, 3:59],
            wide[:, :56].T.contiguous().T,
            wide[:6, :56].view(2, 3, 56),
            wide[0, :56],
        ):
            expected = transformed(x.float(), 28).to(dtype)
            tolerance = (
                0 if dtype == torch.float32 else torch.finfo(dtype).eps
            )  # sums in another order may round otherwise
            torch.testing.assert_close(hadamard_transform(x, 28), expected, rtol=tolerance, atol=2e-6)
        assert hadamard_transform(wide[:0, :56], 28).shape == (0, 56)


def test_threads_and_neighbours_change_nothing():
    x = torch.randn(40, 28 * 64, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = torch.cat([hadamard_transform(row[None], 28 * 64) for row in x])
        torch.set_num_threads(2)
        torch.testing.assert_close(hadamard_transform(x, 28 * 64), alone, rtol=0, atol=0)
    finally:
        torch.set_num_threads(before)


def test_not_a_number_stays_in_its_block():
    x = torch.ones(1, 64)
    x[0, 3] = float("nan")
    found = hadamard_transform(x, 32)
    assert found[0, :32].isnan().all()
    assert found[0, 32:].isfinite().all()
    x[0, 3] = float("inf")
    assert not hadamard_transform(x, 32)[0, :32].isfinite().any()


def test_sizes_that_do_not_fit_are_refused():
    library = native.library()
    assert library is not None
    x, out, space = torch.ones(2, 64), torch.empty(2, 64), torch.empty(1 << 16, dtype=torch.uint8)

    def call(rows=2, features=64, stride=64, power=32, dtype=0, n_bytes=1 << 16, threads=1, pointer=1):
        return library.ck_hadamard(
            x.data_ptr() if pointer else None, dtype, rows, features, stride, None, 0, None, power, 1.0, out.data_ptr(),
            64, space.data_ptr(), n_bytes, threads,
        )  # fmt: skip

    assert call() == 0
    for status, wrong in {
        -4: [{"rows": -1}, {"features": 0}, {"power": 128}, {"power": 24}, {"features": 48}],
        -6: [{"dtype": 7}],
        -7: [{"n_bytes": 8}],
        -9: [{"stride": 63}],
        -10: [{"threads": 0}],
        -1: [{"pointer": 0}],
    }.items():
        for arguments in wrong:
            assert call(**arguments) == status, arguments
