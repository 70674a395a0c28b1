// Tables on any processor.
#include "vectors_portable.h"

namespace {

struct Table {
  float v[16];
};
CK_INLINE Table table_of(const float* f) {
  Table t;
  for (int i = 0; i < 16; i++) t.v[i] = f[i];
  return t;
}

CK_INLINE Portable::Floats to_bf16(Portable::Floats v) {
  for (int i = 0; i < 16; i++) v.v[i] = float_of_bf16(bf16_of_float(v.v[i]));
  return v;
}

template <int BITS>
struct Codes {
  __attribute__((always_inline)) Portable::Floats values(const uint8_t* p, const Table& table) const {
    uint64_t all = 0;
    for (int i = 0; i < 2 * BITS; i++) all |= uint64_t(p[i]) << (8 * i);
    Portable::Floats found;
    for (int i = 0; i < 16; i++) found.v[i] = table.v[all >> (i * BITS) & ((1 << BITS) - 1)];
    return found;
  }
};

}  // namespace

#include "lut_kernel.h"

namespace {
const ck::LutKernels kernels = lut_table<Portable>();
}

const ck::LutKernels* ck::lut_portable() { return &kernels; }
