#include "vectors_portable.h"
#include "token_kernel.h"

namespace {
const ck::TokenKernels kernels = token_table<Portable>();
}

const ck::TokenKernels* ck::token_portable() { return &kernels; }
