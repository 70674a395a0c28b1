// The loops of the roofline in vectors of the compiler.

#include "roofline.h"

namespace {

typedef uint64_t Words __attribute__((vector_size(64)));
typedef float Reals __attribute__((vector_size(64)));

uint64_t read(const uint8_t* from, int64_t bytes) {
  Words mixed[STREAMS] = {};
  int64_t at = 0;
  for (; at + 64 * STREAMS <= bytes; at += 64 * STREAMS)
    for (int i = 0; i < STREAMS; i++) mixed[i] ^= *reinterpret_cast<const Words*>(from + at + 64 * i);
  for (; at < bytes; at += 64) mixed[0] ^= *reinterpret_cast<const Words*>(from + at);
  uint64_t all = 0;
  for (int i = 0; i < STREAMS; i++)
    for (int lane = 0; lane < 8; lane++) all ^= mixed[i][lane];
  return all;
}

float multiply_add(int64_t rounds) {
  Reals a = Reals{} + 0.5f, b = Reals{} + 0.25f, chain[2] = {};
  for (int64_t i = 0; i < rounds; i++)
    for (int c = 0; c < 2; c++) chain[c] = chain[c] * a + b;
  return chain[0][0] + chain[1][0];
}

}  // namespace

const ck::Roofline* ck::roofline_portable() {
  static const Roofline loops = {read, {{2 * 16 * 2, multiply_add}, {0, nullptr}, {0, nullptr}}};
  return &loops;
}
