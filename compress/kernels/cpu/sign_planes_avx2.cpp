// Sign planes with AVX2, FMA and F16C.

#include "vectors_256.h"

namespace {
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
      float_tables<Avx2>, float_rows<Avx2>, nullptr, nullptr, nullptr, inner_factors<Avx2>, rebuilt_rows<Avx2, 2, 1>};
  return &kernels;
}
