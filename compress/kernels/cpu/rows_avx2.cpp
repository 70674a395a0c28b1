// Rows with AVX2: which value goes to which of eight lanes is computed from the mask, a byte per lane.
#include "vectors_256.h"

namespace {

// Lane i takes value number popcount(mask & (2^i - 1)); the sums of eight bits lie in the bytes of a product.
CK_INLINE __m256 expanded8(__m256 v, uint32_t mask) {
  const uint64_t spread = (uint64_t(mask & 0x7f) * 0x0002040810204081u & 0x0101010101010101u);  // bit i -> byte i, but for bit 7
  const uint64_t before = (spread * 0x0101010101010101u) << 8;                                  // byte i: bits below i
  const __m256i from = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(before)));
  const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i kept = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(mask)), bits), bits);
  return _mm256_and_ps(_mm256_permutevar8x32_ps(v, from), _mm256_castsi256_ps(kept));
}

CK_INLINE Avx2::Floats expanded(Avx2::Floats v, uint32_t mask) {
  alignas(32) float values[32];  // the second eight lanes start where the first ones end
  _mm256_store_ps(values, v.lo);
  _mm256_store_ps(values + 8, v.hi);
  _mm256_store_ps(values + 16, _mm256_setzero_ps());
  return {expanded8(v.lo, mask & 255), expanded8(_mm256_loadu_ps(values + __builtin_popcount(mask & 255)), mask >> 8)};
}

}  // namespace

#include "rows_kernel.h"

namespace {
const ck::RowsKernels kernels = rows_table<Avx2>();
}

const ck::RowsKernels* ck::rows_avx2() { return &kernels; }
