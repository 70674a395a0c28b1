// What a launch needs from the host side of CUDA.

#ifndef CC_LAUNCH_H
#define CC_LAUNCH_H

#include "compress_cuda.h"
#include "platform.h"

// What a call returns for an error before its launch: the runtime forgets it, else the next call would report it again.
static inline int failed(cudaError_t error) {
  cudaGetLastError();
  return int(error);
}

// Lets a kernel have `bytes` of shared memory: once per kernel and device, since it costs a call into the driver.
template <class Kernel>
static int allow_shared(Kernel kernel, int bytes, uint64_t* allowed_on) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return failed(error);
  if (device < 64 && __atomic_load_n(allowed_on, __ATOMIC_RELAXED) >> device & 1) return CC_OK;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return failed(error);
  if (device < 64) __atomic_fetch_or(allowed_on, uint64_t(1) << device, __ATOMIC_RELAXED);
  return CC_OK;
}

#endif
