// What token.cpp and the units that hold its kernels agree on.

#ifndef CK_TOKEN_H
#define CK_TOKEN_H

#include "common.h"

namespace ck {

struct TokenKernels {
  // out = weight * round(x / sqrt(mean(x^2) + eps)), rounded; one row of n
  void (*norm)(const void* x, const void* weight, void* out, int32_t dtype, int64_t n, float eps);
  // out = round(silu(gate)) * up, rounded
  void (*gated)(const void* gate, const void* up, void* out, int32_t dtype, int64_t n);
  // one head: out[i] = round(x[i] cos[i]) + round(turned[i] sin[i]), rounded; turned = (-second half, first half)
  void (*turn)(const void* x, const void* cos, const void* sin, void* out, int32_t dtype, int64_t head);
};

const TokenKernels* token_portable();
const TokenKernels* token_avx2();
const TokenKernels* token_avx512();

}  // namespace ck
#endif
