// The kernels of token.cpp, written once over the vectors of an instruction set. Values are rounded where torch rounds them
// when it runs the same formula operation by operation, in the dtype of the model.

#ifndef CK_TOKEN_KERNEL_H
#define CK_TOKEN_KERNEL_H

#include "pieces.h"
#include "token.h"

namespace {

// 16 values as float, or as many as there are and zeros.
template <class P>
CK_INLINE void loaded(const void* x, int32_t dtype, int64_t i, int64_t n, float* f) {
  if (n - i >= PIECE) {
    P::store(f, P::floats(at(x, dtype, i), dtype));
    return;
  }
  for (int j = 0; j < PIECE; j++) f[j] = i + j < n ? float_at(x, dtype, i + j) : 0.0f;
}

// To the nearest number of the dtype.
template <class P>
CK_INLINE void rounded(int32_t dtype, float* f) {
  if (dtype == CK_F32) return;
  alignas(64) char some[PIECE * 4];
  P::store_as(some, dtype, P::floats(f));
  P::store(f, P::floats(static_cast<const void*>(some), dtype));
}

template <class P>
void norm(const void* x, const void* weight, void* out, int32_t dtype, int64_t n, float eps) {
  alignas(64) float f[PIECE], w[PIECE], sums[PIECE] = {0};
  for (int64_t i = 0; i < n; i += PIECE) {
    loaded<P>(x, dtype, i, n, f);
    for (int j = 0; j < PIECE; j++) sums[j] += f[j] * f[j];
  }
  for (int half = PIECE / 2; half; half /= 2)
    for (int j = 0; j < half; j++) sums[j] += sums[j + half];
  const float inverse = 1.0f / __builtin_sqrtf(sums[0] / float(n) + eps);
  for (int64_t i = 0; i < n; i += PIECE) {
    loaded<P>(x, dtype, i, n, f);
    loaded<P>(weight, dtype, i, n, w);
    for (int j = 0; j < PIECE; j++) f[j] *= inverse;
    rounded<P>(dtype, f);
    for (int j = 0; j < PIECE; j++) f[j] *= w[j];
    store_piece<P>(at(out, dtype, i), dtype, n - i, P::floats(f));
  }
}

// e^-|x|: 2^k times a polynomial in the rest, at most ln 2 / 2; to about one unit in the last place. 0 where it is below 2^-125.
CK_INLINE float exp_of_negative(float magnitude) {
  const bool small = magnitude >= 87.0f;
  const float x = small ? 0.0f : -magnitude;  // a NaN stays one
  const float shifted = x * 1.44269504f + 12582912.0f, k = shifted - 12582912.0f;
  const float r = (x - k * 0.693359375f) - k * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r) * r + r + 1.0f;
  return small ? 0.0f : p * float_of_bits((bits_of_float(shifted) + 127) << 23);  // the low bits of `shifted` are k
}

template <class P>
void gated(const void* gate, const void* up, void* out, int32_t dtype, int64_t n) {
  alignas(64) float g[PIECE], u[PIECE];
  for (int64_t i = 0; i < n; i += PIECE) {
    loaded<P>(gate, dtype, i, n, g);
    loaded<P>(up, dtype, i, n, u);
    for (int j = 0; j < PIECE; j++) {
      const float e = exp_of_negative(__builtin_fabsf(g[j]));
      g[j] *= (g[j] >= 0.0f ? 1.0f : e) / (1.0f + e);
    }
    rounded<P>(dtype, g);
    for (int j = 0; j < PIECE; j++) g[j] *= u[j];
    store_piece<P>(at(out, dtype, i), dtype, n - i, P::floats(g));
  }
}

template <class P>
void turn(const void* x, const void* cos, const void* sin, void* out, int32_t dtype, int64_t head) {
  const int64_t half = head / 2;
  alignas(64) float a[PIECE], b[PIECE], c[PIECE], s[PIECE], low[PIECE], high[PIECE];
  for (int64_t i = 0; i < half; i += PIECE) {
    loaded<P>(x, dtype, i, half, a);
    loaded<P>(at(x, dtype, half), dtype, i, half, b);
    for (int second = 0; second < 2; second++) {
      loaded<P>(at(cos, dtype, second * half), dtype, i, half, c);
      loaded<P>(at(sin, dtype, second * half), dtype, i, half, s);
      float* sum = second ? high : low;
      for (int j = 0; j < PIECE; j++) c[j] *= second ? b[j] : a[j];
      for (int j = 0; j < PIECE; j++) s[j] *= second ? a[j] : -b[j];
      rounded<P>(dtype, c);
      rounded<P>(dtype, s);
      for (int j = 0; j < PIECE; j++) sum[j] = c[j] + s[j];
    }
    store_piece<P>(at(out, dtype, i), dtype, half - i, P::floats(low));  // both halves have been read: out may be x
    store_piece<P>(at(out, dtype, half + i), dtype, half - i, P::floats(high));
  }
}

template <class P>
constexpr ck::TokenKernels token_table() { return {norm<P>, gated<P>, turn<P>}; }

}  // namespace
#endif
