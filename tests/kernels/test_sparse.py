"""Places of kept weights packed and unpacked, and the operation on them."""

from __future__ import annotations

from itertools import combinations
from math import comb, log2

import pytest
import torch
from torch.nn import functional

from compress.kernels.packing import pack
from compress.kernels.position_layout import MAX_SETS, position_layout
from compress.kernels.sparse import pack_positions, sparse_linear, unpack_positions, wrong_positions
from compress.linalg.sparsity import highest_of_groups
from compress.modules.quantized import QuantizedLinear
from compress.modules.quantized_spec import QuantizedSpec
from compress.modules.sparse import SparseLinear

PATTERNS = [(n, m) for m in (2, 3, 4, 5, 8, 16) for n in range(1, m)]


def masked(n: int, m: int, rows: int = 5, width: int = 0) -> torch.Tensor:
    """A mask that keeps n of every m, or about a third where n = m = 0."""
    generator = torch.Generator().manual_seed(100 * n + m)
    scores = torch.rand(rows, width or (7 * m if m else 45), generator=generator)
    return highest_of_groups(scores, n, m) if m else scores > 0.66


@pytest.mark.parametrize(("n", "m"), [*PATTERNS, (1, 256), (31, 32), (199, 200), (255, 256), (0, 0)])
def test_packed_places_come_back(n, m):
    mask = masked(n, m)
    words = pack_positions(mask, n, m)
    assert words.dtype == torch.int32
    assert words.shape == (5, position_layout(n, m).n_words(mask.shape[1]))
    torch.testing.assert_close(unpack_positions(words, n, m, mask.shape[1]), mask)
    assert wrong_positions(words, n, m, mask.shape[1], int(mask.sum())) is None


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (4, 8), (3, 5), (2, 16)])
def test_every_set_has_a_code_of_its_own(n, m):
    sets = list(combinations(range(m), n))
    mask = torch.zeros(len(sets), m, dtype=torch.bool)
    for row, places in enumerate(sets):
        mask[row, list(places)] = True
    words = pack_positions(mask, n, m)
    assert len(words.unique(dim=0)) == len(sets)
    torch.testing.assert_close(unpack_positions(words, n, m, m), mask)


def test_two_of_four_are_two_indices_of_two_bits():
    mask = torch.tensor([[0, 1, 0, 1, 1, 0, 1, 0]], dtype=torch.bool)
    assert pack_positions(mask, 2, 4).tolist() == [[1 | 3 << 2 | 0 << 4 | 2 << 6]]


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_no_layout_takes_more_than_a_bit_per_weight_and_ranks_are_as_short_as_can_be(n, m):
    layout = position_layout(n, m)
    assert layout.bits * layout.per_group <= layout.group
    if layout.kind == "ranks":
        assert layout.bits == max(1, (comb(m, n) - 1).bit_length()) < log2(comb(m, n)) + 1
    assert (layout.kind == "bits") == (comb(m, n) > MAX_SETS)


@pytest.mark.parametrize(
    ("words", "n", "m", "width", "kept", "said"),
    [
        (pack(torch.tensor([[0, 1, 3, 1]]), 2), 2, 4, 8, 4, "group 1 of row 0 does not say which 2 of its 4"),
        (pack(torch.tensor([[2, 2, 0, 1]]), 2), 2, 4, 8, 4, "group 0 of row 0"),
        (pack(torch.tensor([[9], [10]]), 4), 2, 5, 5, 4, "group 0 of row 1 does not say which 2 of its 5"),
        (pack(torch.ones(1, 32, dtype=torch.uint8), 1), 8, 16, 32, 16, "group 0 of row 0 does not say which 8 of its 16"),
        (pack(torch.ones(2, 8, dtype=torch.uint8), 1), 0, 0, 8, 15, "16 weights are marked as kept, and there are values for 15"),
    ],
)  # fmt: skip
def test_impossible_places_are_found(words, n, m, width, kept, said):
    assert said in wrong_positions(words, n, m, width, kept)


def modules(n: int, m: int, dtype: torch.dtype, bits: int = 0) -> SparseLinear:
    mask = masked(n, m, rows=9, width=48)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(mask.shape, generator=generator).to(dtype)
    bias = torch.randn(9, generator=generator).to(dtype)
    sparse = SparseLinear.from_weight(weight, mask, n, m, bias)
    if not bits:
        torch.testing.assert_close(sparse.dense(), weight * mask)
        return sparse
    codes = torch.randint(0, 2**bits, mask.shape, generator=generator).masked_fill(~mask, 2 ** (bits - 1))
    scale = torch.rand(9, 6, generator=generator).to(dtype)
    held = QuantizedLinear.from_codes(codes, scale, None, QuantizedSpec(48, 9, bits, 8), bias)
    assert isinstance(held, QuantizedLinear)
    quantized = sparse.quantized(held)
    torch.testing.assert_close(quantized.dense(), held.dense(), rtol=0, atol=0)
    return quantized


@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 8), (8, 16), (0, 0)])
@pytest.mark.parametrize("bits", [0, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_a_linear_with_the_dense_weight(n, m, bits, dtype, monkeypatch):
    monkeypatch.setattr("compress.kernels.ops.TILE", 48 * 4)  # several tiles, the last one smaller
    module = modules(n, m, dtype, bits)
    x = torch.randn(2, 3, 48).to(dtype)
    expected = functional.linear(x, module.dense(), module.bias)
    tolerance = 48 * torch.finfo(dtype).eps * max(8, 2**bits)
    torch.testing.assert_close(module(x), expected, rtol=0, atol=tolerance)
    assert module(x[:0]).shape == (0, 3, 9)
    module.hold(dtype)
    torch.testing.assert_close(module(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (0, 0)])
@pytest.mark.parametrize("bits", [0, 4])
def test_is_a_good_citizen_of_torch(n, m, bits):
    module = modules(n, m, torch.float32, bits)
    x = torch.randn(3, 48, requires_grad=True)
    values = module.weight_packed if bits else module.weight_values
    arguments = (x, values.detach(), module.weight_positions.detach(), module.weight_scale, module.bias, bits, n, m, 48)
    torch.library.opcheck(torch.ops.compress.sparse_linear, arguments)
    sparse_linear(*arguments).square().sum().backward()
    found, x.grad = x.grad, None
    functional.linear(x, module.dense(), module.bias).square().sum().backward()
    torch.testing.assert_close(found, x.grad, rtol=1e-4, atol=1e-3)
