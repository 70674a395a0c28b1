// What both units of AVX-512 have of the roofline.

#ifndef CK_ROOFLINE_512_H
#define CK_ROOFLINE_512_H

#include <immintrin.h>

#include "roofline.h"

namespace {

uint64_t read(const uint8_t* from, int64_t bytes) {
  __m512i mixed[STREAMS];
  for (int i = 0; i < STREAMS; i++) mixed[i] = _mm512_setzero_si512();
  int64_t at = 0;
  for (; at + 64 * STREAMS <= bytes; at += 64 * STREAMS)
    for (int i = 0; i < STREAMS; i++) {
      _mm_prefetch(reinterpret_cast<const char*>(from + at + 64 * i + 2048), _MM_HINT_T0);
      mixed[i] = _mm512_xor_si512(mixed[i], _mm512_load_si512(from + at + 64 * i));
    }
  for (; at < bytes; at += 64) mixed[0] = _mm512_xor_si512(mixed[0], _mm512_load_si512(from + at));
  alignas(64) uint64_t words[8];
  for (int i = 1; i < STREAMS; i++) mixed[0] = _mm512_xor_si512(mixed[0], mixed[i]);
  _mm512_store_si512(words, mixed[0]);
  uint64_t all = 0;
  for (int i = 0; i < 8; i++) all ^= words[i];
  return all;
}

float multiply_add(int64_t rounds) {
  const __m512 a = _mm512_set1_ps(0.5f), b = _mm512_set1_ps(0.25f);
  __m512 chain[CHAINS];
  for (int c = 0; c < CHAINS; c++) chain[c] = _mm512_set1_ps(float(c));
  for (int64_t i = 0; i < rounds; i++)
    for (int c = 0; c < CHAINS; c++) chain[c] = _mm512_fmadd_ps(chain[c], a, b);
  for (int c = 1; c < CHAINS; c++) chain[0] = _mm512_add_ps(chain[0], chain[c]);
  return _mm512_cvtss_f32(chain[0]);
}

float integers(int64_t rounds) {
  const __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(5);
  __m512i chain[CHAINS];
  for (int c = 0; c < CHAINS; c++) chain[c] = _mm512_set1_epi32(c);
  for (int64_t i = 0; i < rounds; i++)
    for (int c = 0; c < CHAINS; c++) chain[c] = _mm512_dpbusd_epi32(chain[c], a, b);
  for (int c = 1; c < CHAINS; c++) chain[0] = _mm512_add_epi32(chain[0], chain[c]);
  return float(_mm512_cvtsi512_si32(chain[0]));
}

}  // namespace
#endif
