// AVX-512 with VBMI and BF16: products of 16-bit activations; those of 8 bits are the ones of AVX-512.
#include "linear.h"

const ck::LinearKernels* ck::linear_avx512bf16() { return linear_avx512(); }
