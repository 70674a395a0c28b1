// AVX-512 with BF16: 16-bit activations, two products to a lane. Those of 8 bits are the ones of AVX-512.
//
// Codes become bfloat16 by an or with 0x4300 = 128, whose last mantissa bit is worth 1: (w & 0x000f000f) | 0x43004300 are
// two numbers 128 + code, in the lower and the upper half of a row's four bytes, so that inputs k and k + 2 meet in a pair.
// Codes of 2 bits stay at bits 2 and 4, too: 128 + 4 code, 128 + 16 code, with a sum of their own each. Codes of 8 bits are
// two of 4, or whole ones after a conversion. What the 128s add is taken off in the block's first sum (a16_sum: `offset`, then the plain sums in q_sum).
//
// Activations are cut into parts of 8 significant bits: bfloat16 is one, float16 two, float32 three; all products are exact.
//   a16 [block][chunk][pair][part][T] pairs of bfloat16

#include "linear_kernel.h"
#include "vectors_512.h"

namespace {

using P = Avx512;
constexpr int GROUP = 8;

constexpr int pairs_of(int bits) { return chunk_of(bits) / 2; }

// The input of a chunk that pair i has in its lower (0) or upper (1) half.
constexpr int pair_input(int bits, int i, int half) {
  if (bits == 8) return i + 2 * half;
  if (bits == 4) return 4 * (i & 1) + (i >> 1) + 2 * half;
  if (bits == 2) return 4 * (i & 3) + (i >> 2) + 2 * half;
  return 4 * (i >> 1) + (i & 1) + 2 * half;
}
// What 128 becomes in the sum of pair i.
constexpr float pair_offset(int bits, int i) {
  return bits == 8 ? 128.0f * 17 : bits == 2 ? (i % 3 == 0 ? 128.0f : i % 3 == 1 ? 32.0f : 8.0f) : 128.0f;
}

CK_INLINE int parts_of(int32_t dtype) { return dtype == CK_BF16 ? 1 : dtype == CK_F16 ? 2 : 3; }

template <int BITS>
void prepare(const LinearCall& call, int64_t begin, int64_t end) {
  constexpr int PAIRS = pairs_of(BITS);
  const Layout& l = call.layout;
  const int parts = parts_of(call.x_dtype), n = int(l.padded_block);
  alignas(64) float f[MAX_BLOCK];
  alignas(64) uint16_t high[MAX_BLOCK];
  for (int64_t i = begin; i < end; i++) {
    const int64_t token = i / l.n_blocks, block = i % l.n_blocks;
    const Group g = group_of_token(call, token);
    floats_of<P>(call, token, block, f);
    float sums[PAIRS] = {0};
    for (int k = 0; k < n; k += chunk_of(BITS))
      CK_UNROLL for (int p = 0; p < PAIRS; p++) sums[p] += f[k + pair_input(BITS, p, 0)] + f[k + pair_input(BITS, p, 1)];
    float offset = 0, sum = 0;
    for (int p = 0; p < PAIRS; p++) {
      offset += pair_offset(BITS, p) * sums[p];
      sum += sums[p];
    }
    const int64_t place = g.first * l.n_blocks + block * g.tokens + (token - g.first);
    call.a16_sum[place] = offset;
    reinterpret_cast<float*>(call.q_sum)[place] = sum;
    uint32_t* to = reinterpret_cast<uint32_t*>(call.a16) + (g.first * call.padded_inputs + block * n * g.tokens) / 2 * parts +
                   (token - g.first);
    for (int part = 0; part < parts; part++) {
      for (int k = 0; k < n; k++) {
        const uint32_t bits = bits_of_float(f[k]) & 0xffff0000;
        high[k] = uint16_t(bits >> 16);
        f[k] -= float_of_bits(bits);
      }
      uint32_t* at_pair = to + part * g.tokens;
      for (int k = 0; k < n; k += chunk_of(BITS))
        CK_UNROLL for (int p = 0; p < PAIRS; p++, at_pair += parts * g.tokens)
          *at_pair = high[k + pair_input(BITS, p, 0)] | uint32_t(high[k + pair_input(BITS, p, 1)]) << 16;
    }
  }
}

void a16_prepare(const LinearCall& call, int64_t begin, int64_t end) {
  switch (call.layout.bits) {
    case 2: prepare<2>(call, begin, end); break;
    case 3: prepare<3>(call, begin, end); break;
    case 4: prepare<4>(call, begin, end); break;
    default: prepare<8>(call, begin, end); break;
  }
}

// 128 + (w & mask), twice.
CK_INLINE __m512i magic(__m512i w, int mask) {
  return _mm512_ternarylogic_epi32(w, _mm512_set1_epi32(mask << 16 | mask), _mm512_set1_epi32(0x43004300), 0xea);
}

template <int T, int PARTS>
CK_INLINE void products(__m512 (&acc)[T], __m512i codes, const uint32_t* a) {
  CK_UNROLL for (int part = 0; part < PARTS; part++)
    CK_UNROLL for (int t = 0; t < T; t++)
      acc[t] = _mm512_dpbf16_ps(acc[t], (__m512bh)codes, (__m512bh)_mm512_set1_epi32(int(a[part * T + t])));
}

// Codes of 8 bits in one piece, by a conversion; worth it when many products share it.
constexpr bool whole(int bits, int products) { return bits == 8 && products >= 4; }
constexpr int kinds_of(int bits, int products) { return whole(bits, products) ? 1 : bits == 8 ? 2 : bits == 2 ? 3 : 1; }
// Sums of one kind that take turns: an instruction waits six cycles for its sum.
constexpr int turns_of(int bits, int tokens, int products) {
  if (kinds_of(bits, products) > 1) return tokens == 1 ? 2 : 1;
  return tokens > 4 ? 1 : tokens > 2 || bits == 8 ? 2 : 4;
}

// Two bytes of each row, j and j + 2, as bfloat16: 8 bits are exact there.
template <int J>
CK_INLINE __m512i converted(__m512i w) {
  const __m512i low = _mm512_castps_si512(P::code<J>(w)), high = _mm512_castps_si512(P::code<J + 2>(w));
  return _mm512_ternarylogic_epi32(_mm512_srli_epi32(low, 16), high, _mm512_set1_epi32(int(0xffff0000)), 0xf8);
}

// acc[turn][kind][t]
template <int BITS, int T, int PARTS>
CK_INLINE void chunk(__m512 (&acc)[turns_of(BITS, T, T * PARTS)][kinds_of(BITS, T * PARTS)][T], const uint8_t* w,
                     const uint32_t* a) {
  constexpr int N = T * PARTS, TURNS = turns_of(BITS, T, N);
  if constexpr (whole(BITS, N)) {
    const __m512i all = P::bytes(w);
    products<T, PARTS>(acc[0][0], converted<0>(all), a);
    products<T, PARTS>(acc[1 % TURNS][0], converted<1>(all), a + N);
  } else if constexpr (BITS == 8) {
    const __m512i all = P::bytes(w);
    products<T, PARTS>(acc[0][0], magic(all, 15), a);
    products<T, PARTS>(acc[0][1], magic(_mm512_srli_epi32(all, 4), 15), a);
    products<T, PARTS>(acc[1 % TURNS][0], magic(_mm512_srli_epi32(all, 8), 15), a + N);
    products<T, PARTS>(acc[1 % TURNS][1], magic(_mm512_srli_epi32(all, 12), 15), a + N);
  } else if constexpr (BITS == 4) {
    const __m512i all = P::bytes(w);
    products<T, PARTS>(acc[0][0], magic(all, 15), a);
    products<T, PARTS>(acc[1 % TURNS][0], magic(_mm512_srli_epi32(all, 4), 15), a + N);
    products<T, PARTS>(acc[2 % TURNS][0], magic(_mm512_srli_epi32(all, 8), 15), a + 2 * N);
    products<T, PARTS>(acc[3 % TURNS][0], magic(_mm512_srli_epi32(all, 12), 15), a + 3 * N);
  } else if constexpr (BITS == 2) {
    const __m512i all = P::bytes(w), six = _mm512_srli_epi32(all, 6), twelve = _mm512_srli_epi32(all, 12);
    products<T, PARTS>(acc[0][0], magic(all, 3), a);
    products<T, PARTS>(acc[0][1], magic(all, 12), a + N);
    products<T, PARTS>(acc[0][2], magic(all, 48), a + 2 * N);
    products<T, PARTS>(acc[1 % TURNS][0], magic(six, 3), a + 3 * N);
    products<T, PARTS>(acc[1 % TURNS][1], magic(six, 12), a + 4 * N);
    products<T, PARTS>(acc[1 % TURNS][2], magic(six, 48), a + 5 * N);
    products<T, PARTS>(acc[0][0], magic(twelve, 3), a + 6 * N);
    products<T, PARTS>(acc[0][1], magic(twelve, 12), a + 7 * N);
  } else {
    __m512i field[8];
    fields_of<P, 3>(w, field);
    CK_UNROLL for (int f = 0; f < 8; f++) {
      products<T, PARTS>(acc[2 * f % TURNS][0], magic(field[f], 7), a + 2 * f * N);
      products<T, PARTS>(acc[(2 * f + 1) % TURNS][0], magic(_mm512_srli_epi32(field[f], 8), 7), a + (2 * f + 1) * N);
    }
  }
}

template <int BITS, int T, int PARTS>
CK_NOINLINE void tiles(const LinearCall& call, int64_t first_tile, int64_t end_tile, Group g) {
  constexpr int KINDS = kinds_of(BITS, T * PARTS), TURNS = turns_of(BITS, T, T * PARTS);
  constexpr int STEP = pairs_of(BITS) * PARTS * T;
  const Layout& l = call.layout;
  const uint32_t* x = reinterpret_cast<const uint32_t*>(call.a16) + g.first * call.padded_inputs / 2 * PARTS;
  const float* offset = call.a16_sum + g.first * l.n_blocks;
  const float* a_sum = reinterpret_cast<const float*>(call.q_sum) + g.first * l.n_blocks;
  const float zero = call.zeros ? 0.0f : float(call.zero_point);
  for (int64_t tile = first_tile; tile < end_tile; tile++) {
    const uint8_t* w = call.codes + tile * l.tile_bytes;
    const uint32_t* a = x;
    __m512 total[T];
    CK_UNROLL for (int t = 0; t < T; t++) total[t] = _mm512_setzero_ps();
    for (int64_t b = 0; b < l.n_blocks; b++) {
      const Grid<P> grid = grid_of<P>(call, tile, b, 0);
      __m512 acc[TURNS][KINDS][T];
      CK_UNROLL for (int t = 0; t < T; t++) {
        CK_UNROLL for (int i = 0; i < TURNS; i++)
          CK_UNROLL for (int kind = 0; kind < KINDS; kind++) acc[i][kind][t] = _mm512_setzero_ps();
        const float before = whole(BITS, T * PARTS) ? 0.0f : -offset[b * T + t];
        acc[0][0][t] = _mm512_set1_ps(before - zero * a_sum[b * T + t]);
      }
      for (int64_t c = 0; c < l.chunks_per_block; c++, w += chunk_bytes_of(BITS), a += STEP) {
        P::prefetch(w);
        if (BITS == 3) { P::prefetch(w + 64); P::prefetch(w + 128); }
        chunk<BITS, T, PARTS>(acc, w, a);
      }
      CK_UNROLL for (int t = 0; t < T; t++) {
        CK_UNROLL for (int i = 1; i < TURNS; i++)
          CK_UNROLL for (int kind = 0; kind < KINDS; kind++) acc[0][kind][t] = _mm512_add_ps(acc[0][kind][t], acc[i][kind][t]);
        __m512 sum = acc[0][0][t];
        if constexpr (BITS == 8 && KINDS == 2) sum = _mm512_fmadd_ps(acc[0][1][t], _mm512_set1_ps(16.0f), sum);
        if constexpr (BITS == 2) {
          sum = _mm512_fmadd_ps(acc[0][1][t], _mm512_set1_ps(0.25f), sum);
          sum = _mm512_fmadd_ps(acc[0][2][t], _mm512_set1_ps(0.0625f), sum);
        }
        if (call.zeros) sum = _mm512_fnmadd_ps(grid.zero, _mm512_set1_ps(a_sum[b * T + t]), sum);
        total[t] = _mm512_fmadd_ps(sum, grid.scale, total[t]);
      }
    }
    CK_UNROLL for (int t = 0; t < T; t++) finish<P>(call, g.first + t, tile, total[t]);
  }
}

template <int BITS, int PARTS, int T = GROUP>
CK_INLINE void tiles_of(const LinearCall& call, int64_t first_tile, int64_t end_tile, Group g) {
  if constexpr (T > 0) {
    if (g.tokens == T) tiles<BITS, T, PARTS>(call, first_tile, end_tile, g);
    else tiles_of<BITS, PARTS, T - 1>(call, first_tile, end_tile, g);
  }
}

template <int BITS>
void run_bits(const LinearCall& call, int64_t first_tile, int64_t end_tile) {
  const int parts = parts_of(call.x_dtype);
  const int64_t step = call.n_groups == 1 ? end_tile - first_tile : 1;  // else a tile stays in cache for all tokens
  for (int64_t tile = first_tile; tile < end_tile; tile += step)
    for (int64_t i = 0; i < call.n_groups; i++) {
      const Group g = group_at(call, i);
      if (parts == 1) tiles_of<BITS, 1>(call, tile, tile + step, g);
      else if (parts == 2) tiles_of<BITS, 2>(call, tile, tile + step, g);
      else tiles_of<BITS, 3>(call, tile, tile + step, g);
    }
}

void a16_run(const LinearCall& call, int64_t first_tile, int64_t end_tile) {
  switch (call.layout.bits) {
    case 2: run_bits<2>(call, first_tile, end_tile); break;
    case 3: run_bits<3>(call, first_tile, end_tile); break;
    case 4: run_bits<4>(call, first_tile, end_tile); break;
    default: run_bits<8>(call, first_tile, end_tile); break;
  }
}

const ck::LinearKernels kernels = {0, 0, 0, 0, nullptr, nullptr, GROUP, 1, a16_prepare, a16_run};

}  // namespace

const ck::LinearKernels* ck::linear_avx512bf16() { return &kernels; }
