// Pieces of 16 floats, a vector of P: how kernels that read rows and tokens load, add up and store them.

#ifndef CK_PIECES_H
#define CK_PIECES_H

#include "common.h"

namespace {

constexpr int PIECE = 16;

// n values of x as float, and zeros up to `padded`.
template <class P>
void padded_floats(const void* x, int32_t dtype, int64_t n, int64_t padded, float* to) {
  int64_t i = 0;
  for (; i + PIECE <= n; i += PIECE) P::store(to + i, P::floats(at(x, dtype, i), dtype));
  for (; i < n; i++) to[i] = float_at(x, dtype, i);
  for (; i < padded; i++) to[i] = 0;
}

// The first `left` of a piece, all if there are more.
template <class P>
CK_INLINE void store_piece(void* to, int32_t dtype, int64_t left, typename P::Floats v) {
  if (left >= PIECE) {
    P::store_as(to, dtype, v);
    return;
  }
  alignas(64) char some[PIECE * 4];
  P::store_as(some, dtype, v);
  memcpy(to, some, size_t(left * dtype_bytes(dtype)));
}

template <class P>
CK_INLINE float total_of(typename P::Floats v) {
  alignas(64) float f[PIECE];
  P::store(f, v);
  for (int half = PIECE / 2; half; half /= 2)
    for (int i = 0; i < half; i++) f[i] += f[i + half];
  return f[0];
}

}  // namespace
#endif
