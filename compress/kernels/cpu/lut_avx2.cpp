// Tables with AVX2: permutations have 8 floats, and a blend by the fourth bit of a code chooses between two of them.
#include "vectors_256.h"

namespace {

struct Table {
  __m256 low, high;
};
CK_INLINE Table table_of(const float* f) { return {_mm256_load_ps(f), _mm256_load_ps(f + 8)}; }

CK_INLINE __m256 to_bf16(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  return _mm256_castsi256_ps(_mm256_and_si256(rounded, _mm256_set1_epi32(int(0xffff0000))));
}
CK_INLINE Avx2::Floats to_bf16(Avx2::Floats v) { return {to_bf16(v.lo), to_bf16(v.hi)}; }

template <int BITS>
struct Codes {
  __m256i bytes[2], shifts[2];
  __attribute__((always_inline)) Codes() {
    alignas(32) uint8_t from[64];
    alignas(32) int32_t shift[16];
    for (int i = 0; i < 16; i++) {
      for (int j = 0; j < 4; j++) from[4 * i + j] = j < 2 ? uint8_t(i * BITS / 8 + j) : 0x80;
      shift[i] = i * BITS % 8;
    }
    for (int h = 0; h < 2; h++) {
      bytes[h] = _mm256_load_si256(reinterpret_cast<const __m256i*>(from) + h);
      shifts[h] = _mm256_load_si256(reinterpret_cast<const __m256i*>(shift) + h);
    }
  }
  __attribute__((always_inline)) __m256 half(__m256i all, int h, const Table& table) const {
    const __m256i index = _mm256_srlv_epi32(_mm256_shuffle_epi8(all, bytes[h]), shifts[h]);
    const __m256 low = _mm256_permutevar8x32_ps(table.low, index);
    if (BITS < 4) return low;
    const __m256 high = _mm256_permutevar8x32_ps(table.high, index);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
  }
  __attribute__((always_inline)) Avx2::Floats values(const uint8_t* p, const Table& table) const {
    const __m256i all = _mm256_broadcastsi128_si256(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return {half(all, 0, table), half(all, 1, table)};
  }
};

}  // namespace

#include "lut_kernel.h"

namespace {
const ck::LutKernels kernels = lut_table<Avx2>();
}

const ck::LutKernels* ck::lut_avx2() { return &kernels; }
