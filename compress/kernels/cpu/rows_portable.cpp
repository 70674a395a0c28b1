// Rows on any processor.
#include "vectors_portable.h"

namespace {
CK_INLINE Portable::Floats expanded(Portable::Floats v, uint32_t mask) {
  Portable::Floats found = Portable::broadcast(0.0f);
  for (int i = 0, from = 0; i < 16; i++)
    if (mask >> i & 1) found.v[i] = v.v[from++];
  return found;
}
}  // namespace

#include "rows_kernel.h"

namespace {
const ck::RowsKernels kernels = rows_table<Portable>();
}

const ck::RowsKernels* ck::rows_portable() { return &kernels; }
