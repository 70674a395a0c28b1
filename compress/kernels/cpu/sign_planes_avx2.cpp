// Sign planes with AVX2, FMA and F16C.

#include "vectors_256.h"

namespace {
struct Planes : Avx2 {
  CK_INLINE __m128i bf16(__m256 f) {
    const __m256i bits = _mm256_castps_si256(f), high = _mm256_srli_epi32(bits, 16);
    const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
    __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
    const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    rounded = _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(_mm256_cmp_ps(f, f, _CMP_UNORD_Q)));
    return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
  }
  CK_INLINE void store_as(void* p, int32_t dtype, Floats a) {
    if (dtype != CK_BF16) return Avx2::store_as(p, dtype, a);
    _mm_storeu_si128(static_cast<__m128i*>(p), bf16(a.lo));
    _mm_storeu_si128(static_cast<__m128i*>(p) + 1, bf16(a.hi));
  }
};

CK_INLINE __m256 flipped(__m256 v, uint32_t bits) {
  const __m256i places = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(bits)), places), places);
  return _mm256_xor_ps(v, _mm256_castsi256_ps(_mm256_slli_epi32(set, 31)));
}
CK_INLINE Avx2::Floats flip_positive(Avx2::Floats v, uint32_t bits) {
  return {flipped(v.lo, bits & 255), flipped(v.hi, bits >> 8)};
}
}  // namespace

#include "sign_planes_kernel.h"

const ck::SignPlanesKernels* ck::sign_planes_avx2() {
  static const SignPlanesKernels kernels = {
      float_tables<Planes>, float_rows<Planes>, nullptr, nullptr, nullptr,
      inner_factors<Planes>, outer_factors<Planes>, rebuilt_rows<Planes, 4, 1>};
  return &kernels;
}
