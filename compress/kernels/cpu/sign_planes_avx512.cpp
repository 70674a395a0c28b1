// Sign planes with AVX-512 (F, BW, VL, DQ). The word form: signs of 32 rows lie in the lanes of a register, and vpermw looks up
// what five inputs come to in all of them at once.

#include "vectors_512.h"

namespace {
CK_INLINE __m512 flip_positive(__m512 v, uint32_t bits) {
  const __m512i i = _mm512_castps_si512(v);
  return _mm512_castsi512_ps(_mm512_mask_xor_epi32(i, __mmask16(bits), i, _mm512_set1_epi32(INT32_MIN)));
}
}  // namespace

#include "sign_planes_kernel.h"

namespace {

using ck::ROWS;
using ck::WORD_TABLES;

constexpr float LARGEST = 32767 - COLUMNS / 2;  // of a sum before z is rounded: 64 halves may come on top

// Table `t` of a tile holds inputs 16 (t / 3) + 5 (t % 3) + 0 .. 4; the last one holds inputs 15, 31, 47, 63.
CK_INLINE int input_of(int table, int bit) {
  return table < 12 ? 16 * (table / 3) + 5 * (table % 3) + bit : 16 * bit + 15;
}

void word_tables(const SignPlanesCall& call, int64_t first_tile, int64_t end_tile) {
  const __mmask32 has[5] = {0xaaaaaaaa, 0xcccccccc, 0xf0f0f0f0, 0xff00ff00, 0xffff0000};  // lanes whose number has bit b
  for (int64_t tile = first_tile; tile < end_tile; tile++) {
    alignas(64) float z[COLUMNS][LANES];
    alignas(64) int16_t q[COLUMNS][LANES];
    __m512 size = _mm512_setzero_ps();
    for (int i = 0; i < COLUMNS; i++) {
      const int64_t j = tile * COLUMNS + i;
      __m512 value = _mm512_setzero_ps();
      if (j < call.in_features)
        value = _mm512_mul_ps(_mm512_set1_ps(scaled_input(call, j)),
                              ranks_of<Avx512>(call.right, j, call.rank, call.first_rank, call.n_ranks));
      _mm512_store_ps(z[i], value);
      size = _mm512_add_ps(size, _mm512_abs_ps(value));
    }
    const float total = _mm512_reduce_add_ps(size), largest = _mm512_reduce_max_ps(size);  // of one rank: what a sum may reach
    call.steps[tile] = total - total == 0 ? largest / LARGEST : total;  // what is not finite stays so
    const __m512 inverse = _mm512_set1_ps(largest > 0 ? LARGEST / largest : 0);
    for (int i = 0; i < COLUMNS; i++) {
      const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(z[i]), inverse));
      _mm256_store_si256(reinterpret_cast<__m256i*>(q[i]), _mm512_cvtepi32_epi16(rounded));
    }
    int16_t* to = static_cast<int16_t*>(call.tables) + tile * ck::WORD_TILE;
    for (int c = 0; c < call.n_ranks; c++) {
      for (int table = 0; table < WORD_TABLES; table++) {
        const int bits = table < 12 ? 5 : 4;
        __m512i sums = _mm512_setzero_si512();
        for (int b = 0; b < bits; b++) {
          const __m512i value = _mm512_set1_epi16(q[input_of(table, b)][c]);
          sums = _mm512_mask_add_epi16(_mm512_sub_epi16(sums, value), has[b], sums, value);
        }
        _mm512_storeu_si512(to + (c * WORD_TABLES + table) * 32, sums);
      }
    }
  }
}

// The left factor of 32 rows, transposed: [rank][row], rows of even number before those of odd.
void word_factors(const SignPlanesCall& call, int64_t first_group, int64_t end_group) {
  for (int64_t group = first_group; group < end_group; group++) {
    float* to = call.factors + group * LANES * ROWS;
    alignas(64) float rows[ROWS][LANES];
    for (int r = 0; r < ROWS; r++) {
      const int64_t i = group * ROWS + r;
      _mm512_store_ps(rows[r], i < call.out_features
                                   ? ranks_of<Avx512>(call.left, i, call.rank, call.first_rank, call.n_ranks)
                                   : _mm512_setzero_ps());
    }
    const __m512i places = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                              _mm512_set1_epi32(2 * LANES));
    for (int c = 0; c < call.n_ranks; c++)
      for (int half = 0; half < 2; half++)
        _mm512_storeu_ps(to + c * ROWS + half * 16, _mm512_i32gather_ps(places, &rows[half][c], 4));
  }
}

// Signs of 64 columns of 32 rows: register w holds columns 16 w .. 16 w + 15, a row in each lane.
struct Words { __m512i w[4]; };

CK_INLINE Words transposed(const __m512i rows[4]) {  // 8 rows of 4 words each
  alignas(64) static const uint16_t places[2][32] = {
      {0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60, 1, 5, 9, 13, 17, 21, 25, 29, 33, 37, 41, 45, 49, 53, 57, 61},
      {2, 6, 10, 14, 18, 22, 26, 30, 34, 38, 42, 46, 50, 54, 58, 62, 3, 7, 11, 15, 19, 23, 27, 31, 35, 39, 43, 47, 51, 55, 59, 63}};
  const __m512i low = _mm512_load_si512(places[0]), high = _mm512_load_si512(places[1]);
  const __m512i a = _mm512_permutex2var_epi16(rows[0], low, rows[1]), b = _mm512_permutex2var_epi16(rows[2], low, rows[3]);
  const __m512i c = _mm512_permutex2var_epi16(rows[0], high, rows[1]), d = _mm512_permutex2var_epi16(rows[2], high, rows[3]);
  return {{_mm512_shuffle_i64x2(a, b, 0x44), _mm512_shuffle_i64x2(a, b, 0xee), _mm512_shuffle_i64x2(c, d, 0x44),
           _mm512_shuffle_i64x2(c, d, 0xee)}};
}

CK_INLINE Words signs_of(const SignPlanesCall& call, int64_t row, int64_t byte) {
  alignas(64) uint64_t words[ROWS];
  const int64_t n = min64(ROWS, call.out_features - row);
  const uint8_t* p = call.signs + row * call.row_bytes + byte;
  if (n == ROWS && byte + 8 <= call.row_bytes) {
    for (int r = 0; r < ROWS; r++) memcpy(&words[r], p + r * call.row_bytes, 8);
  } else {
    for (int r = 0; r < ROWS; r++) words[r] = r < n ? sign_word(p - byte + r * call.row_bytes, byte, call.row_bytes) : 0;
  }
  __m512i rows[4];
  for (int i = 0; i < 4; i++) rows[i] = _mm512_load_si512(words + 8 * i);
  return transposed(rows);
}

void word_rows(const SignPlanesCall& call, int64_t first_group, int64_t end_group) {
  const int64_t n_tiles = ceil_div(call.in_features, COLUMNS);
  for (int64_t tile = 0; tile < n_tiles; tile++) {  // the tables of a tile stay in the first-level cache
    const __m512i* tables = reinterpret_cast<const __m512i*>(static_cast<const int16_t*>(call.tables) + tile * ck::WORD_TILE);
    const __m512 step = _mm512_set1_ps(call.steps[tile]);
    const __m512i first_of_two = _mm512_set1_epi32(1), second_of_two = _mm512_set1_epi32(1 << 16);
    for (int64_t group = first_group; group < end_group; group++) {
      if (tile % 8 == 0 && group + 2 < end_group)  // lines that are new, in rows far apart: nothing else sees them coming
        for (int r = 0; r < ROWS; r++)
          __builtin_prefetch(call.signs + ((group + 1) * ROWS + r) * call.row_bytes + tile * 8);
      const Words s = signs_of(call, group * ROWS, tile * 8);
      __m512i index[WORD_TABLES];  // vpermw reads the lowest five bits of a lane
      for (int w = 0; w < 4; w++) {
        index[3 * w] = s.w[w];
        index[3 * w + 1] = _mm512_srli_epi16(s.w[w], 5);
        index[3 * w + 2] = _mm512_srli_epi16(s.w[w], 10);
      }
      __m512i over = _mm512_srli_epi16(s.w[0], 15);
      over = _mm512_ternarylogic_epi32(over, _mm512_srli_epi16(s.w[1], 14), _mm512_set1_epi16(2), 0xf8);  // a | b & c
      over = _mm512_ternarylogic_epi32(over, _mm512_srli_epi16(s.w[2], 13), _mm512_set1_epi16(4), 0xf8);
      index[12] = _mm512_ternarylogic_epi32(over, _mm512_srli_epi16(s.w[3], 12), _mm512_set1_epi16(8), 0xf8);
      const float* factors = call.factors + group * LANES * ROWS;
      float* y = call.y + group * ROWS;
      __m512 even_rows = _mm512_setzero_ps(), odd_rows = _mm512_setzero_ps();
      for (int c = 0; c < call.n_ranks; c++) {
        const __m512i* table = tables + c * WORD_TABLES;
        __m512i even = _mm512_permutexvar_epi16(index[0], table[0]), odd = _mm512_permutexvar_epi16(index[1], table[1]);
        for (int t = 2; t < 12; t += 2) {
          even = _mm512_add_epi16(even, _mm512_permutexvar_epi16(index[t], table[t]));
          odd = _mm512_add_epi16(odd, _mm512_permutexvar_epi16(index[t + 1], table[t + 1]));
        }
        even = _mm512_add_epi16(even, _mm512_permutexvar_epi16(index[12], table[12]));
        const __m512i sum = _mm512_add_epi16(even, odd);
        const __m512 of_even = _mm512_cvtepi32_ps(_mm512_madd_epi16(sum, first_of_two));  // widened; no shuffles: these are scarce
        const __m512 of_odd = _mm512_cvtepi32_ps(_mm512_madd_epi16(sum, second_of_two));
        even_rows = _mm512_fmadd_ps(of_even, _mm512_loadu_ps(factors + c * ROWS), even_rows);
        odd_rows = _mm512_fmadd_ps(of_odd, _mm512_loadu_ps(factors + c * ROWS + 16), odd_rows);
      }
      _mm512_storeu_ps(y, _mm512_fmadd_ps(even_rows, step, _mm512_loadu_ps(y)));
      _mm512_storeu_ps(y + 16, _mm512_fmadd_ps(odd_rows, step, _mm512_loadu_ps(y + 16)));
    }
  }
}

}  // namespace

const ck::SignPlanesKernels* ck::sign_planes_avx512() {
  static const SignPlanesKernels kernels = {
      float_tables<Avx512>, float_rows<Avx512>, word_tables, word_factors, word_rows,
      inner_factors<Avx512>, outer_factors<Avx512>, rebuilt_rows<Avx512, 6, 2>};
  return &kernels;
}
