// What rows.cpp and the units that hold its kernels agree on.

#ifndef CK_ROWS_H
#define CK_ROWS_H

#include "common.h"

namespace ck {

constexpr int ROW_TOKENS = 4;  // that are multiplied with a row while it is read once

struct RowsCall {
  const char* values;
  int64_t n_values;         // in all
  const uint32_t* places;   // null: CK_ROWS_DENSE
  int64_t places_stride;    // words
  int64_t per_row;          // values; 0: as many as bits are set
  int64_t in_features, padded;  // padded to whole vectors
  const float* x;           // [tokens][padded], zeros behind in_features; RowsHalves: bfloat16, padded to 32
  int tokens;               // up to ROW_TOKENS; RowsHalves: any number
  void* out;                // of the first token
  int32_t out_dtype;
  int64_t out_stride;
  const void* bias;
  int32_t bias_dtype;
  bool add;                 // to what is in out
};

struct RowsKernels {
  void (*prepare)(const void* x, int32_t dtype, int64_t n, int64_t padded, float* to);  // one token
  void (*run[3][3])(const RowsCall& call, int64_t first, int64_t end);                  // [CK_ROWS_*][dtype of values]
  void (*write[3][3])(const RowsCall& call, int64_t first, int64_t end);                // rows themselves into out, by out_stride
};

// Values and tokens in bfloat16.
struct RowsHalves {
  void (*prepare)(const void* x, int64_t n, void* to);                // one token
  void (*run[3])(const RowsCall& call, int64_t first, int64_t end);   // [CK_ROWS_*]
};

const RowsKernels* rows_portable();
const RowsKernels* rows_avx2();
const RowsKernels* rows_avx512();
const RowsHalves* rows_avx512bf16();

}  // namespace ck

namespace {

using ck::RowsCall;

enum { DENSE = 0, BITS = 1, PAIRS = 2 };  // CK_ROWS_*

struct PairTable {
  uint8_t mask[256];
};

// Two groups of four: in each the places of two values, two bits a place -> a bit per column.
CK_INLINE PairTable pair_table() {
  PairTable t;
  for (int b = 0; b < 256; b++)
    t.mask[b] = uint8_t(1 << (b & 3) | 1 << (b >> 2 & 3) | 1 << (4 + (b >> 4 & 3)) | 1 << (4 + (b >> 6)));
  return t;
}

// Where a row is being read.
struct Cursor {
  const char* value;
  const uint8_t* place;
};

CK_INLINE int64_t bits_set(const uint32_t* words, int64_t n) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; i++) count += __builtin_popcount(words[i]);
  return count;
}

CK_INLINE void write_one(const RowsCall& call, int64_t row, int64_t token, float sum) {
  void* to = at(call.out, call.out_dtype, token * call.out_stride + row);
  if (call.bias) sum += float_at(call.bias, call.bias_dtype, row);
  if (call.add) sum += float_at(to, call.out_dtype, 0);
  put_float(to, call.out_dtype, 0, sum);
}

}  // namespace
#endif
