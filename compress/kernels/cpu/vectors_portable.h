// Vectors of 16 rows as arrays, for any processor; the reference for the other two.

#ifndef CK_VECTORS_PORTABLE_H
#define CK_VECTORS_PORTABLE_H

#include "linear.h"

namespace {

struct Portable {
  // Vectors of the compiler, which it maps to what the processor has (SSE2, NEON).
  typedef uint32_t Words __attribute__((vector_size(64)));
  typedef int32_t Signed __attribute__((vector_size(64)));
  typedef float Reals __attribute__((vector_size(64)));
  struct Bytes { Words v; };  // four bytes to a row, the first one lowest
  struct Ints { Signed v; };
  struct Floats { Reals v; };
  static constexpr int NR = 1, MT = 2, DIRECT = 1, DIRECT_TOKENS = 1, FULL_OFFSET = 0;
  static constexpr bool wide(int, int) { return false; }

  CK_INLINE Bytes bytes(const uint8_t* p) {
    Bytes b;
    memcpy(&b.v, p, 64);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    for (int r = 0; r < 16; r++) b.v[r] = __builtin_bswap32(b.v[r]);
#endif
    return b;
  }
  CK_INLINE void store(uint8_t* p, Bytes b) {
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    for (int r = 0; r < 16; r++) b.v[r] = __builtin_bswap32(b.v[r]);
#endif
    memcpy(p, &b.v, 64);
  }
  CK_INLINE Bytes band(Bytes a, uint8_t mask) { return {a.v & mask * 0x01010101u}; }
  CK_INLINE Bytes bor(Bytes a, Bytes b) { return {a.v | b.v}; }
  CK_INLINE Bytes select2(Bytes a, uint8_t ma, Bytes b, uint8_t mb) { return bor(band(a, ma), band(b, mb)); }
  // Shifts move bits between bytes: the caller masks them, or knows that they are zero.
  template <int N> CK_INLINE Bytes srl(Bytes a) { return {a.v >> N}; }
  template <int N> CK_INLINE Bytes sll(Bytes a) { return {a.v << N}; }

  struct Four { int32_t v[4]; };
  CK_INLINE Four broadcast(const int32_t* p) {  // four activations
    int8_t a[4];
    memcpy(a, p, 4);
    return {{a[0], a[1], a[2], a[3]}};
  }
  CK_INLINE Ints broadcast(int32_t x) { return {Signed{} + x}; }
  CK_INLINE Floats broadcast(float x) { return {Reals{} + x}; }
  template <int J> CK_INLINE Signed byte(Bytes b) { return (Signed)(b.v >> 8 * J & 255u); }
  template <bool> CK_INLINE Ints dp(Ints acc, Bytes w, Four a) {
    return {acc.v + byte<0>(w) * a.v[0] + byte<1>(w) * a.v[1] + byte<2>(w) * a.v[2] + byte<3>(w) * a.v[3]};
  }
  CK_INLINE Ints add(Ints a, Ints b) { return {a.v + b.v}; }
  template <int N> CK_INLINE Ints sra(Ints a) { return {a.v >> N}; }

  CK_INLINE Floats floats(const float* p) { Floats f; memcpy(&f.v, p, 64); return f; }
  CK_INLINE Floats floats(const void* p, int32_t dtype) {
    float f[16];
    for (int r = 0; r < 16; r++) f[r] = float_at(p, dtype, r);
    return floats(f);
  }
  CK_INLINE Floats floats_of_bytes(const uint8_t* p) {
    float f[16];
    for (int r = 0; r < 16; r++) f[r] = p[r];
    return floats(f);
  }
  CK_INLINE Floats to_float(Ints a) { return {__builtin_convertvector(a.v, Reals)}; }
  template <int J> CK_INLINE Floats code(Bytes b) { return {__builtin_convertvector(byte<J>(b), Reals)}; }
  CK_INLINE Floats add(Floats a, Floats b) { return {a.v + b.v}; }
  CK_INLINE Floats sub(Floats a, Floats b) { return {a.v - b.v}; }
  CK_INLINE Floats mul(Floats a, Floats b) { return {a.v * b.v}; }
  CK_INLINE Floats fmadd(Floats a, Floats b, Floats c) { return {a.v * b.v + c.v}; }
  CK_INLINE Floats fnmadd(Floats a, Floats b, Floats c) { return {c.v - a.v * b.v}; }
  CK_INLINE void store(float* p, Floats a) { memcpy(p, &a.v, 64); }
  CK_INLINE void store_as(void* p, int32_t dtype, Floats a) {
    float f[16];
    store(dtype == CK_F32 ? static_cast<float*>(p) : f, a);
    if (dtype == CK_F32) return;
    for (int r = 0; r < 16; r++) static_cast<uint16_t*>(p)[r] = dtype == CK_BF16 ? bf16_of_float(f[r]) : f16_of_float(f[r]);
  }
  CK_INLINE void prefetch(const uint8_t*) {}
};

}  // namespace
#endif
