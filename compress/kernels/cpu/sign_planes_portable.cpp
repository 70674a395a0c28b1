// Sign planes on any processor.

#include "sign_planes.h"

namespace {

// Vectors of 16 floats, of which the compiler makes what the processor has.
struct Portable {
  typedef float Floats __attribute__((vector_size(64)));

  CK_INLINE Floats floats(const float* p) { Floats f; memcpy(&f, p, 64); return f; }
  CK_INLINE Floats floats(const void* p, int32_t dtype) {
    Floats f;
    for (int i = 0; i < 16; i++) f[i] = float_at(p, dtype, i);
    return f;
  }
  CK_INLINE Floats broadcast(float x) { return Floats{} + x; }
  CK_INLINE Floats add(Floats a, Floats b) { return a + b; }
  CK_INLINE Floats sub(Floats a, Floats b) { return a - b; }
  CK_INLINE Floats mul(Floats a, Floats b) { return a * b; }
  CK_INLINE Floats fmadd(Floats a, Floats b, Floats c) { return a * b + c; }
  CK_INLINE void store(float* p, Floats a) { memcpy(p, &a, 64); }
  CK_INLINE void store_as(void* p, int32_t dtype, Floats a) {
    if (dtype == CK_F32) {
      memcpy(p, &a, 64);
    } else {
      for (int i = 0; i < 16; i++)
        static_cast<uint16_t*>(p)[i] = dtype == CK_BF16 ? bf16_of_float(a[i]) : f16_of_float(a[i]);
    }
  }
};

CK_INLINE Portable::Floats flip_positive(Portable::Floats v, uint32_t bits) {
  for (int i = 0; i < 16; i++) v[i] = bits >> i & 1 ? -v[i] : v[i];
  return v;
}

}  // namespace

#include "sign_planes_kernel.h"

namespace {

struct Signs {
  float of[256][8];
  constexpr Signs() : of() {
    for (int byte = 0; byte < 256; byte++)
      for (int i = 0; i < 8; i++) of[byte][i] = byte >> i & 1 ? 1.0f : -1.0f;
  }
};
constexpr Signs SIGNS;  // of the columns of a byte

// Loops over arrays, which every compiler knows how to make vectors of; of a count that it does not know, or it would unroll
// them before.
void row_of_stripe(const SignPlanesCall& call, int64_t row, int64_t column) {
  const int n = int(min64(STRIPE, call.in_features - column));
  const float* inner = call.inner + column * call.all_ranks;
  const float* outer = call.outer + row * call.all_ranks;
  float total[STRIPE] = {};
  for (int64_t b = 0; b < call.n_blocks; b++) {
    float term[STRIPE] = {};
    for (int64_t c = 0; c < call.blocks[b].rank; c++, inner += STRIPE) {
      const float factor = *outer++;
      for (int i = 0; i < n; i++) term[i] += factor * inner[i];
    }
    const uint64_t word = sign_word(call.blocks[b].signs + row * call.row_bytes, column / 8, call.row_bytes);
    for (int byte = 0; byte < STRIPE / 8; byte++)
      for (int i = 0; i < 8; i++) total[8 * byte + i] += SIGNS.of[word >> 8 * byte & 255][i] * term[8 * byte + i];
  }
  for (int i = 0; i < n; i++) {
    const float w = call.scale ? total[i] * float_of_f16(call.scale[column + i]) : total[i];
    const int64_t place = (row - call.first_row) * call.dense_stride + column + i;
    put_float(call.dense, call.dense_dtype, place, w);
  }
}

void rows_of_arrays(const SignPlanesCall& call, int64_t first, int64_t end) {
  for (int64_t panel = 0; panel < call.in_features; panel += PANEL)
    for (int64_t row = first; row < end; row++)
      for (int64_t j = panel; j < min64(panel + PANEL, call.in_features); j += STRIPE) row_of_stripe(call, row, j);
}

}  // namespace

const ck::SignPlanesKernels* ck::sign_planes_portable() {
  static const SignPlanesKernels kernels = {
      float_tables<Portable>, float_rows<Portable>, nullptr, nullptr, nullptr,
      inner_factors<Portable>, outer_factors<Portable>, rows_of_arrays};
  return &kernels;
}
