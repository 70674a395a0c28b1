// Rows with AVX-512, which has the instruction.
#include "vectors_512.h"

namespace {
CK_INLINE __m512 expanded(__m512 v, uint32_t mask) { return _mm512_maskz_expand_ps(__mmask16(mask), v); }
}  // namespace

#include "rows_kernel.h"

namespace {
const ck::RowsKernels kernels = rows_table<Avx512>();
}

const ck::RowsKernels* ck::rows_avx512() { return &kernels; }
