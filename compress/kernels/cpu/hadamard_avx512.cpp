#include "vectors_512.h"
#include "hadamard_kernel.h"

ck::HadamardBlocks ck::hadamard_avx512() { return hadamard_blocks<Avx512>; }
