// What hadamard.cpp and the units that hold its kernels agree on.

#ifndef CK_HADAMARD_H
#define CK_HADAMARD_H

#include "common.h"

namespace ck {

constexpr int MAX_CORES = 8;

// Each block of a row is an array [K1]...[Kc][2^p]: along the last axis goes Sylvester's matrix by sums and differences, along
// the others a core K, a dense matrix of +-1 as it acts from the right: out[j] = sum_i x[i] core[i][j].
struct HadamardCall {
  const void* x;
  void* out;
  int32_t dtype;
  int64_t x_stride, out_stride;
  int64_t block, blocks_per_row, power;  // power: 2^p
  int n_cores;
  int64_t order[MAX_CORES];
  const float* core[MAX_CORES];
  float factor;  // of the result: 1 / sqrt(block)
};

// Blocks [begin, end) of all rows' blocks; space: 2 * block floats, 64-byte aligned.
typedef void (*HadamardBlocks)(const HadamardCall& call, int64_t begin, int64_t end, float* space);

HadamardBlocks hadamard_portable();
HadamardBlocks hadamard_avx2();
HadamardBlocks hadamard_avx512();

}  // namespace ck
#endif
