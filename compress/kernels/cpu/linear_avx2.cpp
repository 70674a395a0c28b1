#include "vectors_256.h"
#include "linear_kernel.h"

namespace {
const ck::LinearKernels kernels = table<Avx2>();
}

const ck::LinearKernels* ck::linear_avx2() { return &kernels; }
