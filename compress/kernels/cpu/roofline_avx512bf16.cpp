// The loops of the roofline with AVX-512, VNNI and BF16.

#include "roofline_512.h"

namespace {

float halves(int64_t rounds) {
  const __m512bh a = (__m512bh)_mm512_set1_epi16(0x3f00), b = (__m512bh)_mm512_set1_epi16(0x3e80);
  __m512 chain[CHAINS];
  for (int c = 0; c < CHAINS; c++) chain[c] = _mm512_set1_ps(float(c));
  for (int64_t i = 0; i < rounds; i++)
    for (int c = 0; c < CHAINS; c++) chain[c] = _mm512_dpbf16_ps(chain[c], a, b);
  for (int c = 1; c < CHAINS; c++) chain[0] = _mm512_add_ps(chain[0], chain[c]);
  return _mm512_cvtss_f32(chain[0]);
}

}  // namespace

const ck::Roofline* ck::roofline_avx512bf16() {
  static const Roofline loops = {
      read, {{2 * 16 * CHAINS, multiply_add}, {2 * 32 * CHAINS, halves}, {2 * 64 * CHAINS, integers}}};
  return &loops;
}
