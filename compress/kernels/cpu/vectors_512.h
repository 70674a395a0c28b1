// Vectors of 16 rows in the registers of AVX-512 (F, BW, VL, DQ, VNNI).

#ifndef CK_VECTORS_512_H
#define CK_VECTORS_512_H

#include <immintrin.h>

#include "linear.h"

namespace {

struct Avx512 {
  using Bytes = __m512i;
  using Ints = __m512i;
  using Floats = __m512;
  static constexpr int NR = 2, MT = 12, DIRECT = 8, DIRECT_TOKENS = 32, FULL_OFFSET = 0;
  static constexpr int PREFETCH = 2048;  // bytes ahead in the stream of codes
  static constexpr bool wide(int bits, int tokens) { return (bits == 3 ? 8 : bits == 2 ? 4 : 2) * tokens <= 24; }

  CK_INLINE Bytes bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
  CK_INLINE void store(uint8_t* p, Bytes b) { _mm512_store_si512(p, b); }
  CK_INLINE Bytes band(Bytes a, uint8_t mask) { return _mm512_and_si512(a, _mm512_set1_epi8(char(mask))); }
  CK_INLINE Bytes bor(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }
  CK_INLINE Bytes select2(Bytes a, uint8_t ma, Bytes b, uint8_t mb) {  // (b & mb) | (a & ma)
    return _mm512_ternarylogic_epi32(b, _mm512_set1_epi8(char(mb)), band(a, ma), 0xea);
  }
  template <int N> CK_INLINE Bytes srl(Bytes a) { return _mm512_srli_epi32(a, N); }
  template <int N> CK_INLINE Bytes sll(Bytes a) { return _mm512_slli_epi32(a, N); }

  CK_INLINE __m512i broadcast(const int32_t* p) { return _mm512_set1_epi32(*p); }
  CK_INLINE Ints broadcast(int32_t x) { return _mm512_set1_epi32(x); }
  CK_INLINE Floats broadcast(float x) { return _mm512_set1_ps(x); }
  template <bool> CK_INLINE Ints dp(Ints acc, Bytes w, __m512i a) { return _mm512_dpbusd_epi32(acc, w, a); }
  CK_INLINE Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
  template <int N> CK_INLINE Ints sra(Ints a) { return _mm512_srai_epi32(a, N); }

  CK_INLINE Floats floats(const float* p) { return _mm512_loadu_ps(p); }
  CK_INLINE Floats floats(const void* p, int32_t dtype) {
    if (dtype == CK_F32) return _mm512_loadu_ps(p);
    const __m256i half = _mm256_loadu_si256(static_cast<const __m256i*>(p));
    if (dtype == CK_F16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  CK_INLINE Floats floats_of_bytes(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  CK_INLINE Floats to_float(Ints a) { return _mm512_cvtepi32_ps(a); }
  template <int J> CK_INLINE Floats code(Bytes b) {
    if constexpr (J == 3) return _mm512_cvtepi32_ps(_mm512_srli_epi32(b, 24));
    else return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(b, 8 * J), _mm512_set1_epi32(255)));
  }
  CK_INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  CK_INLINE Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
  CK_INLINE Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  CK_INLINE Floats fmadd(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  CK_INLINE Floats fnmadd(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }
  CK_INLINE void store(float* p, Floats a) { _mm512_storeu_ps(p, a); }
  CK_INLINE void store_as(void* p, int32_t dtype, Floats a) {
    if (dtype == CK_F32) {
      _mm512_storeu_ps(p, a);
    } else if (dtype == CK_F16) {
      _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    } else {
      const __m512i bits = _mm512_castps_si512(a), high = _mm512_srli_epi32(bits, 16);
      const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
      __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
      const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
      rounded = _mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40));
      _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
    }
  }
  CK_INLINE void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p + PREFETCH), _MM_HINT_T0); }
};

}  // namespace
#endif
