// The kernels of ck_hadamard, written once over the vectors of an instruction set (16 floats each).
//
// Sylvester's matrix: the last four of its factors 2 x 2 together are a product with H_16, a row of signs at a time, so that
// nothing crosses lanes; the others are sums and differences of whole vectors, three factors in one pass over the block. A core
// is a dense product of whole vectors. All in float32; a result does not depend on what else is transformed, or by how many
// threads.

#ifndef CK_HADAMARD_KERNEL_H
#define CK_HADAMARD_KERNEL_H

#include "hadamard.h"

#define CK_UNROLL _Pragma("GCC unroll 32")

namespace {

using ck::HadamardCall;

constexpr int LANES = 16;

CK_INLINE float sign_of(int i, int j) { return __builtin_popcount(unsigned(i & j)) & 1 ? -1.0f : 1.0f; }

struct Signs {
  alignas(64) float row[LANES][LANES];
};

CK_INLINE Signs sylvester16() {
  Signs s;
  for (int i = 0; i < LANES; i++)
    for (int j = 0; j < LANES; j++) s.row[i][j] = sign_of(i, j);
  return s;
}

// Every 16 values with H_16.
template <class P>
CK_INLINE void innermost(float* v, int64_t n, const Signs& signs) {
  for (int64_t at = 0; at < n; at += LANES) {
    auto even = P::mul(P::broadcast(v[at]), P::floats(signs.row[0]));
    auto odd = P::mul(P::broadcast(v[at + 1]), P::floats(signs.row[1]));
    CK_UNROLL for (int i = 2; i < LANES; i += 2) {
      even = P::fmadd(P::broadcast(v[at + i]), P::floats(signs.row[i]), even);
      odd = P::fmadd(P::broadcast(v[at + i + 1]), P::floats(signs.row[i + 1]), odd);
    }
    P::store(v + at, P::add(even, odd));
  }
}

// Factors 2 x 2 at `stride`, 2 stride, ...: RADIX = 2^(how many of them).
template <class P, int RADIX>
CK_INLINE void butterflies(float* v, int64_t n, int64_t stride) {
  for (int64_t first = 0; first < n; first += RADIX * stride)
    for (int64_t at = first; at < first + stride; at += LANES) {
      typename P::Floats a[RADIX];
      CK_UNROLL for (int i = 0; i < RADIX; i++) a[i] = P::floats(v + at + i * stride);
      CK_UNROLL for (int half = 1; half < RADIX; half *= 2)
        CK_UNROLL for (int i = 0; i < RADIX; i++)
          if (!(i & half)) {
            const auto sum = P::add(a[i], a[i + half]);
            a[i + half] = P::sub(a[i], a[i + half]);
            a[i] = sum;
          }
      CK_UNROLL for (int i = 0; i < RADIX; i++) P::store(v + at + i * stride, a[i]);
    }
}

// Along segments of `power` values.
template <class P>
void sylvester(float* v, int64_t n, int64_t power, const Signs& signs) {
  int64_t stride = 1;
  if (power >= LANES) {
    innermost<P>(v, n, signs);
    stride = LANES;
  }
  while (stride < power) {
    if (stride < LANES) {
      for (int64_t first = 0; first < n; first += 2 * stride)
        for (int64_t i = first; i < first + stride; i++) {
          const float sum = v[i] + v[i + stride];
          v[i + stride] = v[i] - v[i + stride];
          v[i] = sum;
        }
      stride *= 2;
    } else if (stride * 8 <= power) {
      butterflies<P, 8>(v, n, stride);
      stride *= 8;
    } else if (stride * 4 <= power) {
      butterflies<P, 4>(v, n, stride);
      stride *= 4;
    } else {
      butterflies<P, 2>(v, n, stride);
      stride *= 2;
    }
  }
}

// out[j][c] = sum_i x[i][c] core[i][j] for J outputs and C vectors of columns.
template <class P, int J, int C>
CK_INLINE void core_part(const float* x, float* out, int64_t order, int64_t behind, const float* core, int64_t j) {
  typename P::Floats sum[J][C];
  CK_UNROLL for (int b = 0; b < J; b++)
    CK_UNROLL for (int c = 0; c < C; c++) sum[b][c] = P::broadcast(0.0f);
  for (int64_t i = 0; i < order; i++) {
    typename P::Floats value[C];
    CK_UNROLL for (int c = 0; c < C; c++) value[c] = P::floats(x + i * behind + c * LANES);
    CK_UNROLL for (int b = 0; b < J; b++) {
      const auto sign = P::broadcast(core[i * order + j + b]);
      CK_UNROLL for (int c = 0; c < C; c++) sum[b][c] = P::fmadd(value[c], sign, sum[b][c]);
    }
  }
  CK_UNROLL for (int b = 0; b < J; b++)
    CK_UNROLL for (int c = 0; c < C; c++) P::store(out + (j + b) * behind + c * LANES, sum[b][c]);
}

template <class P>
void core_axis(const float* x, float* out, int64_t order, int64_t behind, const float* core) {
  constexpr int C = P::NR > 1 ? 2 : 1;
  int64_t column = 0;
  for (; column + C * LANES <= behind; column += C * LANES) {
    int64_t j = 0;
    for (; j + 4 <= order; j += 4) core_part<P, 4, C>(x + column, out + column, order, behind, core, j);
    for (; j < order; j++) core_part<P, 1, C>(x + column, out + column, order, behind, core, j);
  }
  for (; column + LANES <= behind; column += LANES)
    for (int64_t j = 0; j < order; j++) core_part<P, 1, 1>(x + column, out + column, order, behind, core, j);
  if (column == behind) return;
  for (int64_t j = 0; j < order; j++)
    for (int64_t c = column; c < behind; c++) out[j * behind + c] = 0;
  for (int64_t i = 0; i < order; i++)
    for (int64_t j = 0; j < order; j++) {
      const float sign = core[i * order + j];
      for (int64_t c = column; c < behind; c++) out[j * behind + c] += x[i * behind + c] * sign;
    }
}

template <class P>
void hadamard_blocks(const HadamardCall& call, int64_t begin, int64_t end, float* space) {
  const Signs signs = sylvester16();
  const int64_t n = call.block, whole = n / LANES * LANES;
  for (int64_t b = begin; b < end; b++) {
    const int64_t row = b / call.blocks_per_row, column = b % call.blocks_per_row * n;
    const void* x = at(call.x, call.dtype, row * call.x_stride + column);
    void* out = at(call.out, call.dtype, row * call.out_stride + column);
    float *v = space, *other = space + n;
    for (int64_t i = 0; i < whole; i += LANES) P::store(v + i, P::floats(at(x, call.dtype, i), call.dtype));
    for (int64_t i = whole; i < n; i++) v[i] = float_at(x, call.dtype, i);
    sylvester<P>(v, n, call.power, signs);
    int64_t behind = call.power;
    for (int c = call.n_cores - 1; c >= 0; c--) {
      const int64_t size = call.order[c] * behind;
      for (int64_t first = 0; first < n; first += size) core_axis<P>(v + first, other + first, call.order[c], behind, call.core[c]);
      float* swapped = v;
      v = other;
      other = swapped;
      behind = size;
    }
    const auto factor = P::broadcast(call.factor);
    for (int64_t i = 0; i < whole; i += LANES)
      P::store_as(at(out, call.dtype, i), call.dtype, P::mul(P::floats(v + i), factor));
    for (int64_t i = whole; i < n; i++) put_float(out, call.dtype, i, v[i] * call.factor);
  }
}

}  // namespace
#endif
