// What linear.cpp and the units that hold its kernels agree on.

#ifndef CK_LINEAR_H
#define CK_LINEAR_H

#include "layout.h"

namespace ck {

constexpr int SLAB = 192;  // tokens worked on at a time, at most: codes are unpacked once for them

// One product, and the slab of tokens that is being worked on. Tokens come in slabs, and tokens of a slab in groups, of nearly
// equal size; a group of T tokens lies interleaved, and starts where the tokens before it end:
//   A8   q [k / 4][T][4] int8;  q_scale, q_sum [block][T]:  x = q * q_scale, q_sum the sum of q over the block
//   A16  as the unit that reads it wrote it; at most A16_BYTES per input and token
struct LinearCall {
  Layout layout;
  const uint8_t* codes;
  const void* scales;
  const uint8_t* zeros;  // null: zero_point
  int32_t scale_dtype, zero_point;
  int64_t out_features;
  const void* x;
  void* out;
  const void* bias;
  int32_t x_dtype, bias_dtype;
  int64_t x_stride, out_stride;

  int64_t first_token, n_tokens;
  int64_t n_groups, padded_inputs;
  int8_t* q;
  float* q_scale;
  int32_t* q_sum;
  char* a16;
  float* a16_sum;  // [block][T] per group
};

constexpr int64_t A16_BYTES = 4;

struct LinearWay {
  int slab, group;  // most tokens
  int unit;         // tiles that a thread should take together
  void (*prepare)(const LinearCall& call, int64_t begin, int64_t end);  // (group, block) pairs, blocks innermost
  void (*run)(const LinearCall& call, int64_t first_tile, int64_t end_tile);
};

// Up to so many tokens codes are multiplied as they are unpacked; more: a block of tiles is unpacked once for a slab.
struct LinearWays {
  int64_t direct_tokens;
  LinearWay direct, unpacked;
};

struct LinearKernels { LinearWays a8, a16; };

const LinearKernels* linear_portable();
const LinearKernels* linear_avx2();
const LinearKernels* linear_avx2vnni();    // AVX-VNNI
const LinearKernels* linear_avx2vnni_vl(); // the same with the encoding of AVX-512
const LinearKernels* linear_avx512();
const LinearKernels* linear_avx512bf16();  // A16 of bfloat16 only

}  // namespace ck

namespace {

using ck::LinearCall;

struct Group { int64_t first; int tokens; };  // within the slab

CK_INLINE Group group_at(const LinearCall& call, int64_t i) {
  Range r = share(call.n_tokens, int(i), int(call.n_groups));
  return {r.begin, int(r.end - r.begin)};
}

}  // namespace
#endif
