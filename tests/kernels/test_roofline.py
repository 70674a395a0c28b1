"""The loops that measure what the processor can do read all they are given, and refuse what they cannot."""

from __future__ import annotations

import ctypes

import pytest
import torch

from compress.kernels import native
from compress.kernels.buffers import allocate

ABSENT = native.absent()
pytestmark = pytest.mark.skipif(ABSENT is not None, reason=f"no compiled kernels: {ABSENT}")
ISAS = native.isas() or [""]
MODE, SHAPE, ISA, BYTES, ALIGNMENT, THREADS = -11, -4, -12, -7, -8, -10  # CK_ERR_*


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("lines", [0, 1, 7, 64, 1000])
def test_reading_touches_every_word(lines, isa):
    """The exclusive or of all words, however many threads share them; a change of any word changes it."""
    library, mixed = native.library(), ctypes.c_uint64()
    whole = allocate(max(lines, 1) * 64)
    buffer = whole[: lines * 64]
    buffer.copy_(
        torch.randint(0, 256, (lines * 64,), generator=torch.Generator().manual_seed(lines), dtype=torch.uint8)
    )
    with native.using_isa(isa):
        for threads in (1, 2):
            assert library.ck_roofline_read(whole.data_ptr(), lines * 64, threads, ctypes.byref(mixed)) == 0
            wanted = 0
            for word in buffer.view(torch.int64).tolist():
                wanted ^= word % 2**64
            assert mixed.value == wanted
            if lines:
                buffer[threads * 8] ^= 5


@pytest.mark.parametrize("isa", ISAS)
def test_arithmetic_says_how_much_it_did(isa):
    library = native.library()
    with native.using_isa(isa):
        for unit in range(3):
            once = library.ck_roofline_compute(unit, 1, 1)
            assert once == ISA or library.ck_roofline_compute(unit, 10, 1) == 10 * once > 0
        assert library.ck_roofline_compute(0, 1, 1) > 0
        refusals = [(3, 1, 1, MODE), (-1, 1, 1, MODE), (0, 0, 1, SHAPE), (0, 1, 0, THREADS)]
        assert [library.ck_roofline_compute(*r[:3]) for r in refusals] == [r[3] for r in refusals]


def test_what_cannot_be_read_is_refused():
    library, mixed, buffer = native.library(), ctypes.c_uint64(), allocate(256)
    at = buffer.data_ptr()
    for arguments, status in (((at, 100, 1), BYTES), ((at + 8, 64, 1), ALIGNMENT), ((at, 64, 0), THREADS)):
        assert library.ck_roofline_read(*arguments, ctypes.byref(mixed)) == status
