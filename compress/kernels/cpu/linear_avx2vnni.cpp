// Compiled twice: for AVX-VNNI, and (CK_VNNI = 2) for processors that have the instruction only as part of AVX-512.
#include "vectors_256.h"
#include "linear_kernel.h"

namespace {
const ck::LinearKernels kernels = table<Avx2>();
}

#if CK_VNNI == 1
const ck::LinearKernels* ck::linear_avx2vnni() { return &kernels; }
#else
const ck::LinearKernels* ck::linear_avx2vnni_vl() { return &kernels; }
#endif
