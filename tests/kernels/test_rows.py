"""Low-rank pairs and pruned weights on compiled kernels, on every instruction set, against products in float64."""

from __future__ import annotations

import pytest
import torch

from compress.errors import RecipeError
from compress.kernels import native
from compress.kernels.low_rank import low_rank_linear, packed_low_rank_linear
from compress.kernels.packed import packed_linear, prepare
from compress.kernels.packing import pack
from compress.kernels.rows import FEW, dense_rows, expanded, multiplied, sparse_rows
from compress.kernels.sparse import kept_entries, pack_positions, sparse_linear

ABSENT = native.absent()
pytestmark = pytest.mark.skipif(ABSENT is not None, reason=f"no compiled kernels: {ABSENT}")
ISAS = native.isas() or [""]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def close(found: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype, terms: float) -> None:
    """`terms`: the largest sum of magnitudes; float32 sums and one rounding explain the difference."""
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), exact, rtol=2 * eps, atol=terms * 2**-20)


def mask_of(n: int, m: int, rows: int, columns: int) -> torch.Tensor:
    scores = torch.rand(rows, columns, generator=torch.Generator().manual_seed(n + m))
    return scores.unflatten(1, (-1, m)).argsort(-1).argsort(-1).lt(n).flatten(1) if m else scores < 0.4


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 4), (7, 36), (33, 100), (18, 256)])
def test_pruned_weights(rows, columns, dtype, isa):
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    bias = torch.randn(rows, generator=generator).to(dtype)
    for n, m in ((2, 4), (1, 4), (0, 0)):
        mask = mask_of(n, m, rows, columns)
        values, positions = kept_entries(weight, mask, n, m), pack_positions(mask, n, m)
        for tokens in (1, 2, 3, 4, 6, FEW + 1):
            x = torch.randn(tokens, columns, generator=generator).to(dtype)
            with native.using_isa(isa):
                found = sparse_linear(x, values, positions, None, bias, 0, n, m, columns)
            exact = x.double() @ (weight * mask).double().T + bias.double()
            close(found, exact, dtype, float(x.double().abs().sum(1).max() * weight.abs().max()))
        rows_of = sparse_rows(values, positions, n, m, columns)
        if rows_of is not None:
            with native.using_isa(isa):
                assert torch.equal(expanded(rows_of, torch.float32), (weight * mask).float())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("out", "rank", "columns"), [(1, 1, 1), (19, 5, 33), (40, 17, 64)])
def test_low_rank_pairs(out, rank, columns, dtype, isa):
    generator = torch.Generator().manual_seed(rank)
    left, right, bias = (torch.randn(s, generator=generator).to(dtype) for s in ((out, rank), (rank, columns), (out,)))
    for tokens in (1, 4, 5, FEW + 1):
        x = torch.randn(tokens, 2, columns, generator=generator).to(dtype)
        with native.using_isa(isa):
            found = low_rank_linear(x, left, right, bias)
        inner = x.double() @ right.double().T
        exact = inner @ left.double().T + bias.double()
        terms = float((inner.abs() @ left.double().abs().T).max())
        if tokens * 2 > FEW:  # torch rounds what lies between
            torch.testing.assert_close(found.double(), exact, rtol=0, atol=terms * 4 * torch.finfo(dtype).eps)
        else:
            close(found, exact, dtype, terms * 8)
    assert low_rank_linear(x[:0], left, right).shape == (0, 2, out)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activations", [8, 16])
def test_a_pair_on_top_of_a_packed_weight(activations, isa):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (40, 64), generator=generator)
    weight = prepare(pack(codes, 4), torch.rand(40, 2, generator=generator), None, 4, 32, 64)
    left, right, bias = (torch.randn(s, generator=generator) for s in ((40, 6), (6, 64), (40,)))
    for tokens in (1, 3, FEW + 3):
        x = torch.randn(tokens, 64, generator=generator)
        with native.using_isa(isa):
            found = packed_low_rank_linear(x, weight, left, right, bias, activations)
            apart = packed_linear(x, weight, bias, activations) + low_rank_linear(x, left, right)
        torch.testing.assert_close(found, apart, rtol=1e-5, atol=1e-4)


def test_good_citizens_of_torch():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (8, 32), generator=generator)
    weight = prepare(pack(codes, 4), torch.rand(8, 1, generator=generator), None, 4, 32, 32)
    left, right, bias = (torch.randn(s, generator=generator) for s in ((8, 3), (3, 32), (8,)))
    x = torch.randn(2, 32, generator=generator).requires_grad_()
    w = weight.layout
    sizes = (w.bits, w.group_size, w.out_features, w.in_features, w.zero_point, w.scale_dtype, 16)
    torch.library.opcheck(torch.ops.compress.low_rank_linear.default, (x, left, right, bias))
    torch.library.opcheck(
        torch.ops.compress.packed_low_rank_linear.default, (x, weight.buffer, left, right, bias, *sizes)
    )
    for run, dense in (
        (low_rank_linear(x, left, right, bias), left @ right),
        (packed_low_rank_linear(x, weight, left, right, bias, 16), weight.dense() + left @ right),
    ):
        (gradient,) = torch.autograd.grad(run.square().sum(), x)
        (expected,) = torch.autograd.grad((x @ dense.T + bias).square().sum(), x)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-2)


def test_strides_threads_and_sums_into_the_output():
    weight = torch.randn(64, 1056)
    wide = torch.randn(5, 2000)
    rows, x = dense_rows(weight), wide[:, 3 : 3 + 1056]
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(multiplied(x, rows, None, torch.ones(5, 64), add=True))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
    torch.testing.assert_close(found[0], x @ weight.T + 1, rtol=1e-4, atol=1e-4)


def test_a_mask_with_more_places_than_there_are_values_reads_nothing_beyond_them():
    values, positions = torch.ones(3), torch.full((2, 1), -1, dtype=torch.int32)
    for dtype in DTYPES:
        for tokens in (1, 6):
            x = torch.ones(tokens, 32, dtype=dtype)
            found = sparse_linear(x, values.to(dtype), positions, None, None, 0, 0, 0, 32)
            assert found.tolist() == [[3, 0]] * tokens


def test_what_does_not_fit_is_refused():
    with pytest.raises(RecipeError, match="do not fit"):
        low_rank_linear(torch.ones(1, 5), torch.ones(3, 2), torch.ones(2, 4))
    rows = dense_rows(torch.ones(4, 8))
    x, out = torch.ones(2, 8), torch.empty(2, 4)
    for field, value in (("kind", 7), ("dtype", 9), ("n_values", 31), ("in_features", 0), ("values", None)):
        kept, broken = getattr(rows, field), dense_rows(torch.ones(4, 8))
        setattr(broken, field, value)
        assert value != kept
        with pytest.raises(RecipeError):
            multiplied(x, broken, None, out)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", ["dense", "2:4", "bits"])
@pytest.mark.parametrize(("rows", "columns"), [(19, 36), (9, 1100)])
def test_many_tokens_in_bfloat16(rows, columns, kind, isa):
    """Also where rows are spread once for all tokens; a token's result does not depend on how many there are."""
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=generator).bfloat16()
    n, m = {"dense": (1, 1), "2:4": (2, 4), "bits": (0, 0)}[kind]
    mask = torch.ones_like(weight, dtype=torch.bool) if kind == "dense" else mask_of(n, m, rows, columns)
    held = dense_rows(weight)
    if kind != "dense":
        found_rows = sparse_rows(kept_entries(weight, mask, n, m), pack_positions(mask, n, m), n, m, columns)
        assert found_rows is not None
        held = found_rows
    x = torch.randn(50, columns, generator=generator).bfloat16()
    exact = x.double() @ (weight * mask).double().T
    with native.using_isa(isa):
        whole = multiplied(x, held, None, torch.empty(50, rows))
        close(whole, exact, torch.float32, float(x.double().abs().sum(1).max() * weight.abs().max()))
        for first, last in ((0, 1), (3, 7), (20, 25)):
            assert torch.equal(
                multiplied(x[first:last], held, None, torch.empty(last - first, rows)), whole[first:last]
            )
