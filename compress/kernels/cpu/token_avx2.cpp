#include "vectors_256.h"
#include "token_kernel.h"

namespace {
const ck::TokenKernels kernels = token_table<Avx2>();
}

const ck::TokenKernels* ck::token_avx2() { return &kernels; }
