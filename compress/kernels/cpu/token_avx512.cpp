#include "vectors_512.h"
#include "token_kernel.h"

namespace {
const ck::TokenKernels kernels = token_table<Avx512>();
}

const ck::TokenKernels* ck::token_avx512() { return &kernels; }
