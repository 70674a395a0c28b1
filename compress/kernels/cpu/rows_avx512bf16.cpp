// Rows of bfloat16 and tokens of bfloat16 with AVX-512 BF16 and VBMI2: 32 columns at a time, two products to a lane, and kept
// values are spread over their columns as they are (vpexpandw), without becoming float.
//
// Up to ROW_TOKENS tokens, rows are multiplied as they are read, four at once. More: RUN columns of eight rows are spread once into
// the first-level cache, and multiplied with all tokens of a slab, three at once. A row's sum is added in the same order either way.

#include <immintrin.h>

#include "rows.h"

#define CK_UNROLL _Pragma("GCC unroll 32")

namespace {

constexpr int LANES = 32;
constexpr int RUN = 1024;  // columns: eight rows take 16 KB
constexpr int ROWS = 8, FEW_ROWS = 4, TOGETHER = 3, SLAB = 48;

// 32 values, or as many as there are before `end` and zeros.
CK_NOINLINE __m512i loaded_last(const char* from, const char* end, int64_t columns) {
  alignas(64) char some[64] = {0};
  const int64_t n = min64(min64(columns, LANES) * 2, end - from);
  if (n > 0) memcpy(some, from, size_t(n));
  return _mm512_load_si512(some);
}

// The next 32 columns. LAST: the row or the values may end among them.
template <int KIND, bool LAST>
CK_INLINE __m512i next(Cursor& at, const char* end, int64_t columns, const PairTable& table) {
  if constexpr (KIND == DENSE) {
    const __m512i v = LAST ? loaded_last(at.value, end, columns) : _mm512_loadu_si512(at.value);
    at.value += LANES * 2;
    return v;
  } else {
    const __m512i v = LAST ? loaded_last(at.value, end, LANES) : _mm512_loadu_si512(at.value);
    uint32_t mask;
    if constexpr (KIND == BITS) {
      memcpy(&mask, at.place, 4);
    } else {
      mask = table.mask[at.place[0]] | uint32_t(table.mask[at.place[1]]) << 8 |
             uint32_t(table.mask[at.place[2]]) << 16 | uint32_t(table.mask[at.place[3]]) << 24;
    }
    at.place += 4;
    if (LAST && columns < LANES) mask &= (1u << columns) - 1;
    // two of four: 16 values, and no wait for the count
    at.value += KIND == PAIRS && !LAST ? LANES : 2 * __builtin_popcount(mask);
    return _mm512_maskz_expand_epi16(mask, v);
  }
}

template <int KIND>
CK_INLINE int64_t row_bytes(const RowsCall& call, int64_t row) {
  if (KIND == DENSE) return 2 * call.in_features;
  if (call.per_row) return 2 * call.per_row;
  return 2 * bits_set(call.places + row * call.places_stride, ceil_div(call.in_features, 32));
}

template <int KIND>
CK_INLINE int64_t bytes_before(const RowsCall& call, int64_t first) {
  if (KIND == DENSE || call.per_row) return first * row_bytes<KIND>(call, 0);
  int64_t count = 0;
  for (int64_t r = 0; r < first; r++) count += row_bytes<KIND>(call, r);
  return count;
}

template <int KIND, int R>
CK_INLINE void rows_at(const RowsCall& call, int64_t row, int64_t* before, Cursor (&at)[R]) {
  for (int r = 0; r < R; r++) {
    const uint32_t* words = KIND == DENSE ? nullptr : call.places + (row + r) * call.places_stride;
    at[r] = {call.values + *before, reinterpret_cast<const uint8_t*>(words)};
    *before += row_bytes<KIND>(call, row + r);
  }
}

// Columns that can be read without a check: no row has more values than columns, so where so many are left behind the last row's
// first one, none of these rows reads behind the end.
template <int R>
CK_INLINE int64_t free_columns(const RowsCall& call, const Cursor (&start)[R], const char* end) {
  const bool plenty = end - start[R - 1].value >= round_up(call.in_features, LANES) * 2;
  return plenty ? call.in_features / LANES * LANES : 0;
}

CK_INLINE __m512 product(__m512 sum, __m512i w, __m512i x) { return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x); }

CK_INLINE const uint16_t* token_at(const RowsCall& call, int64_t token) {
  return reinterpret_cast<const uint16_t*>(call.x) + token * round_up(call.in_features, LANES);
}

// ---- few tokens --------------------------------------------------------------------------------------------------------

template <int KIND, int R, int T>
CK_NOINLINE void few(const RowsCall& call, int64_t row, const Cursor (&start)[R], const PairTable& table) {
  const char* end = call.values + call.n_values * 2;
  const uint16_t* x = token_at(call, 0);
  const int64_t n = call.in_features, padded = round_up(n, LANES), free = free_columns(call, start, end);
  Cursor at[R];
  __m512 sum[R][T];
  CK_UNROLL for (int r = 0; r < R; r++) {
    at[r] = start[r];
    CK_UNROLL for (int t = 0; t < T; t++) sum[r][t] = _mm512_setzero_ps();
  }
  int64_t k = 0;
  for (; k < free; k += LANES)
    CK_UNROLL for (int r = 0; r < R; r++) {
      _mm_prefetch(at[r].value + 1024, _MM_HINT_T0);
      const __m512i w = next<KIND, false>(at[r], end, LANES, table);
      CK_UNROLL for (int t = 0; t < T; t++) sum[r][t] = product(sum[r][t], w, _mm512_load_si512(x + t * padded + k));
    }
  for (; k < padded; k += LANES)
    CK_UNROLL for (int r = 0; r < R; r++) {
      const __m512i w = next<KIND, true>(at[r], end, n - k, table);
      CK_UNROLL for (int t = 0; t < T; t++) sum[r][t] = product(sum[r][t], w, _mm512_load_si512(x + t * padded + k));
    }
  CK_UNROLL for (int r = 0; r < R; r++)
    CK_UNROLL for (int t = 0; t < T; t++) write_one(call, row + r, t, _mm512_reduce_add_ps(sum[r][t]));
}

template <int KIND, int R>
CK_INLINE void few_of(const RowsCall& call, int64_t row, const Cursor (&start)[R], const PairTable& table) {
  switch (call.tokens) {
    case 1: few<KIND, R, 1>(call, row, start, table); break;
    case 2: few<KIND, R, 2>(call, row, start, table); break;
    case 3: few<KIND, R, 3>(call, row, start, table); break;
    default: few<KIND, R, 4>(call, row, start, table); break;
  }
}

// ---- many tokens -------------------------------------------------------------------------------------------------------

// Up to RUN columns of R rows, spread: [column / 32][R][32].
template <int KIND, int R>
CK_NOINLINE void spread(Cursor (&at)[R], const char* end, int64_t k, int64_t stop, int64_t free, int64_t n,
                        const PairTable& table, uint16_t* to) {
  for (; k < stop; k += LANES, to += R * LANES)
    CK_UNROLL for (int r = 0; r < R; r++) {
      const __m512i w = k < free ? next<KIND, false>(at[r], end, LANES, table) : next<KIND, true>(at[r], end, n - k, table);
      _mm512_store_si512(to + r * LANES, w);
    }
}

template <int R, int T>
CK_NOINLINE void run_of(const uint16_t* w, const uint16_t* x, int64_t padded, int64_t columns, float* sums) {
  __m512 sum[T][R];
  CK_UNROLL for (int t = 0; t < T; t++)
    CK_UNROLL for (int r = 0; r < R; r++) sum[t][r] = _mm512_load_ps(sums + (t * R + r) * 16);
  for (int64_t k = 0; k < columns; k += LANES, w += R * LANES) {
    __m512i token[T];
    CK_UNROLL for (int t = 0; t < T; t++) token[t] = _mm512_load_si512(x + t * padded + k);
    CK_UNROLL for (int r = 0; r < R; r++) {
      const __m512i row = _mm512_load_si512(w + r * LANES);
      CK_UNROLL for (int t = 0; t < T; t++) sum[t][r] = product(sum[t][r], row, token[t]);
    }
  }
  CK_UNROLL for (int t = 0; t < T; t++)
    CK_UNROLL for (int r = 0; r < R; r++) _mm512_store_ps(sums + (t * R + r) * 16, sum[t][r]);
}

template <int KIND, int R>
void many(const RowsCall& call, int64_t row, const Cursor (&start)[R], const PairTable& table) {
  const char* end = call.values + call.n_values * 2;
  const int64_t n = call.in_features, padded = round_up(n, LANES), free = free_columns(call, start, end);
  alignas(64) uint16_t spread_rows[R * RUN];
  alignas(64) float sums[SLAB * R * 16];
  for (int64_t first = 0; first < call.tokens; first += SLAB) {
    const int64_t tokens = min64(SLAB, call.tokens - first);
    Cursor at[R];
    memcpy(at, start, sizeof at);
    memset(sums, 0, size_t(tokens) * R * 16 * sizeof(float));
    for (int64_t k = 0; k < padded; k += RUN) {
      const int64_t columns = min64(RUN, padded - k);
      spread<KIND, R>(at, end, k, k + columns, free, n, table, spread_rows);
      const uint16_t* x = token_at(call, first) + k;
      int64_t t = 0;
      for (; t + TOGETHER <= tokens; t += TOGETHER)
        run_of<R, TOGETHER>(spread_rows, x + t * padded, padded, columns, sums + t * R * 16);
      if (tokens - t == 2) run_of<R, 2>(spread_rows, x + t * padded, padded, columns, sums + t * R * 16);
      if (tokens - t == 1) run_of<R, 1>(spread_rows, x + t * padded, padded, columns, sums + t * R * 16);
    }
    for (int64_t t = 0; t < tokens; t++)
      for (int r = 0; r < R; r++)
        write_one(call, row + r, first + t, _mm512_reduce_add_ps(_mm512_load_ps(sums + (t * R + r) * 16)));
  }
}

template <int KIND>
void run(const RowsCall& call, int64_t first, int64_t end) {
  const PairTable table = pair_table();
  int64_t before = bytes_before<KIND>(call, first), row = first;
  if (call.tokens <= ck::ROW_TOKENS) {
    for (; row + FEW_ROWS <= end; row += FEW_ROWS) {
      Cursor at[FEW_ROWS];
      rows_at<KIND, FEW_ROWS>(call, row, &before, at);
      few_of<KIND, FEW_ROWS>(call, row, at, table);
    }
  } else {
    for (; row + ROWS <= end; row += ROWS) {
      Cursor at[ROWS];
      rows_at<KIND, ROWS>(call, row, &before, at);
      many<KIND, ROWS>(call, row, at, table);
    }
  }
  for (; row < end; row++) {
    Cursor at[1];
    rows_at<KIND, 1>(call, row, &before, at);
    if (call.tokens <= ck::ROW_TOKENS) few_of<KIND, 1>(call, row, at, table);
    else many<KIND, 1>(call, row, at, table);
  }
}

void prepare(const void* x, int64_t n, void* to) {
  const size_t bytes = size_t(n) * 2, padded = size_t(round_up(n, LANES)) * 2;
  memcpy(to, x, bytes);
  memset(static_cast<char*>(to) + bytes, 0, padded - bytes);
}

const ck::RowsHalves kernels = {prepare, {run<DENSE>, run<BITS>, run<PAIRS>}};

}  // namespace

const ck::RowsHalves* ck::rows_avx512bf16() { return &kernels; }
