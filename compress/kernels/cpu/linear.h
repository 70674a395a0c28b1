// What linear.cpp and the units that hold its kernels agree on.

#ifndef CK_LINEAR_H
#define CK_LINEAR_H

#include "layout.h"

namespace ck {

constexpr int SLAB = 96;  // tokens worked on at a time: their sums and a block of their activations fit into the first-level cache

// One product, and the slab of tokens that is being worked on. Tokens of a slab come in groups of nearly equal size, at most
// `group_tokens`; a group of T tokens lies interleaved, and starts where the tokens before it end:
//   A8   q [k / 4][T][4] int8;  q_scale, q_sum [block][T]:  x = q * q_scale, q_sum the sum of q over the block
//   A16  as the unit that reads it wrote it; at most A16_BYTES per input
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
  bool direct;  // A8: codes are not unpacked first
  int8_t* q;
  float* q_scale;
  int32_t* q_sum;
  char* a16;
  float* a16_sum;  // [block][T] per group
};

constexpr int64_t A16_BYTES = 8;  // per input and token

struct LinearKernels {
  int a8_direct_tokens, a8_direct_group;  // up to so many tokens codes are not unpacked first; most tokens in a group then
  int a8_group, a8_unit;                  // most tokens in a group; tiles that a thread should take together
  void (*a8_prepare)(const LinearCall& call, int64_t begin, int64_t end);  // (token, block) pairs, blocks innermost
  void (*a8_run)(const LinearCall& call, int64_t first_tile, int64_t end_tile);
  int a16_group, a16_unit;
  void (*a16_prepare)(const LinearCall& call, int64_t begin, int64_t end);
  void (*a16_run)(const LinearCall& call, int64_t first_tile, int64_t end_tile);
};

const LinearKernels* linear_portable();
const LinearKernels* linear_avx2();
const LinearKernels* linear_avx2vnni();    // AVX-VNNI
const LinearKernels* linear_avx2vnni_vl(); // the same with the encoding of AVX-512
const LinearKernels* linear_avx512();
const LinearKernels* linear_avx512bf16();  // A16 only

}  // namespace ck

namespace {

using ck::LinearCall;

struct Group { int64_t first; int tokens; };  // within the slab

CK_INLINE Group group_at(const LinearCall& call, int64_t i) {
  Range r = share(call.n_tokens, int(i), int(call.n_groups));
  return {r.begin, int(r.end - r.begin)};
}
CK_INLINE Group group_of_token(const LinearCall& call, int64_t token) {
  int64_t i = token * call.n_groups / call.n_tokens;
  while (share(call.n_tokens, int(i), int(call.n_groups)).end <= token) i++;
  return group_at(call, i);
}

}  // namespace
#endif
