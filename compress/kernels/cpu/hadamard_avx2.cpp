#include "vectors_256.h"
#include "hadamard_kernel.h"

ck::HadamardBlocks ck::hadamard_avx2() { return hadamard_blocks<Avx2>; }
