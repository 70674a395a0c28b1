// AVX-512 with BF16: activations of bfloat16, kept, two products to a lane. All others are the ones of AVX-512.
//
// Few tokens: codes become bfloat16 by an or with 0x4300 = 128, whose last mantissa bit is worth 1: (w & 0x000f000f) | 0x43004300 are
// two numbers 128 + code, in the lower and the upper half of a row's four bytes, so that inputs k and k + 2 meet in a pair.
// Codes of 2 bits stay at bits 2 and 4, too: 128 + 4 code, 128 + 16 code, with a sum of their own each. Codes of 8 bits are
// two of 4, or whole ones after a conversion. What the 128s add is taken off in the block's first sum (a16_sum: `offset`, then the plain sums in q_sum).
//   a16 [block][chunk][pair][T] pairs of bfloat16
//
// Many: a block of 128 inputs of two tiles is unpacked into the first-level cache, zero points taken off: whole numbers up to 255,
// which bfloat16 holds exactly. A register block of 12 tokens and these tiles goes over all tokens of a slab; its sums are
// multiplied with the scales of the group and added to the totals, in float32. Activations are only put in another order.
//   a16 [block][group][pair][T] pairs of bfloat16: inputs 4 i and 4 i + 2, 4 i + 1 and 4 i + 3

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

template <int BITS>
void prepare(const LinearCall& call, int64_t begin, int64_t end) {
  constexpr int PAIRS = pairs_of(BITS);
  const Layout& l = call.layout;
  const int n = int(l.padded_block);
  alignas(64) float f[MAX_BLOCK];
  for (int64_t i = begin; i < end; i++) {
    const int64_t block = i % l.n_blocks;
    const Group g = group_at(call, i / l.n_blocks);
    uint32_t* to = reinterpret_cast<uint32_t*>(call.a16) + (g.first * call.padded_inputs + block * n * g.tokens) / 2;
    for (int t = 0; t < g.tokens; t++) {
      floats_of<P>(call, g.first + t, block, f);
      float sums[PAIRS] = {0};
      uint32_t* at_pair = to + t;
      for (int k = 0; k < n; k += chunk_of(BITS))
        CK_UNROLL for (int p = 0; p < PAIRS; p++, at_pair += g.tokens) {
          const float low = f[k + pair_input(BITS, p, 0)], high = f[k + pair_input(BITS, p, 1)];
          sums[p] += low + high;
          *at_pair = bits_of_float(low) >> 16 | bits_of_float(high);
        }
      float offset = 0, sum = 0;
      for (int p = 0; p < PAIRS; p++) {
        offset += pair_offset(BITS, p) * sums[p];
        sum += sums[p];
      }
      const int64_t place = g.first * l.n_blocks + block * g.tokens + t;
      call.a16_sum[place] = offset;
      reinterpret_cast<float*>(call.q_sum)[place] = sum;
    }
  }
}

void prepare_direct(const LinearCall& call, int64_t begin, int64_t end) {
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

CK_INLINE __m512 product(__m512 sum, __m512i w, uint32_t a) {
  return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32(int(a)));
}

template <int T>
CK_INLINE void products(__m512 (&acc)[T], __m512i codes, const uint32_t* a) {
  CK_UNROLL for (int t = 0; t < T; t++) acc[t] = product(acc[t], codes, a[t]);
}

// Codes of 8 bits in one piece, by a conversion; worth it when many products share it.
constexpr bool whole(int bits, int tokens) { return bits == 8 && tokens >= 4; }
constexpr int kinds_of(int bits, int tokens) { return whole(bits, tokens) ? 1 : bits == 8 ? 2 : bits == 2 ? 3 : 1; }
// Sums of one kind that take turns: an instruction waits six cycles for its sum.
constexpr int turns_of(int bits, int tokens) {
  if (kinds_of(bits, tokens) > 1) return tokens == 1 ? 2 : 1;
  return tokens > 4 ? 1 : tokens > 2 || bits == 8 ? 2 : 4;
}

// Two bytes of each row, j and j + 2, as bfloat16: 8 bits are exact there.
template <int J>
CK_INLINE __m512i converted(__m512i w) {
  const __m512i low = _mm512_castps_si512(P::code<J>(w)), high = _mm512_castps_si512(P::code<J + 2>(w));
  return _mm512_ternarylogic_epi32(_mm512_srli_epi32(low, 16), high, _mm512_set1_epi32(int(0xffff0000)), 0xf8);
}

// acc[turn][kind][t]
template <int BITS, int T>
CK_INLINE void chunk(__m512 (&acc)[turns_of(BITS, T)][kinds_of(BITS, T)][T], const uint8_t* w, const uint32_t* a) {
  constexpr int TURNS = turns_of(BITS, T);
  if constexpr (whole(BITS, T)) {
    const __m512i all = P::bytes(w);
    products<T>(acc[0][0], converted<0>(all), a);
    products<T>(acc[1 % TURNS][0], converted<1>(all), a + T);
  } else if constexpr (BITS == 8) {
    const __m512i all = P::bytes(w);
    products<T>(acc[0][0], magic(all, 15), a);
    products<T>(acc[0][1], magic(_mm512_srli_epi32(all, 4), 15), a);
    products<T>(acc[1 % TURNS][0], magic(_mm512_srli_epi32(all, 8), 15), a + T);
    products<T>(acc[1 % TURNS][1], magic(_mm512_srli_epi32(all, 12), 15), a + T);
  } else if constexpr (BITS == 4) {
    const __m512i all = P::bytes(w);
    products<T>(acc[0][0], magic(all, 15), a);
    products<T>(acc[1 % TURNS][0], magic(_mm512_srli_epi32(all, 4), 15), a + T);
    products<T>(acc[2 % TURNS][0], magic(_mm512_srli_epi32(all, 8), 15), a + 2 * T);
    products<T>(acc[3 % TURNS][0], magic(_mm512_srli_epi32(all, 12), 15), a + 3 * T);
  } else if constexpr (BITS == 2) {
    const __m512i all = P::bytes(w), six = _mm512_srli_epi32(all, 6), twelve = _mm512_srli_epi32(all, 12);
    products<T>(acc[0][0], magic(all, 3), a);
    products<T>(acc[0][1], magic(all, 12), a + T);
    products<T>(acc[0][2], magic(all, 48), a + 2 * T);
    products<T>(acc[1 % TURNS][0], magic(six, 3), a + 3 * T);
    products<T>(acc[1 % TURNS][1], magic(six, 12), a + 4 * T);
    products<T>(acc[1 % TURNS][2], magic(six, 48), a + 5 * T);
    products<T>(acc[0][0], magic(twelve, 3), a + 6 * T);
    products<T>(acc[0][1], magic(twelve, 12), a + 7 * T);
  } else {
    __m512i field[8];
    fields_of<P, 3>(w, field);
    CK_UNROLL for (int f = 0; f < 8; f++) {
      products<T>(acc[2 * f % TURNS][0], magic(field[f], 7), a + 2 * f * T);
      products<T>(acc[(2 * f + 1) % TURNS][0], magic(_mm512_srli_epi32(field[f], 8), 7), a + (2 * f + 1) * T);
    }
  }
}

template <int BITS, int T>
CK_NOINLINE void tiles(const LinearCall& call, int64_t first_tile, int64_t end_tile, Group g) {
  constexpr int KINDS = kinds_of(BITS, T), TURNS = turns_of(BITS, T), STEP = pairs_of(BITS) * T;
  const Layout& l = call.layout;
  const uint32_t* x = reinterpret_cast<const uint32_t*>(call.a16) + g.first * call.padded_inputs / 2;
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
        const float before = whole(BITS, T) ? 0.0f : -offset[b * T + t];
        acc[0][0][t] = _mm512_set1_ps(before - zero * a_sum[b * T + t]);
      }
      for (int64_t c = 0; c < l.chunks_per_block; c++, w += chunk_bytes_of(BITS), a += STEP) {
        P::prefetch(w);
        if (BITS == 3) { P::prefetch(w + 64); P::prefetch(w + 128); }
        chunk<BITS, T>(acc, w, a);
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

template <int BITS, int T = GROUP>
CK_INLINE void tiles_of(const LinearCall& call, int64_t first_tile, int64_t end_tile, Group g) {
  if constexpr (T > 0) {
    if (g.tokens == T) tiles<BITS, T>(call, first_tile, end_tile, g);
    else tiles_of<BITS, T - 1>(call, first_tile, end_tile, g);
  }
}

template <int BITS>
void run_bits(const LinearCall& call, int64_t first_tile, int64_t end_tile) {
  const int64_t step = call.n_groups == 1 ? end_tile - first_tile : 1;  // else a tile stays in cache for all tokens
  for (int64_t tile = first_tile; tile < end_tile; tile += step)
    for (int64_t i = 0; i < call.n_groups; i++) tiles_of<BITS>(call, tile, tile + step, group_at(call, i));
}

void run_direct(const LinearCall& call, int64_t first_tile, int64_t end_tile) {
  switch (call.layout.bits) {
    case 2: run_bits<2>(call, first_tile, end_tile); break;
    case 3: run_bits<3>(call, first_tile, end_tile); break;
    case 4: run_bits<4>(call, first_tile, end_tile); break;
    default: run_bits<8>(call, first_tile, end_tile); break;
  }
}

// ---- many tokens -------------------------------------------------------------------------------------------------------

constexpr int TOKENS = 12, NR = 2;  // a register block: tokens and tiles
constexpr int MANY_SLAB = ck::SLAB * ck::A16_BYTES / 2;  // two bytes per input and token

void prepare_many(const LinearCall& call, int64_t begin, int64_t end) {
  const Layout& l = call.layout;
  for (int64_t i = begin; i < end; i++) {
    const int64_t block = i % l.n_blocks, n = block_length(l, block);
    const Group g = group_at(call, i / l.n_blocks);
    const uint16_t* x = static_cast<const uint16_t*>(call.x) + (call.first_token + g.first) * call.x_stride + block_start(l, block);
    uint32_t* to = reinterpret_cast<uint32_t*>(call.a16) + (block * call.n_tokens + g.first) * l.padded_block / 2;
    int64_t k = 0;
    for (; k + 4 <= n; k += 4, to += 2 * g.tokens)
      for (int t = 0; t < g.tokens; t++) {
        uint64_t four;
        memcpy(&four, x + t * call.x_stride + k, 8);
        to[t] = uint32_t(four & 0xffff) | uint32_t(four >> 32 & 0xffff) << 16;
        to[g.tokens + t] = uint32_t(four >> 16 & 0xffff) | uint32_t(four >> 48) << 16;
      }
    for (; k < l.padded_block; k += 4, to += 2 * g.tokens)
      for (int t = 0; t < g.tokens; t++) {
        uint32_t some[4] = {0};
        for (int64_t j = k; j < min64(k + 4, n); j++) some[j - k] = x[t * call.x_stride + j];
        to[t] = some[0] | some[2] << 16;
        to[g.tokens + t] = some[1] | some[3] << 16;
      }
  }
}

// Bytes of each row's four, less its zero point, as bfloat16: `even` has bytes 0 and 2, `odd` 1 and 3.
struct Pairs { __m512i even, odd; };

// Codes of 8 bits: 0x4b000000 | byte is the float 2^23 + byte, and `zero` 2^23 + zero point.
CK_INLINE Pairs less_zero(__m512i codes, __m512 zero) {
  const __m512i magic = _mm512_set1_epi32(0x4b000000), low = _mm512_set1_epi32(255), high = _mm512_set1_epi32(int(0xffff0000));
  __m512i v[4];
  v[0] = _mm512_ternarylogic_epi32(codes, low, magic, 0xea);
  v[1] = _mm512_ternarylogic_epi32(_mm512_srli_epi32(codes, 8), low, magic, 0xea);
  v[2] = _mm512_ternarylogic_epi32(_mm512_srli_epi32(codes, 16), low, magic, 0xea);
  v[3] = _mm512_or_si512(_mm512_srli_epi32(codes, 24), magic);
  CK_UNROLL for (int j = 0; j < 4; j++) v[j] = _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(v[j]), zero));
  return {_mm512_ternarylogic_epi32(_mm512_srli_epi32(v[0], 16), v[2], high, 0xf8),
          _mm512_ternarylogic_epi32(_mm512_srli_epi32(v[1], 16), v[3], high, 0xf8)};
}

// Fewer bits: 15 + code - zero point, which is below 32, is looked up; bits 5 to 15 of an index do not matter.
CK_INLINE Pairs looked_up(__m512i codes, __m512i shift, __m512i table) {
  const __m512i places = _mm512_add_epi8(codes, shift);
  return {_mm512_permutexvar_epi16(places, table), _mm512_permutexvar_epi16(_mm512_srli_epi32(places, 8), table)};
}

CK_INLINE __m512i table_of_whole_numbers() {  // -15 .. 16
  alignas(64) uint16_t table[32];
  for (int i = 0; i < 32; i++) table[i] = uint16_t(bits_of_float(float(i - 15)) >> 16);
  return _mm512_load_si512(table);
}

// A block of a tile, to [pair][n][row] of bfloat16.
template <int BITS, int N>
CK_INLINE void unpack(const LinearCall& call, int64_t tile, int64_t block, __m512i table, uint32_t* to) {
  constexpr int FIELDS = chunk_of(BITS) / 4;
  const Layout& l = call.layout;
  const uint8_t* w = call.codes + tile * l.tile_bytes + block * l.block_bytes;
  __m512i zero = _mm512_set1_epi32(call.zero_point);
  if (call.zeros) {
    const uint8_t* zeros = call.zeros + (tile * l.n_groups + block / l.blocks_per_group) * TILE;
    zero = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(zeros)));
  }
  const __m512i shift = _mm512_mullo_epi32(_mm512_sub_epi32(_mm512_set1_epi32(15), zero), _mm512_set1_epi32(0x01010101));
  const __m512 offset = _mm512_add_ps(_mm512_set1_ps(0x1p23f), _mm512_cvtepi32_ps(zero));
  for (int64_t c = 0; c < l.chunks_per_block; c++, w += chunk_bytes_of(BITS)) {
    __m512i field[FIELDS];
    fields_of<P, BITS>(w, field);
    CK_UNROLL for (int f = 0; f < FIELDS; f++, to += 2 * N * TILE) {
      const Pairs pairs = BITS == 8 ? less_zero(field[f], offset) : looked_up(field[f], shift, table);
      _mm512_store_si512(to, pairs.even);
      _mm512_store_si512(to + N * TILE, pairs.odd);
    }
  }
}

// totals [token][n][row] += scale * (a block of N tiles times T tokens)
template <int T, int N>
CK_NOINLINE void register_block(const uint32_t* w, const uint32_t* a, int64_t n_pairs, const __m512* scale, float* totals) {
  __m512 acc[T][N];
  CK_UNROLL for (int t = 0; t < T; t++)
    CK_UNROLL for (int n = 0; n < N; n++) acc[t][n] = _mm512_setzero_ps();
  for (int64_t k = 0; k < n_pairs; k++, w += N * TILE, a += T) {
    __m512i tile[N];
    CK_UNROLL for (int n = 0; n < N; n++) tile[n] = _mm512_load_si512(w + n * TILE);
    CK_UNROLL for (int t = 0; t < T; t++)
      CK_UNROLL for (int n = 0; n < N; n++) acc[t][n] = product(acc[t][n], tile[n], a[t]);
  }
  CK_UNROLL for (int t = 0; t < T; t++)
    CK_UNROLL for (int n = 0; n < N; n++) {
      float* total = totals + (t * N + n) * TILE;
      _mm512_store_ps(total, _mm512_fmadd_ps(acc[t][n], scale[n], _mm512_load_ps(total)));
    }
}

template <int N, int T = TOKENS>
CK_INLINE void register_block_of(int tokens, const uint32_t* w, const uint32_t* a, int64_t n_pairs, const __m512* scale,
                                 float* totals) {
  if constexpr (T > 0) {
    if (tokens == T) register_block<T, N>(w, a, n_pairs, scale, totals);
    else register_block_of<N, T - 1>(tokens, w, a, n_pairs, scale, totals);
  }
}

template <int BITS, int N>
void unpacked_tiles(const LinearCall& call, int64_t tile) {
  const Layout& l = call.layout;
  const int64_t n_pairs = l.padded_block / 2;
  const __m512i table = table_of_whole_numbers();
  alignas(64) uint32_t codes[N * TILE * MAX_BLOCK / 2];
  alignas(64) float totals[MANY_SLAB * N * TILE];
  memset(totals, 0, size_t(call.n_tokens) * N * TILE * sizeof(float));
  for (int64_t b = 0; b < l.n_blocks; b++) {
    __m512 scale[N];
    for (int n = 0; n < N; n++) {
      unpack<BITS, N>(call, tile + n, b, table, codes + n * TILE);
      scale[n] = grid_of<P>(call, tile + n, b, 0).scale;
    }
    // The codes of the next block are fetched while this one is multiplied, a little for each group of tokens.
    const uint8_t* next = call.codes + tile * l.tile_bytes + (b + 1) * l.block_bytes;
    const int64_t piece = ceil_div(l.block_bytes, call.n_groups);
    for (int64_t i = 0; i < call.n_groups; i++) {
      const Group g = group_at(call, i);
      for (int n = 0; n < N; n++)
        for (int64_t line = i * piece; line < (i + 1) * piece; line += 64) __builtin_prefetch(next + n * l.tile_bytes + line);
      const uint32_t* a = reinterpret_cast<const uint32_t*>(call.a16) + (b * call.n_tokens + g.first) * n_pairs;
      register_block_of<N>(g.tokens, codes, a, n_pairs, scale, totals + g.first * N * TILE);
    }
  }
  for (int64_t token = 0; token < call.n_tokens; token++)
    for (int n = 0; n < N; n++) finish<P>(call, token, tile + n, _mm512_load_ps(totals + (token * N + n) * TILE));
}

template <int BITS>
void many_bits(const LinearCall& call, int64_t first_tile, int64_t end_tile) {
  int64_t tile = first_tile;
  for (; tile + NR <= end_tile; tile += NR) unpacked_tiles<BITS, NR>(call, tile);
  for (; tile < end_tile; tile++) unpacked_tiles<BITS, 1>(call, tile);
}

void run_many(const LinearCall& call, int64_t first_tile, int64_t end_tile) {
  switch (call.layout.bits) {
    case 2: many_bits<2>(call, first_tile, end_tile); break;
    case 3: many_bits<3>(call, first_tile, end_tile); break;
    case 4: many_bits<4>(call, first_tile, end_tile); break;
    default: many_bits<8>(call, first_tile, end_tile); break;
  }
}

constexpr int64_t DIRECT_TOKENS = 32;  // measured: 2 and 4 bits gain from 64 on, 3 and 8 bits, and 14336 inputs, from 32

const ck::LinearKernels kernels = {
    {}, {DIRECT_TOKENS, {ck::SLAB, GROUP, 1, prepare_direct, run_direct}, {MANY_SLAB, TOKENS, NR, prepare_many, run_many}}};

}  // namespace

const ck::LinearKernels* ck::linear_avx512bf16() { return &kernels; }
