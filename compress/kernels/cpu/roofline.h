// What roofline.cpp and the units that hold its loops agree on.

#ifndef CK_ROOFLINE_H
#define CK_ROOFLINE_H

#include "common.h"

namespace ck {

// A loop does `per_round` operations (a product and a sum count as two) in each round; null: no such unit.
struct Unit {
  int64_t per_round;
  float (*run)(int64_t rounds);
};

struct Roofline {
  uint64_t (*read)(const uint8_t* from, int64_t bytes);  // whole multiples of 64; the exclusive or of all words
  Unit units[3];                                         // CK_UNIT_*
};

const Roofline* roofline_portable();
const Roofline* roofline_avx2();
const Roofline* roofline_avx2vnni();
const Roofline* roofline_avx2vnni_vl();
const Roofline* roofline_avx512();
const Roofline* roofline_avx512bf16();

}  // namespace ck

namespace {

constexpr int STREAMS = 8;  // independent results: more than the latency of an instruction times how many start at once
constexpr int CHAINS = 12;

}  // namespace
#endif
