// What all translation units share. Everything is static or in an unnamed namespace on purpose: each unit is compiled for
// its own instruction set, and a function that the linker merged across units could run where its instructions do not exist.
// For the same reason no C++ standard library headers are used here.

#ifndef CK_COMMON_H
#define CK_COMMON_H

#include <stdint.h>
#include <string.h>

#include "compress_kernels.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#define CK_INLINE static inline __attribute__((always_inline))

#define CK_NOINLINE static __attribute__((noinline))

namespace ck {

enum Isa { PORTABLE = 0, AVX2 = 1, AVX2_VNNI = 2, AVX512 = 3, AVX512_BF16 = 4, N_ISA = 5 };

}  // namespace ck

namespace {

CK_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
CK_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
CK_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
CK_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

CK_INLINE bool dtype_known(int32_t dtype) { return dtype == CK_F32 || dtype == CK_BF16 || dtype == CK_F16; }
CK_INLINE int64_t dtype_bytes(int32_t dtype) { return dtype == CK_F32 ? 4 : 2; }
CK_INLINE bool aligned(const void* p, uintptr_t to) { return (reinterpret_cast<uintptr_t>(p) & (to - 1)) == 0; }

CK_INLINE float float_of_bits(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }
CK_INLINE uint32_t bits_of_float(float f) { uint32_t bits; memcpy(&bits, &f, 4); return bits; }

CK_INLINE float float_of_bf16(uint16_t h) { return float_of_bits(uint32_t(h) << 16); }

CK_INLINE uint16_t bf16_of_float(float f) {
  uint32_t bits = bits_of_float(f);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded);  // a NaN stays one
}

CK_INLINE float float_of_f16(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff;
  if (rest >= 0x7c00) return float_of_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  return float_of_bits(sign | bits_of_float(float_of_bits(rest << 13) * 0x1p112f));  // the exponent rebased, exactly
}

CK_INLINE uint16_t f16_of_float(float f) {
  uint32_t bits = bits_of_float(f), sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (bits >= 0x477ff000) return uint16_t(sign | 0x7c00);  // 65520 and more round to infinity
  if (bits < 0x38800000)                                   // below 2^-14: the sum's last bit is worth 2^-24
    return uint16_t(sign | (bits_of_float(float_of_bits(bits) + 0.5f) - 0x3f000000));
  return uint16_t(sign | (bits - 0x38000000 + 0xfff + ((bits >> 13) & 1)) >> 13);
}

CK_INLINE float float_at(const void* p, int32_t dtype, int64_t i) {
  if (dtype == CK_F32) return static_cast<const float*>(p)[i];
  uint16_t h = static_cast<const uint16_t*>(p)[i];
  return dtype == CK_BF16 ? float_of_bf16(h) : float_of_f16(h);
}

CK_INLINE void put_float(void* p, int32_t dtype, int64_t i, float f) {
  if (dtype == CK_F32) static_cast<float*>(p)[i] = f;
  else static_cast<uint16_t*>(p)[i] = dtype == CK_BF16 ? bf16_of_float(f) : f16_of_float(f);
}

CK_INLINE const void* at(const void* p, int32_t dtype, int64_t i) {
  return static_cast<const char*>(p) + i * dtype_bytes(dtype);
}
CK_INLINE void* at(void* p, int32_t dtype, int64_t i) { return static_cast<char*>(p) + i * dtype_bytes(dtype); }

// Part `thread` of `n_threads` of n things: [begin, end).
struct Range { int64_t begin, end; };
CK_INLINE Range share(int64_t n, int thread, int n_threads) {
  return {n * thread / n_threads, n * (thread + 1) / n_threads};
}

// f(thread, n_threads) on each of at most `n` threads; inside, CK_BARRIER waits for all of them.
#ifdef _OPENMP
#define CK_BARRIER _Pragma("omp barrier")
template <class F>
static inline void parallel(int n, const F& f) {
  if (n <= 1) {
    f(0, 1);
    return;
  }
#pragma omp parallel num_threads(n)
  f(omp_get_thread_num(), omp_get_num_threads());
}
#else
#define CK_BARRIER
template <class F>
static inline void parallel(int, const F& f) { f(0, 1); }
#endif

}  // namespace
#endif
