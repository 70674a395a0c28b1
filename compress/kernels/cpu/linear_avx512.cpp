#include "vectors_512.h"
#include "linear_kernel.h"

namespace {
const ck::LinearKernels kernels = table<Avx512>();
}

const ck::LinearKernels* ck::linear_avx512() { return &kernels; }
