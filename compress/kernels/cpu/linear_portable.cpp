// Compiled for any processor of the architecture.
#include "vectors_portable.h"
#include "linear_kernel.h"

namespace {
const ck::LinearKernels kernels = table<Portable>();
}

const ck::LinearKernels* ck::linear_portable() { return &kernels; }
