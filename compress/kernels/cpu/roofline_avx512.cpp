// The loops of the roofline with AVX-512 and VNNI.

#include "roofline_512.h"

const ck::Roofline* ck::roofline_avx512() {
  static const Roofline loops = {read, {{2 * 16 * CHAINS, multiply_add}, {0, nullptr}, {2 * 64 * CHAINS, integers}}};
  return &loops;
}
