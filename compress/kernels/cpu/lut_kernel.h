// The kernels of ck_lut_*, written once over the vectors of an instruction set (16 floats each). Before it is included:
//   Table           16 values, a table of fewer repeated: bits of an index above those of a code do not matter
//   table_of(f)     from floats
//   to_bf16(v)      16 floats rounded to bfloat16, as floats; they are no NaN
//   Codes<BITS>     made once; values(p, table): those of 16 codes that start at p, of which 8 bytes can be read
//
// A weight is the very number that the reference makes: with scales, table * scale is rounded to the dtype that they are stored
// in, 16 values at a time, when a group begins. Sums are float32, of a row in the same order whoever adds it.

#ifndef CK_LUT_KERNEL_H
#define CK_LUT_KERNEL_H

#include "lut.h"
#include "pieces.h"

#define CK_UNROLL _Pragma("GCC unroll 32")

namespace {

using ck::LutCall;

constexpr int LANES = 16;

// The first 2^BITS floats from `from`, repeated.
template <int BITS>
CK_INLINE void repeated(const void* from, int32_t dtype, float* to) {
  for (int i = 0; i < LANES; i++) to[i] = float_at(from, dtype, i & ((1 << BITS) - 1));
}

template <class P>
CK_INLINE typename P::Floats rounded(typename P::Floats v, int32_t dtype) {
  if (dtype == CK_F32) return v;
  if (dtype == CK_BF16) return to_bf16(v);
  alignas(64) char some[2 * LANES];
  P::store_as(some, dtype, v);
  return P::floats(static_cast<const void*>(some), dtype);
}

// The table of a group of a row. `shared`: the one table, or null where each row has its own.
template <class P, int BITS>
CK_INLINE Table table_at(const LutCall& call, int64_t row, int64_t group, const float* shared) {
  alignas(64) float f[LANES];
  if (!shared) {
    repeated<BITS>(at(call.table, call.dtype, row << BITS), call.dtype, f);
  } else {
    const float scale = float_at(call.scale, call.dtype, row * call.n_groups + group);
    P::store(f, rounded<P>(P::mul(P::floats(shared), P::broadcast(scale)), call.dtype));
  }
  return table_of(f);
}

// 16 weights. `left`: bytes of the row from p on.
template <class P, int BITS>
CK_INLINE typename P::Floats weights(const Codes<BITS>& codes, const uint8_t* p, int64_t left, const Table& table) {
  if (left >= 8) return codes.values(p, table);
  uint8_t some[8] = {0};
  memcpy(some, p, size_t(max64(left, 0)));
  return codes.values(some, table);
}

CK_INLINE void write_one(const LutCall& call, int64_t row, int token, float sum) {
  void* to = at(call.out, call.out_dtype, token * call.out_stride + row);
  if (call.bias) sum += float_at(call.bias, call.bias_dtype, row);
  put_float(to, call.out_dtype, 0, sum);
}

template <class P, int BITS, int R, int T>
CK_NOINLINE void lut_block(const LutCall& call, int64_t row, const float* shared) {
  const Codes<BITS> codes;
  const int64_t padded = call.padded, n = call.row_bytes;
  const uint8_t* p[R];
  typename P::Floats sum[R][T];
  Table table[R];
  CK_UNROLL for (int r = 0; r < R; r++) {
    p[r] = call.codes + (row + r) * n;
    CK_UNROLL for (int t = 0; t < T; t++) sum[r][t] = P::broadcast(0.0f);
  }
  int64_t k = 0;
  for (int64_t group = 0; group < call.n_groups; group++) {
    CK_UNROLL for (int r = 0; r < R; r++) table[r] = table_at<P, BITS>(call, row + r, group, shared);
    const int64_t end = min64(k + call.group_size, padded);
    for (; k < end && (k * BITS / 8) + 8 <= n; k += LANES)
      CK_UNROLL for (int r = 0; r < R; r++) {
        P::prefetch(p[r] + k * BITS / 8);
        const auto w = codes.values(p[r] + k * BITS / 8, table[r]);
        CK_UNROLL for (int t = 0; t < T; t++) sum[r][t] = P::fmadd(w, P::floats(call.x + t * padded + k), sum[r][t]);
      }
    for (; k < end; k += LANES)
      CK_UNROLL for (int r = 0; r < R; r++) {
        const auto w = weights<P, BITS>(codes, p[r] + k * BITS / 8, n - k * BITS / 8, table[r]);
        CK_UNROLL for (int t = 0; t < T; t++) sum[r][t] = P::fmadd(w, P::floats(call.x + t * padded + k), sum[r][t]);
      }
  }
  CK_UNROLL for (int r = 0; r < R; r++)
    CK_UNROLL for (int t = 0; t < T; t++) write_one(call, row + r, t, total_of<P>(sum[r][t]));
}

template <class P, int BITS, int T>
CK_INLINE void lut_tokens(const LutCall& call, int64_t first, int64_t end, const float* shared) {
  constexpr int R = P::NR > 1 ? 4 : 1;
  int64_t row = first;
  for (; row + R <= end; row += R) lut_block<P, BITS, R, T>(call, row, shared);
  for (; row < end; row++) lut_block<P, BITS, 1, T>(call, row, shared);
}

template <class P, int BITS>
void lut_run(const LutCall& call, int64_t first, int64_t end) {
  alignas(64) float f[LANES];
  repeated<BITS>(call.table, call.dtype, f);
  const float* shared = call.scale ? f : nullptr;
  switch (call.tokens) {
    case 1: lut_tokens<P, BITS, 1>(call, first, end, shared); break;
    case 2: lut_tokens<P, BITS, 2>(call, first, end, shared); break;
    case 3: lut_tokens<P, BITS, 3>(call, first, end, shared); break;
    default: lut_tokens<P, BITS, 4>(call, first, end, shared); break;
  }
}

template <class P, int BITS>
void lut_write(const LutCall& call, int64_t first, int64_t end) {
  const Codes<BITS> codes;
  alignas(64) float f[LANES];
  repeated<BITS>(call.table, call.dtype, f);
  const float* shared = call.scale ? f : nullptr;
  for (int64_t row = first; row < end; row++) {
    const uint8_t* p = call.codes + row * call.row_bytes;
    for (int64_t group = 0, k = 0; group < call.n_groups; group++) {
      const Table table = table_at<P, BITS>(call, row, group, shared);
      for (const int64_t stop = min64(k + call.group_size, call.padded); k < stop; k += LANES) {
        const auto w = weights<P, BITS>(codes, p + k * BITS / 8, call.row_bytes - k * BITS / 8, table);
        store_piece<P>(at(call.out, call.out_dtype, row * call.out_stride + k), call.out_dtype, call.in_features - k, w);
      }
    }
  }
}

template <class P>
constexpr ck::LutKernels lut_table() {
  return {padded_floats<P>, {lut_run<P, 2>, lut_run<P, 3>, lut_run<P, 4>}, {lut_write<P, 2>, lut_write<P, 3>, lut_write<P, 4>}};
}

}  // namespace
#endif
