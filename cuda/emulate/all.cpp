// All kernels for the CPU, in one translation unit.
#define CC_EMULATE
#include "emulation.cpp"

#include "../dequantize.cu"
#include "../hadamard.cu"
#include "../interface.cu"
#include "../linear_decode.cu"
#include "../linear_tensor.cu"
