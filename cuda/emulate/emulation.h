// The device on a CPU: enough of it to run the kernels' own sources lane by lane, and to catch what a GPU would not tell.
//
// Every CUDA thread is a fiber; a barrier or a warp instruction parks it until the others have come. Asynchronous copies
// are carried out when they are waited for, not before; shared memory begins as NaN; misaligned accesses, lanes that meet
// in different instructions, barriers that not all reach and copies that nobody waited for abort with a message.
// What this cannot show: memory ordering between lanes beyond barriers, speed, and the device's own rounding inside mma
// (here products are summed in double and rounded to float once).

#ifndef CC_EMULATION_H
#define CC_EMULATION_H

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <functional>

#define __global__
#define __launch_bounds__(...)
#define CC_SHARED(name) unsigned char* name = emulate::shared_memory()
#define CC_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ((void)(stream), emulate::launch(grid, block, shared_bytes, [=] { kernel(__VA_ARGS__); }))

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint2 { uint32_t x, y; };
struct uint4 { uint32_t x, y, z, w; };
struct float2 { float x, y; };
static inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
static inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
using std::max;
using std::min;

typedef void* cudaStream_t;
typedef int cudaError_t;
enum { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
cudaError_t cudaGetLastError();
static inline cudaError_t cudaGetDevice(int* device) { return *device = 0; }
static inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 101376, cudaSuccess; }
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {  // 99 KB: what sm_86 and sm_89 have
  return bytes <= 101376 ? cudaSuccess : cudaErrorInvalidConfiguration;
}

namespace emulate {

struct Index { unsigned x, y, z; };
extern Index thread_index, block_index;
extern dim3 block_shape, grid_shape;

void launch(dim3 grid, dim3 block, int64_t shared_bytes, const std::function<void()>& body);
unsigned char* shared_memory();
void copy_async(void* to, const void* from, int bytes, bool real);
void copy_commit();
void copy_wait(int n);
void block_barrier();
void warp_barrier();
float from_lane(float value, int lane);
void multiply(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, float (*value)(uint16_t));
[[noreturn]] void fail(const char* what);

inline void check_aligned(const void* p, int bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) fail("a misaligned access");
}
inline float float_of_bits(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }
inline uint32_t bits_of_float(float f) { uint32_t bits; memcpy(&bits, &f, 4); return bits; }

inline float float_of_f16(uint16_t h) {
  const int exponent = h >> 10 & 31, fraction = h & 1023;
  const float magnitude = exponent == 31 ? (fraction ? NAN : INFINITY)
                          : exponent     ? ldexpf(float(1024 + fraction), exponent - 25)
                                         : ldexpf(float(fraction), -24);
  return h & 0x8000 ? -magnitude : magnitude;
}
inline float float_of_bf16(uint16_t h) { return float_of_bits(uint32_t(h) << 16); }

// To nearest, ties to even, of any double: nearbyint in units of the last place.
inline uint16_t f16_of(double value) {
  const uint16_t sign = signbit(value) ? 0x8000 : 0;
  double magnitude = fabs(value);
  if (isnan(value)) return 0x7fff;
  if (magnitude >= 65520.0) return sign | 0x7c00;
  const int exponent = std::max(magnitude > 0 ? ilogb(magnitude) : -14, -14);
  const int units = int(nearbyint(ldexp(magnitude, 10 - exponent)));  // < 1024 only if subnormal; 2048 carries over
  return sign | uint16_t(units + (exponent + 14) * 1024);
}
inline uint16_t bf16_of(double value) {
  if (isnan(value)) return 0x7fff;
  if (value == 0 || isinf(value)) return uint16_t(bits_of_float(float(value)) >> 16);
  const int exponent = std::max(ilogb(value), -126);
  return uint16_t(bits_of_float(float(ldexp(nearbyint(ldexp(value, 7 - exponent)), exponent - 7))) >> 16);
}

}  // namespace emulate

#define threadIdx emulate::thread_index
#define blockIdx emulate::block_index
#define blockDim emulate::block_shape
#define gridDim emulate::grid_shape

struct F16;
struct BF16;

static inline uint64_t read_once() { return 0; }
static inline void copy_once(void* to, const void* from, uint64_t) { emulate::copy_async(to, from, 16, true); }
static inline void copy_or_zero(void* to, const void* from, bool real) { emulate::copy_async(to, from, 16, real); }
static inline void copy_8(void* to, const void* from) { emulate::copy_async(to, from, 8, true); }
static inline void copies_commit() { emulate::copy_commit(); }
template <int N>
static inline void copies_wait() { emulate::copy_wait(N); }
static inline void block_barrier() { emulate::block_barrier(); }
static inline void warp_barrier() { emulate::warp_barrier(); }
static inline float from_lane(float value, int lane) { return emulate::from_lane(value, lane); }

template <class T>
float float_of_half(uint16_t bits);
template <>
inline float float_of_half<F16>(uint16_t bits) { return emulate::float_of_f16(bits); }
template <>
inline float float_of_half<BF16>(uint16_t bits) { return emulate::float_of_bf16(bits); }
template <class T>
uint16_t half_of_double(double value);
template <>
inline uint16_t half_of_double<F16>(double value) { return emulate::f16_of(value); }
template <>
inline uint16_t half_of_double<BF16>(double value) { return emulate::bf16_of(value); }
template <class T>
uint16_t half_of_float(float value) { return half_of_double<T>(value); }
template <class T>
uint32_t pack_pair(float low, float high) { return half_of_float<T>(low) | uint32_t(half_of_float<T>(high)) << 16; }
template <class T>
uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c) {  // the product of two halves is exact in double
  uint32_t d = 0;
  for (int i = 0; i < 32; i += 16)
    d |= uint32_t(half_of_double<T>(double(float_of_half<T>(uint16_t(a >> i))) * float_of_half<T>(uint16_t(b >> i)) +
                                    float_of_half<T>(uint16_t(c >> i)))) << i;
  return d;
}
static inline int keep(int value) { return value; }
static inline uint32_t and_or(uint32_t word, uint32_t mask, uint32_t pattern) { return (word & mask) | pattern; }
static inline uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t d = 0;
  for (int i = 0; i < 4; ++i) d |= uint32_t(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return d;
}
static inline float float_of_bits(uint32_t bits) { return emulate::float_of_bits(bits); }
template <class T>
void multiply(float* d, const uint32_t* a, uint32_t b0, uint32_t b1) {
  emulate::multiply(d, a, b0, b1, float_of_half<T>);
}
static inline uint4 load_16(const void* p) {
  emulate::check_aligned(p, 16);
  uint4 v;
  memcpy(&v, p, 16);
  return v;
}
static inline uint4 load_constant(const void* p) { return load_16(p); }
static inline uint2 load_8(const void* p) {
  emulate::check_aligned(p, 8);
  uint2 v;
  memcpy(&v, p, 8);
  return v;
}

#endif
