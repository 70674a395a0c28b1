// What stands between the kernels and what they are compiled for: the device, by nvcc, or the CPU, by any C++17 compiler
// with CC_EMULATE defined (emulate/emulation.h: the same sources, run lane by lane, for tests without a GPU).

#ifndef CC_PLATFORM_H
#define CC_PLATFORM_H

#include <stdint.h>

#ifdef CC_EMULATE
#include "emulate/emulation.h"
#define CC_HD static inline
#define CC_DEVICE static inline
#define CC_CONST constexpr
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define CC_HD static __host__ __device__ __forceinline__
#define CC_DEVICE static __device__ __forceinline__
#define CC_CONST __host__ __device__ constexpr
#define CC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#define CC_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
#endif

// The two activation types, as tags; values are handled as their 16 bits.
struct F16 {
  static constexpr int MANTISSA = 10, BIAS = 15;
};
struct BF16 {
  static constexpr int MANTISSA = 7, BIAS = 127;
};

#endif
