#include "vectors_portable.h"
#include "hadamard_kernel.h"

ck::HadamardBlocks ck::hadamard_portable() { return hadamard_blocks<Portable>; }
