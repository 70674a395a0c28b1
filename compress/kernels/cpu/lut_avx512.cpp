// Tables with AVX-512: two bytes to each lane, shifted so that its code comes first, and one permutation of 16 floats.
#include "vectors_512.h"

namespace {

using Table = __m512;
CK_INLINE Table table_of(const float* f) { return _mm512_load_ps(f); }

CK_INLINE __m512 to_bf16(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  return _mm512_castsi512_ps(_mm512_and_si512(rounded, _mm512_set1_epi32(int(0xffff0000))));
}

template <int BITS>
struct Codes {
  __m512i bytes, shifts;
  __attribute__((always_inline)) Codes() {
    alignas(64) uint8_t from[64];
    alignas(64) int32_t shift[16];
    for (int i = 0; i < 16; i++) {
      for (int j = 0; j < 4; j++) from[4 * i + j] = j < 2 ? uint8_t(i * BITS / 8 + j) : 0x80;
      shift[i] = i * BITS % 8;
    }
    bytes = _mm512_load_si512(from);
    shifts = _mm512_load_si512(shift);
  }
  __attribute__((always_inline)) __m512 values(const uint8_t* p, Table table) const {
    const __m512i all = _mm512_broadcast_i32x4(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return _mm512_permutexvar_ps(_mm512_srlv_epi32(_mm512_shuffle_epi8(all, bytes), shifts), table);
  }
};

}  // namespace

#include "lut_kernel.h"

namespace {
const ck::LutKernels kernels = lut_table<Avx512>();
}

const ck::LutKernels* ck::lut_avx512() { return &kernels; }
