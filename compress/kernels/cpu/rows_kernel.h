// The kernels of ck_rows_*, written once over the vectors of an instruction set (16 floats each). Before it is included:
// expanded(v, mask) puts the first values of v where `mask` has ones, in order, and 0 elsewhere.
//
// A row is read 16 columns at a time and multiplied with up to four tokens; four rows at once, so that the place where a row's
// next values start (it follows from the mask) is not waited for. A row's sum is added in the same order whoever adds it.

#ifndef CK_ROWS_KERNEL_H
#define CK_ROWS_KERNEL_H

#include "pieces.h"
#include "rows.h"

#define CK_UNROLL _Pragma("GCC unroll 32")

namespace {

constexpr int LANES = 16;
// 16 values, or as many as there are before `end` and zeros.
template <class P, int DTYPE>
CK_NOINLINE typename P::Floats loaded_last(const char* from, const char* end, int64_t columns) {
  constexpr int64_t SIZE = DTYPE == CK_F32 ? 4 : 2;
  alignas(64) char some[LANES * SIZE] = {0};
  const int64_t n = min64(min64(columns, LANES) * SIZE, end - from);
  if (n > 0) memcpy(some, from, size_t(n));
  return P::floats(static_cast<const void*>(some), DTYPE);
}

// The next 16 columns. LAST: the row or the values may end among them.
template <class P, int KIND, int DTYPE, bool LAST>
CK_INLINE typename P::Floats next(Cursor& at, const char* end, int64_t columns, const PairTable& table) {
  constexpr int64_t SIZE = DTYPE == CK_F32 ? 4 : 2;
  typename P::Floats v;
  if constexpr (LAST) v = loaded_last<P, DTYPE>(at.value, end, KIND == DENSE ? columns : LANES);
  else v = P::floats(static_cast<const void*>(at.value), DTYPE);
  if constexpr (KIND == DENSE) {
    at.value += LANES * SIZE;
    return v;
  } else {
    uint32_t mask;
    if constexpr (KIND == BITS) {
      uint16_t bits;
      memcpy(&bits, at.place, 2);
      mask = bits;
    } else {
      mask = table.mask[at.place[0]] | uint32_t(table.mask[at.place[1]]) << 8;
    }
    at.place += 2;
    if (LAST && columns < LANES) mask &= (1u << columns) - 1;
    at.value += __builtin_popcount(mask) * SIZE;
    return expanded(v, mask);
  }
}

// Bytes of values before row `first`.
template <int KIND, int DTYPE>
CK_INLINE int64_t values_before(const RowsCall& call, int64_t first) {
  constexpr int64_t SIZE = DTYPE == CK_F32 ? 4 : 2;
  if (KIND == DENSE || call.per_row) return first * (KIND == DENSE ? call.in_features : call.per_row) * SIZE;
  int64_t count = 0;
  for (int64_t r = 0; r < first; r++) count += bits_set(call.places + r * call.places_stride, ceil_div(call.in_features, 32));
  return count * SIZE;
}

template <int KIND, int DTYPE>
CK_INLINE Cursor row_at(const RowsCall& call, int64_t row, int64_t* before) {
  constexpr int64_t SIZE = DTYPE == CK_F32 ? 4 : 2;
  const uint32_t* words = KIND == DENSE ? nullptr : call.places + row * call.places_stride;
  const Cursor at = {call.values + *before, reinterpret_cast<const uint8_t*>(words)};
  *before += SIZE * (KIND == DENSE ? call.in_features
                                   : call.per_row ? call.per_row : bits_set(words, ceil_div(call.in_features, 32)));
  return at;
}

template <class P, int KIND, int DTYPE, int R, int T>
CK_NOINLINE void rows_block(const RowsCall& call, int64_t row, const Cursor (&start)[R], const PairTable& table) {
  const int64_t n = call.in_features, padded = call.padded;
  const char* end = call.values + call.n_values * (DTYPE == CK_F32 ? 4 : 2);
  const float* x = call.x;
  Cursor at[R];
  typename P::Floats sum[R][T];
  CK_UNROLL for (int r = 0; r < R; r++) {
    at[r] = start[r];
    CK_UNROLL for (int t = 0; t < T; t++) sum[r][t] = P::broadcast(0.0f);
  }
  // No row has more than n values: where so many are left behind the last row's first one, nothing need be checked.
  const int64_t free = end - start[R - 1].value >= padded * (DTYPE == CK_F32 ? 4 : 2) ? n / LANES * LANES : 0;
  int64_t k = 0;
  for (; k < free; k += LANES) {
    CK_UNROLL for (int r = 0; r < R; r++) {
      if (KIND == DENSE) P::prefetch(reinterpret_cast<const uint8_t*>(at[r].value));
      const auto w = next<P, KIND, DTYPE, false>(at[r], end, LANES, table);
      CK_UNROLL for (int t = 0; t < T; t++) sum[r][t] = P::fmadd(w, P::floats(x + t * padded + k), sum[r][t]);
    }
  }
  for (; k < padded; k += LANES)
    CK_UNROLL for (int r = 0; r < R; r++) {
      const auto w = next<P, KIND, DTYPE, true>(at[r], end, n - k, table);
      CK_UNROLL for (int t = 0; t < T; t++) sum[r][t] = P::fmadd(w, P::floats(x + t * padded + k), sum[r][t]);
    }
  CK_UNROLL for (int r = 0; r < R; r++)
    CK_UNROLL for (int t = 0; t < T; t++) write_one(call, row + r, t, total_of<P>(sum[r][t]));
}

template <class P, int KIND, int DTYPE, int T>
CK_INLINE void rows_of_tokens(const RowsCall& call, int64_t first, int64_t end) {
  constexpr int R = P::NR > 1 ? 4 : 2;
  const PairTable table = pair_table();
  int64_t before = values_before<KIND, DTYPE>(call, first), row = first;
  for (; row + R <= end; row += R) {
    Cursor at[R];
    for (int r = 0; r < R; r++) at[r] = row_at<KIND, DTYPE>(call, row + r, &before);
    rows_block<P, KIND, DTYPE, R, T>(call, row, at, table);
  }
  for (; row < end; row++) {
    Cursor at[1] = {row_at<KIND, DTYPE>(call, row, &before)};
    rows_block<P, KIND, DTYPE, 1, T>(call, row, at, table);
  }
}

template <class P, int KIND, int DTYPE>
void rows_run(const RowsCall& call, int64_t first, int64_t end) {
  switch (call.tokens) {
    case 1: rows_of_tokens<P, KIND, DTYPE, 1>(call, first, end); break;
    case 2: rows_of_tokens<P, KIND, DTYPE, 2>(call, first, end); break;
    case 3: rows_of_tokens<P, KIND, DTYPE, 3>(call, first, end); break;
    default: rows_of_tokens<P, KIND, DTYPE, 4>(call, first, end); break;
  }
}

template <class P, int KIND, int DTYPE>
void rows_write(const RowsCall& call, int64_t first, int64_t end) {
  const PairTable table = pair_table();
  const char* stop = call.values + call.n_values * (DTYPE == CK_F32 ? 4 : 2);
  int64_t before = values_before<KIND, DTYPE>(call, first);
  for (int64_t row = first; row < end; row++) {
    Cursor from = row_at<KIND, DTYPE>(call, row, &before);
    for (int64_t k = 0; k < call.in_features; k += LANES) {
      const bool last = call.in_features - k < LANES || stop - from.value < LANES * int64_t(DTYPE == CK_F32 ? 4 : 2);
      const auto v = last ? next<P, KIND, DTYPE, true>(from, stop, call.in_features - k, table)
                          : next<P, KIND, DTYPE, false>(from, stop, LANES, table);
      store_piece<P>(at(call.out, call.out_dtype, row * call.out_stride + k), call.out_dtype, call.in_features - k, v);
    }
  }
}

#define CK_ROWS_TABLE(P, F)                                                                                    \
  {{F<P, DENSE, CK_F32>, F<P, DENSE, CK_BF16>, F<P, DENSE, CK_F16>},                                           \
   {F<P, BITS, CK_F32>, F<P, BITS, CK_BF16>, F<P, BITS, CK_F16>},                                              \
   {F<P, PAIRS, CK_F32>, F<P, PAIRS, CK_BF16>, F<P, PAIRS, CK_F16>}}

template <class P>
constexpr ck::RowsKernels rows_table() {
  return {padded_floats<P>, CK_ROWS_TABLE(P, rows_run), CK_ROWS_TABLE(P, rows_write)};
}

}  // namespace
#endif
