"""Products with weights from tables on compiled kernels, on every instruction set, against the reference and float64."""

from __future__ import annotations

import pytest
import torch

from compress.errors import RecipeError
from compress.kernels import native
from compress.kernels.lut import FEW, Lut, _reference, expanded, lut_linear, lut_rows, multiplied
from compress.kernels.packing import pack

ABSENT = native.absent()
pytestmark = pytest.mark.skipif(ABSENT is not None, reason=f"no compiled kernels: {ABSENT}")
ISAS = native.isas() or [""]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def problem(rows: int, columns: int, bits: int, group_size: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Packed codes, table, scale or None, bias."""
    generator = torch.Generator().manual_seed(rows + columns + bits)
    codes = torch.randint(2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    table = torch.randn(*(() if group_size else (rows,)), 2**bits, generator=generator).to(dtype)
    scale = torch.randn(rows, columns // group_size, generator=generator).to(dtype) if group_size else None
    return pack(codes, bits), table, scale, torch.randn(rows, generator=generator).to(dtype)


SHAPES = [(1, 16, 16), (33, 100, 100), (18, 100, 0), (5, 3, 0), (38, 288, 96)]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_those_of_the_reference_and_products_those_of_float64(bits, dtype, isa):
    for rows, columns, group_size in SHAPES:
        packed, table, scale, bias = problem(rows, columns, bits, group_size, dtype)
        weight = torch.cat([tile for _, tile in lut_rows(packed, table, scale, bits, columns)])
        lut = Lut.of(packed, table, scale, bits, columns)
        for tokens in (1, 2, 3, 6, FEW + 1):
            x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens)).to(dtype)
            with native.using_isa(isa):
                assert torch.equal(expanded(lut, dtype), weight)
                found = lut_linear(x, packed, table, scale, bias, bits, columns)
            exact = x.double() @ weight.double().T + bias.double()
            terms = float(x.double().abs().sum(1).max() * weight.abs().max())
            torch.testing.assert_close(found.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=terms * 2**-20)
            with native.using_isa(isa):  # a token's result does not depend on its company
                alone = [multiplied(x[t : t + 1], lut, bias, torch.empty(1, rows, dtype=dtype)) for t in range(tokens)]
                together = multiplied(x, lut, bias, torch.empty(tokens, rows, dtype=dtype))
            assert torch.equal(torch.cat(alone), together)


def test_other_dtypes_and_strides():
    packed, table, scale, bias = problem(20, 64, 3, 32, torch.bfloat16)
    x = torch.randn(5, 2, 128, generator=torch.Generator().manual_seed(0))[:, :, ::2]
    for dtype in DTYPES:
        found = lut_linear(x.to(dtype), packed, table, scale, bias, 3, 64)
        expected = _reference(x.to(dtype), packed, table, scale, bias, 3, 64)
        tolerance = 8 * torch.finfo(dtype).eps * float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    assert lut_linear(x[:0], packed, table, scale, None, 3, 64).shape == (0, 2, 20)


def test_groups_that_are_no_whole_vectors_take_the_reference():
    packed, table, scale, bias = problem(6, 40, 4, 8, torch.float32)
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        lut_linear(x, packed, table, scale, bias, 4, 40), _reference(x, packed, table, scale, bias, 4, 40)
    )
    with pytest.raises(RecipeError, match="does not divide the inputs"):
        expanded(Lut.of(packed, table, scale, 4, 40), torch.float32)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("bits", 5, "bits"),
        ("dtype", 9, "dtype"),
        ("in_features", 0, "size"),
        ("row_bytes", 3, "overlap"),
        ("table", None, "null"),
    ],
)
def test_what_cannot_be_is_refused(field, value, said):
    packed, table, scale, _ = problem(6, 32, 4, 16, torch.float32)
    lut = Lut.of(packed, table, scale, 4, 32)
    setattr(lut, field, value)
    with pytest.raises(RecipeError, match=said):
        multiplied(torch.zeros(1, 32), lut, None, torch.zeros(1, 6))
