// What the units of AVX2 have of the roofline. CK_VNNI as in vectors_256.h.

#ifndef CK_ROOFLINE_256_H
#define CK_ROOFLINE_256_H

#include <immintrin.h>

#include "roofline.h"

namespace {

uint64_t read(const uint8_t* from, int64_t bytes) {
  __m256i mixed[STREAMS];
  for (int i = 0; i < STREAMS; i++) mixed[i] = _mm256_setzero_si256();
  int64_t at = 0;
  for (; at + 32 * STREAMS <= bytes; at += 32 * STREAMS)
    for (int i = 0; i < STREAMS; i++)
      mixed[i] = _mm256_xor_si256(mixed[i], _mm256_load_si256(reinterpret_cast<const __m256i*>(from + at + 32 * i)));
  for (; at < bytes; at += 32)
    mixed[0] = _mm256_xor_si256(mixed[0], _mm256_load_si256(reinterpret_cast<const __m256i*>(from + at)));
  alignas(32) uint64_t words[4];
  for (int i = 1; i < STREAMS; i++) mixed[0] = _mm256_xor_si256(mixed[0], mixed[i]);
  _mm256_store_si256(reinterpret_cast<__m256i*>(words), mixed[0]);
  return words[0] ^ words[1] ^ words[2] ^ words[3];
}

float multiply_add(int64_t rounds) {
  const __m256 a = _mm256_set1_ps(0.5f), b = _mm256_set1_ps(0.25f);
  __m256 chain[CHAINS];
  for (int c = 0; c < CHAINS; c++) chain[c] = _mm256_set1_ps(float(c));
  for (int64_t i = 0; i < rounds; i++)
    for (int c = 0; c < CHAINS; c++) chain[c] = _mm256_fmadd_ps(chain[c], a, b);
  for (int c = 1; c < CHAINS; c++) chain[0] = _mm256_add_ps(chain[0], chain[c]);
  return _mm256_cvtss_f32(chain[0]);
}

float integers(int64_t rounds) {
  const __m256i b = _mm256_set1_epi8(5);
  __m256i chain[CHAINS];
  for (int c = 0; c < CHAINS; c++) chain[c] = _mm256_set1_epi32(c);
  for (int64_t i = 0; i < rounds; i++)
    for (int c = 0; c < CHAINS; c++) {
      __m256i w = b;
      asm("" : "+x"(w));  // the product is not taken out of the loop
#if CK_VNNI == 1
      chain[c] = _mm256_dpbusd_avx_epi32(chain[c], w, b);
#elif CK_VNNI == 2
      chain[c] = _mm256_dpbusd_epi32(chain[c], w, b);
#else  // three instructions
      chain[c] = _mm256_add_epi32(chain[c], _mm256_madd_epi16(_mm256_maddubs_epi16(w, b), _mm256_set1_epi16(1)));
#endif
    }
  for (int c = 1; c < CHAINS; c++) chain[0] = _mm256_add_epi32(chain[0], chain[c]);
  return float(_mm256_extract_epi32(chain[0], 0));
}

const ck::Roofline loops = {read, {{2 * 8 * CHAINS, multiply_add}, {0, nullptr}, {2 * 32 * CHAINS, integers}}};

}  // namespace
#endif
