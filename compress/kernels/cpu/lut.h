// What lut.cpp and the units that hold its kernels agree on.

#ifndef CK_LUT_H
#define CK_LUT_H

#include "common.h"

namespace ck {

constexpr int LUT_TOKENS = 4;  // that are multiplied with a row while it is read once

struct LutCall {
  const uint8_t* codes;  // [out][row_bytes]
  int64_t row_bytes;
  const void* table;     // [2^bits], or [out][2^bits] without scales
  const void* scale;     // [out][n_groups]; null: a table per row
  int32_t dtype;         // of both
  int32_t bits;
  int64_t n_groups, group_size;
  int64_t out_features, in_features, padded;  // padded to whole vectors
  const float* x;        // [tokens][padded], zeros behind in_features
  int tokens;            // up to LUT_TOKENS
  void* out;             // of the first token
  int32_t out_dtype;
  int64_t out_stride;
  const void* bias;
  int32_t bias_dtype;
};

struct LutKernels {
  void (*prepare)(const void* x, int32_t dtype, int64_t n, int64_t padded, float* to);  // one token
  void (*run[3])(const LutCall& call, int64_t first, int64_t end);                      // by bits - 2
  void (*write[3])(const LutCall& call, int64_t first, int64_t end);                    // rows themselves into out, by out_stride
};

const LutKernels* lut_portable();
const LutKernels* lut_avx2();
const LutKernels* lut_avx512();

}  // namespace ck
#endif
