// Vectors of 16 rows in two registers of AVX2 (with FMA, F16C). CK_VNNI: 1 for vpdpbusd as AVX-VNNI encodes it, 2 as AVX-512 does.

#ifndef CK_VECTORS_256_H
#define CK_VECTORS_256_H

#include <immintrin.h>

#include "linear.h"

#ifndef CK_VNNI
#define CK_VNNI 0
#endif

namespace {

struct Avx2 {
  struct Bytes { __m256i lo, hi; };
  struct Ints { __m256i lo, hi; };
  struct Floats { __m256 lo, hi; };
  static constexpr int NR = 1, MT = 6, DIRECT = 4, DIRECT_TOKENS = 4;
  static constexpr int FULL_OFFSET = CK_VNNI ? 0 : 128;
  static constexpr int PREFETCH = 2048;
  static constexpr bool wide(int bits, int tokens) {
    return CK_VNNI && bits != 3 && (bits == 2 ? 4 : 2) * tokens <= 4;
  }

  CK_INLINE __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  CK_INLINE void save(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
  CK_INLINE Bytes bytes(const uint8_t* p) { return {load(p), load(p + 32)}; }
  CK_INLINE void store(uint8_t* p, Bytes b) { save(p, b.lo); save(p + 32, b.hi); }
  CK_INLINE Bytes band(Bytes a, uint8_t mask) {
    const __m256i m = _mm256_set1_epi8(char(mask));
    return {_mm256_and_si256(a.lo, m), _mm256_and_si256(a.hi, m)};
  }
  CK_INLINE Bytes bor(Bytes a, Bytes b) { return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)}; }
  CK_INLINE Bytes select2(Bytes a, uint8_t ma, Bytes b, uint8_t mb) { return bor(band(a, ma), band(b, mb)); }
  template <int N> CK_INLINE Bytes srl(Bytes a) { return {_mm256_srli_epi32(a.lo, N), _mm256_srli_epi32(a.hi, N)}; }
  template <int N> CK_INLINE Bytes sll(Bytes a) { return {_mm256_slli_epi32(a.lo, N), _mm256_slli_epi32(a.hi, N)}; }

  CK_INLINE __m256i broadcast(const int32_t* p) { return _mm256_set1_epi32(*p); }
  CK_INLINE Ints broadcast(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
  CK_INLINE Floats broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }

  template <bool FULL> CK_INLINE __m256i dp8(__m256i acc, __m256i w, __m256i a) {
#if CK_VNNI == 1
    return _mm256_dpbusd_avx_epi32(acc, w, a);
#elif CK_VNNI == 2
    return _mm256_dpbusd_epi32(acc, w, a);
#else
    if (FULL) {  // codes of more than 7 bits would saturate: |w - 128| <= 128, twice 128 * 127 fits into 16 bits
      w = _mm256_xor_si256(w, _mm256_set1_epi8(char(0x80)));
      a = _mm256_sign_epi8(a, w);
      w = _mm256_abs_epi8(w);
    }
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, a), _mm256_set1_epi16(1)));
#endif
  }
  template <bool FULL> CK_INLINE Ints dp(Ints acc, Bytes w, __m256i a) {
    return {dp8<FULL>(acc.lo, w.lo, a), dp8<FULL>(acc.hi, w.hi, a)};
  }
  CK_INLINE Ints add(Ints a, Ints b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
  template <int N> CK_INLINE Ints sra(Ints a) { return {_mm256_srai_epi32(a.lo, N), _mm256_srai_epi32(a.hi, N)}; }

  CK_INLINE Floats floats(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  CK_INLINE __m128i half(const void* p, int i) {
    return _mm_loadu_si128(static_cast<const __m128i*>(p) + i);
  }
  CK_INLINE __m256 widened(__m128i h) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)); }
  CK_INLINE Floats floats(const void* p, int32_t dtype) {
    if (dtype == CK_F32) return floats(static_cast<const float*>(p));
    if (dtype == CK_F16) return {_mm256_cvtph_ps(half(p, 0)), _mm256_cvtph_ps(half(p, 1))};
    return {widened(half(p, 0)), widened(half(p, 1))};
  }
  CK_INLINE Floats floats_of_bytes(const uint8_t* p) {
    const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(b)), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(b, 8)))};
  }
  CK_INLINE Floats to_float(Ints a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
  template <int J> CK_INLINE __m256 code8(__m256i b) {
    return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(b, 8 * J), _mm256_set1_epi32(255)));
  }
  template <int J> CK_INLINE Floats code(Bytes b) { return {code8<J>(b.lo), code8<J>(b.hi)}; }
  CK_INLINE Floats add(Floats a, Floats b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
  CK_INLINE Floats sub(Floats a, Floats b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
  CK_INLINE Floats mul(Floats a, Floats b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
  CK_INLINE Floats fmadd(Floats a, Floats b, Floats c) {
    return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
  }
  CK_INLINE Floats fnmadd(Floats a, Floats b, Floats c) {
    return {_mm256_fnmadd_ps(a.lo, b.lo, c.lo), _mm256_fnmadd_ps(a.hi, b.hi, c.hi)};
  }
  CK_INLINE void store(float* p, Floats a) { _mm256_storeu_ps(p, a.lo); _mm256_storeu_ps(p + 8, a.hi); }
  CK_INLINE void store_as(void* p, int32_t dtype, Floats a) {
    if (dtype == CK_F32) {
      store(static_cast<float*>(p), a);
    } else if (dtype == CK_F16) {
      _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
      _mm_storeu_si128(static_cast<__m128i*>(p) + 1, _mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    } else {
      alignas(32) float f[16];
      store(f, a);
      for (int r = 0; r < 16; r++) static_cast<uint16_t*>(p)[r] = bf16_of_float(f[r]);
    }
  }
  CK_INLINE void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p + PREFETCH), _MM_HINT_T0); }
};

}  // namespace
#endif
