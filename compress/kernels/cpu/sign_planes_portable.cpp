// Sign planes on any processor.

#include "vectors_portable.h"

namespace {
CK_INLINE Portable::Floats flip_positive(Portable::Floats v, uint32_t bits) {
  for (int i = 0; i < 16; i++) v.v[i] = bits >> i & 1 ? -v.v[i] : v.v[i];
  return v;
}
}  // namespace

#include "sign_planes_kernel.h"

const ck::SignPlanesKernels* ck::sign_planes_portable() {
  static const SignPlanesKernels kernels = {
      float_tables<Portable>, float_rows<Portable>, nullptr, nullptr, nullptr, inner_factors<Portable>,
      rebuilt_rows<Portable, 4, 1>};
  return &kernels;
}
