// The instructions that the kernels are written in, one function each. emulate/emulation.h has the same ones for the CPU.

#ifndef CC_INTRINSICS_H
#define CC_INTRINSICS_H

#include "platform.h"

#ifndef CC_EMULATE

CC_DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// A cache policy for data that is read once: first to leave the L2.
CC_DEVICE uint64_t read_once() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Asynchronous copies global -> shared. Of 16 bytes: past the L1, read once.
CC_DEVICE void copy_once(void* to, const void* from, uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "l"(policy)
               : "memory");
}
// Of 16 bytes, or 16 zeros.
CC_DEVICE void copy_or_zero(void* to, const void* from, bool real) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(real ? 16 : 0)
               : "memory");
}
CC_DEVICE void copy_8(void* to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
CC_DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
CC_DEVICE void copies_wait() {  // until at most the N last groups of this thread are under way
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

CC_DEVICE void block_barrier() { __syncthreads(); }
CC_DEVICE void warp_barrier() { __syncwarp(); }
CC_DEVICE float from_lane(float value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }

template <class T>
CC_DEVICE uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c);
template <>
__device__ __forceinline__ uint32_t fma_pair<F16>(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
template <>
__device__ __forceinline__ uint32_t fma_pair<BF16>(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// (word & mask) | pattern in one instruction: written out, it becomes two, since each takes one constant.
CC_DEVICE uint32_t and_or(uint32_t word, uint32_t mask, uint32_t pattern) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(word), "r"(mask), "r"(pattern));
  return d;
}

// Computed here, once: without it the compiler saves a register by computing `value` anew in every turn of a loop.
CC_DEVICE int keep(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

CC_DEVICE uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }
CC_DEVICE float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }

template <class T>
CC_DEVICE float float_of_half(uint16_t bits);
template <>
__device__ __forceinline__ float float_of_half<F16>(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
template <>
__device__ __forceinline__ float float_of_half<BF16>(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }

template <class T>
CC_DEVICE uint16_t half_of_float(float value);  // to nearest, ties to even
template <>
__device__ __forceinline__ uint16_t half_of_float<F16>(float value) { return __half_as_ushort(__float2half_rn(value)); }
template <>
__device__ __forceinline__ uint16_t half_of_float<BF16>(float value) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(value));
}

template <class T>
CC_DEVICE uint32_t pack_pair(float low, float high) {
  return uint32_t(half_of_float<T>(low)) | uint32_t(half_of_float<T>(high)) << 16;
}
template <>
__device__ __forceinline__ uint32_t pack_pair<BF16>(float low, float high) {
  uint32_t d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

// d[16 x 8] += a[16 x 16] b[16 x 8]. Lane 4 g + t: a rows g (registers 0, 2), g + 8 (1, 3), columns 2t, 2t+1 (0, 1) and
// 2t+8, 2t+9 (2, 3); b rows 2t, 2t+1 (0) and 2t+8, 2t+9 (1) of column g; d rows g (0, 1), g + 8 (2, 3), columns 2t, 2t+1.
template <class T>
CC_DEVICE void multiply(float* d, const uint32_t* a, uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void multiply<F16>(float* d, const uint32_t* a, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply<BF16>(float* d, const uint32_t* a, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

CC_DEVICE uint4 load_16(const void* p) { return *static_cast<const uint4*>(p); }          // shared or global
CC_DEVICE uint4 load_constant(const void* p) { return __ldg(static_cast<const uint4*>(p)); }  // written by no one meanwhile
CC_DEVICE uint2 load_8(const void* p) { return *static_cast<const uint2*>(p); }

#endif
#endif
