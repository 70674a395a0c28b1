// The kernels of ck_linear, written once over the vectors of an instruction set.
//
// P, the instruction set, has vectors of 16 lanes, one per row of a tile:
//   Bytes, Ints, Floats      64 bytes, 16 int32, 16 float
//   dp<FULL>(acc, w, a)      acc[r] += sum_j w[4 r + j] * a[j], w unsigned, a signed bytes. FULL: w may be above 127, and then
//                            w - FULL_OFFSET is what is multiplied
//   wide(BITS, T)            codes may stay where they are in their byte (times 2^shift; an accumulator per shift): no shifts
//                            in the loop, if registers for T tokens suffice
//   NR, MT                   tiles and tokens of the register block
//   DIRECT                   most tokens for which codes are multiplied as they are unpacked; up to DIRECT_TOKENS, in groups of that
//
// A8: int32 sums over a block, exact; then total += float(sum) * (weight scale * activation scale). This is the same
// sequence of operations whatever the number of tokens and threads: a token's result does not depend on them.

#ifndef CK_LINEAR_KERNEL_H
#define CK_LINEAR_KERNEL_H

#include "linear.h"
#include "pieces.h"

#ifdef CK_SANITIZED
#define CK_UNROLL  // checks in unrolled loops take the compiler minutes
#else
#define CK_UNROLL _Pragma("GCC unroll 32")
#endif

namespace {

// ---- activations ----------------------------------------------------------------------------------------------------

// A block of x as float, padded with zeros to `padded`.
template <class P>
CK_INLINE void floats_of(const LinearCall& call, int64_t token, int64_t block, float* f) {
  const Layout& l = call.layout;
  const int64_t first = (call.first_token + token) * call.x_stride + block_start(l, block);
  padded_floats<P>(at(call.x, call.x_dtype, first), call.x_dtype, block_length(l, block), l.padded_block, f);
}

constexpr float ROUND = 12582912.0f;    // 1.5 * 2^23: adding it rounds to an integer, which then lies in the low bits
constexpr float SMALLEST = 0x1p-100f;   // a block with nothing above counts as zero: its scale could not be inverted

template <class P>
void a8_prepare(const LinearCall& call, int64_t begin, int64_t end) {
  const Layout& l = call.layout;
  const int n = int(l.padded_block);
  alignas(64) float f[MAX_BLOCK];
  alignas(64) int32_t q[MAX_BLOCK];
  alignas(64) int8_t bytes[MAX_BLOCK];
  for (int64_t i = begin; i < end; i++) {
    const int64_t block = i % l.n_blocks;
    const Group g = group_at(call, i / l.n_blocks);
    for (int t = 0; t < g.tokens; t++) {
      floats_of<P>(call, g.first + t, block, f);
      uint32_t largest = 0;  // as bits: a NaN is larger than infinity, which is larger than all numbers
      for (int k = 0; k < n; k++) {
        uint32_t magnitude = bits_of_float(f[k]) & 0x7fffffff;
        largest = magnitude > largest ? magnitude : largest;
      }
      const float amax = float_of_bits(largest);
      const bool finite = largest < 0x7f800000;
      const float inverse = finite && amax >= SMALLEST ? 127.0f / amax : 0.0f;
      int32_t sum = 0;
      if (inverse > 0) {
        for (int k = 0; k < n; k++) q[k] = int32_t(bits_of_float(f[k] * inverse + ROUND)) - int32_t(bits_of_float(ROUND));
        for (int k = 0; k < n; k++) sum += q[k];
        for (int k = 0; k < n; k++) bytes[k] = int8_t(q[k]);
      } else {
        memset(bytes, 0, size_t(n));
      }
      const int64_t place = g.first * l.n_blocks + block * g.tokens + t;
      call.q_scale[place] = !finite ? amax - amax : inverse > 0 ? amax / 127.0f : 0.0f;  // infinity, too, becomes NaN
      call.q_sum[place] = sum;
      int8_t* to = call.q + g.first * call.padded_inputs + block * n * g.tokens + t * 4;
      for (int k = 0; k < n; k += 4) memcpy(to + int64_t(k) * g.tokens, bytes + k, 4);
    }
  }
}

template <class P>
void a16_prepare_floats(const LinearCall& call, int64_t begin, int64_t end) {
  const Layout& l = call.layout;
  alignas(64) float f[MAX_BLOCK];
  for (int64_t i = begin; i < end; i++) {
    const int64_t block = i % l.n_blocks;
    const Group g = group_at(call, i / l.n_blocks);
    float* to = reinterpret_cast<float*>(call.a16) + g.first * call.padded_inputs + block * l.padded_block * g.tokens;
    for (int t = 0; t < g.tokens; t++) {
      floats_of<P>(call, g.first + t, block, f);
      float sum = 0;
      for (int64_t k = 0; k < l.padded_block; k++) {
        sum += f[k];
        to[k * g.tokens + t] = f[k];
      }
      call.a16_sum[g.first * l.n_blocks + block * g.tokens + t] = sum;
    }
  }
}

// ---- codes ----------------------------------------------------------------------------------------------------------

// A chunk's fields, codes as bytes.
template <class P, int BITS>
CK_INLINE void fields_of(const uint8_t* w, typename P::Bytes (&field)[chunk_of(BITS) / 4]) {
  if constexpr (BITS == 8) {
    field[0] = P::bytes(w);
  } else if constexpr (BITS == 4) {
    auto all = P::bytes(w);
    field[0] = P::band(all, 0x0f);
    field[1] = P::band(P::template srl<4>(all), 0x0f);
  } else if constexpr (BITS == 2) {
    auto all = P::bytes(w);
    field[0] = P::band(all, 3);
    field[1] = P::band(P::template srl<2>(all), 3);
    field[2] = P::band(P::template srl<4>(all), 3);
    field[3] = P::band(P::template srl<6>(all), 3);
  } else {
    auto a = P::bytes(w), b = P::bytes(w + 64), c = P::bytes(w + 128);
    field[0] = P::bor(P::template sll<1>(P::band(a, 0x03)), P::band(c, 1));
    field[1] = P::template srl<1>(P::select2(a, 0x0c, c, 0x02));
    field[2] = P::template srl<3>(P::select2(a, 0x30, c, 0x08));
    field[3] = P::template srl<5>(P::select2(a, 0xc0, c, 0x20));
    field[4] = P::select2(b, 0x03, c, 0x04);
    field[5] = P::template srl<2>(P::select2(b, 0x0c, c, 0x10));
    field[6] = P::template srl<4>(P::select2(b, 0x30, c, 0x40));
    field[7] = P::bor(P::template srl<6>(P::band(b, 0xc0)), P::template srl<5>(P::band(c, 0x80)));
  }
}

constexpr int accumulators(int bits, bool wide) { return !wide ? 1 : bits == 8 ? 1 : bits == 4 ? 2 : bits == 2 ? 4 : 8; }

template <class P, bool FULL, int T>
CK_INLINE void multiply(typename P::Ints (&acc)[T], const typename P::Bytes& w, const int32_t* a) {
  CK_UNROLL for (int t = 0; t < T; t++) acc[t] = P::template dp<FULL>(acc[t], w, P::broadcast(a + t));
}

// acc[i][t]: sums of codes times 2^SHIFT[i], of which the results are combined at the end of a block.
template <class P, int BITS, int T, bool WIDE>
CK_INLINE void multiply_chunk(typename P::Ints (&acc)[accumulators(BITS, WIDE)][T], const uint8_t* w, const int32_t* a) {
  if constexpr (!WIDE || BITS == 8) {
    typename P::Bytes field[chunk_of(BITS) / 4];
    fields_of<P, BITS>(w, field);
    CK_UNROLL for (int f = 0; f < chunk_of(BITS) / 4; f++) multiply<P, BITS == 8, T>(acc[0], field[f], a + f * T);
  } else if constexpr (BITS == 4) {
    auto all = P::bytes(w);
    multiply<P, true, T>(acc[0], P::band(all, 0x0f), a);
    multiply<P, true, T>(acc[1], P::band(all, 0xf0), a + T);
  } else if constexpr (BITS == 2) {
    auto all = P::bytes(w);
    multiply<P, true, T>(acc[0], P::band(all, 0x03), a);
    multiply<P, true, T>(acc[1], P::band(all, 0x0c), a + T);
    multiply<P, true, T>(acc[2], P::band(all, 0x30), a + 2 * T);
    multiply<P, true, T>(acc[3], P::band(all, 0xc0), a + 3 * T);
  } else {  // shifts 0, 1, 2, 3, 4, 5, 6, and -1
    auto x = P::bytes(w), y = P::bytes(w + 64), z = P::bytes(w + 128);
    multiply<P, true, T>(acc[7], P::band(x, 0x03), a);
    multiply<P, true, T>(acc[0], P::band(z, 0x01), a);
    multiply<P, true, T>(acc[1], P::select2(x, 0x0c, z, 0x02), a + T);
    multiply<P, true, T>(acc[3], P::select2(x, 0x30, z, 0x08), a + 2 * T);
    multiply<P, true, T>(acc[5], P::select2(x, 0xc0, z, 0x20), a + 3 * T);
    multiply<P, true, T>(acc[0], P::select2(y, 0x03, z, 0x04), a + 4 * T);
    multiply<P, true, T>(acc[2], P::select2(y, 0x0c, z, 0x10), a + 5 * T);
    multiply<P, true, T>(acc[4], P::select2(y, 0x30, z, 0x40), a + 6 * T);
    multiply<P, true, T>(acc[6], P::band(y, 0xc0), a + 7 * T);
    multiply<P, true, T>(acc[5], P::band(z, 0x80), a + 7 * T);
  }
}

template <class P, int BITS, int T, bool WIDE>
CK_INLINE typename P::Ints combined(const typename P::Ints (&acc)[accumulators(BITS, WIDE)][T], int t) {
  auto sum = acc[0][t];
  if constexpr (WIDE && BITS == 4) {
    sum = P::add(sum, P::template sra<4>(acc[1][t]));
  } else if constexpr (WIDE && BITS == 2) {
    sum = P::add(sum, P::template sra<2>(acc[1][t]));
    sum = P::add(sum, P::add(P::template sra<4>(acc[2][t]), P::template sra<6>(acc[3][t])));
  } else if constexpr (WIDE && BITS == 3) {
    sum = P::add(P::add(sum, acc[7][t]), acc[7][t]);
    sum = P::add(sum, P::add(P::template sra<1>(acc[1][t]), P::template sra<2>(acc[2][t])));
    sum = P::add(sum, P::add(P::template sra<3>(acc[3][t]), P::template sra<4>(acc[4][t])));
    sum = P::add(sum, P::add(P::template sra<5>(acc[5][t]), P::template sra<6>(acc[6][t])));
  }
  return sum;
}

// What a block needs of its group: scales, and zero points as float if there are any.
template <class P>
struct Grid {
  typename P::Floats scale, zero;
};
template <class P>
CK_INLINE Grid<P> grid_of(const LinearCall& call, int64_t tile, int64_t block, float offset) {
  const int64_t at_group = (tile * call.layout.n_groups + block / call.layout.blocks_per_group) * TILE;
  Grid<P> grid;
  grid.scale = P::floats(at(call.scales, call.scale_dtype, at_group), call.scale_dtype);
  grid.zero = call.zeros ? P::sub(P::floats_of_bytes(call.zeros + at_group), P::broadcast(offset)) : P::broadcast(0.0f);
  return grid;
}

// total + (sum - zero * activation sum) * scale; without zero points in the buffer, they are in the sum already.
template <class P>
CK_INLINE typename P::Floats scaled(const LinearCall& call, const Grid<P>& grid, typename P::Ints sum, float a_scale,
                                    int32_t a_sum, typename P::Floats total) {
  auto value = P::to_float(sum);
  if (call.zeros) value = P::fnmadd(grid.zero, P::broadcast(float(a_sum)), value);
  return P::fmadd(value, P::mul(grid.scale, P::broadcast(a_scale)), total);
}

template <class P>
CK_INLINE void finish(const LinearCall& call, int64_t token, int64_t tile, typename P::Floats total) {
  const int64_t o = tile * TILE, n = min64(TILE, call.out_features - o);
  void* out = at(call.out, call.x_dtype, (call.first_token + token) * call.out_stride + o);
  if (n == TILE) {
    if (call.bias) total = P::add(total, P::floats(at(call.bias, call.bias_dtype, o), call.bias_dtype));
    P::store_as(out, call.x_dtype, total);
    return;
  }
  alignas(64) float last[TILE];
  P::store(last, total);
  for (int64_t i = 0; i < n; i++) {
    put_float(out, call.x_dtype, i, call.bias ? last[i] + float_at(call.bias, call.bias_dtype, o + i) : last[i]);
  }
}

// ---- A8, few tokens: straight from the packed codes ------------------------------------------------------------------

template <class P, int BITS, int T>
CK_NOINLINE void a8_direct(const LinearCall& call, int64_t first_tile, int64_t end_tile, Group g) {
  constexpr bool WIDE = P::wide(BITS, T);
  constexpr int N = accumulators(BITS, WIDE);
  constexpr int FIELDS = chunk_of(BITS) / 4;
  constexpr int OFFSET = BITS == 8 ? P::FULL_OFFSET : 0;
  const Layout& l = call.layout;
  const int32_t* q = reinterpret_cast<const int32_t*>(call.q + g.first * call.padded_inputs);
  const float* a_scale = call.q_scale + g.first * l.n_blocks;
  const int32_t* a_sum = call.q_sum + g.first * l.n_blocks;
  const int32_t zero = call.zeros ? 0 : call.zero_point - OFFSET;
  for (int64_t tile = first_tile; tile < end_tile; tile++) {
    const uint8_t* w = call.codes + tile * l.tile_bytes;
    const int32_t* a = q;
    typename P::Floats total[T];
    CK_UNROLL for (int t = 0; t < T; t++) total[t] = P::broadcast(0.0f);
    for (int64_t b = 0; b < l.n_blocks; b++) {
      typename P::Ints acc[N][T];
      CK_UNROLL for (int t = 0; t < T; t++) acc[0][t] = P::broadcast(-zero * a_sum[b * T + t]);
      CK_UNROLL for (int i = 1; i < N; i++)
        CK_UNROLL for (int t = 0; t < T; t++) acc[i][t] = P::broadcast(0);
      for (int64_t c = 0; c < l.chunks_per_block; c++) {
        P::prefetch(w);
        if (BITS == 3) { P::prefetch(w + 64); P::prefetch(w + 128); }
        multiply_chunk<P, BITS, T, WIDE>(acc, w, a);
        w += chunk_bytes_of(BITS);
        a += FIELDS * T;
      }
      const Grid<P> grid = grid_of<P>(call, tile, b, OFFSET);
      CK_UNROLL for (int t = 0; t < T; t++)
        total[t] = scaled<P>(call, grid, combined<P, BITS, T, WIDE>(acc, t), a_scale[b * T + t], a_sum[b * T + t], total[t]);
    }
    CK_UNROLL for (int t = 0; t < T; t++) finish<P>(call, g.first + t, tile, total[t]);
  }
}

// ---- A8, many tokens: a block of NR tiles is unpacked once, then multiplied with all groups of tokens -----------------

// The codes of the next block, fetched while this one is multiplied, a little in each turn: asked for all at once they would
// take all buffers for misses, and what is multiplied would wait behind them.
struct Ahead {
  const uint8_t* at;     // of the first tile
  int64_t tile_bytes;
  int64_t step;          // bytes per turn; less than a line: lines are asked for more than once, which costs a slot for a load
};

template <class P, int T, int NR, bool FULL>
CK_NOINLINE void a8_block(const LinearCall& call, const uint8_t* w, const int32_t* a, int64_t n_k4, const Grid<P>* grid,
                        int32_t zero, const float* a_scale, const int32_t* a_sum, float* totals, Ahead ahead) {
  typename P::Ints acc[T][NR];
  CK_UNROLL for (int t = 0; t < T; t++)
    CK_UNROLL for (int n = 0; n < NR; n++) acc[t][n] = P::broadcast(-zero * a_sum[t]);
  for (int64_t k = 0; k < n_k4; k++, w += 64 * NR, a += T, ahead.at += ahead.step) {
    CK_UNROLL for (int n = 0; n < NR; n++) __builtin_prefetch(ahead.at + n * ahead.tile_bytes);
    typename P::Bytes tile[NR];
    CK_UNROLL for (int n = 0; n < NR; n++) tile[n] = P::bytes(w + 64 * n);
    CK_UNROLL for (int t = 0; t < T; t++) {
      const auto four = P::broadcast(a + t);
      CK_UNROLL for (int n = 0; n < NR; n++) acc[t][n] = P::template dp<FULL>(acc[t][n], tile[n], four);
    }
  }
  CK_UNROLL for (int t = 0; t < T; t++)
    CK_UNROLL for (int n = 0; n < NR; n++) {
      float* total = totals + (t * NR + n) * TILE;
      P::store(total, scaled<P>(call, grid[n], acc[t][n], a_scale[t], a_sum[t], P::floats(total)));
    }
}

template <class P, int NR, bool FULL, int T = P::MT>
CK_INLINE void a8_block_of(int tokens, const LinearCall& call, const uint8_t* w, const int32_t* a, int64_t n_k4,
                           const Grid<P>* grid, int32_t zero, const float* a_scale, const int32_t* a_sum, float* totals,
                           Ahead ahead) {
  if constexpr (T > 0) {
    if (tokens == T) a8_block<P, T, NR, FULL>(call, w, a, n_k4, grid, zero, a_scale, a_sum, totals, ahead);
    else a8_block_of<P, NR, FULL, T - 1>(tokens, call, w, a, n_k4, grid, zero, a_scale, a_sum, totals, ahead);
  }
}

template <class P, int BITS, int NR>
void a8_tiles(const LinearCall& call, int64_t tile) {
  constexpr int FIELDS = chunk_of(BITS) / 4;
  constexpr int OFFSET = BITS == 8 ? P::FULL_OFFSET : 0;
  const Layout& l = call.layout;
  const int32_t zero = call.zeros ? 0 : call.zero_point - OFFSET;
  alignas(64) uint8_t codes[NR * TILE * MAX_BLOCK];
  alignas(64) float totals[ck::SLAB * NR * TILE];
  memset(totals, 0, size_t(call.n_tokens) * NR * TILE * sizeof(float));
  for (int64_t b = 0; b < l.n_blocks; b++) {
    Grid<P> grid[NR];
    for (int n = 0; n < NR; n++) {
      const uint8_t* w = call.codes + (tile + n) * l.tile_bytes + b * l.block_bytes;
      for (int64_t c = 0; c < l.chunks_per_block; c++, w += chunk_bytes_of(BITS)) {
        typename P::Bytes field[FIELDS];
        fields_of<P, BITS>(w, field);
        CK_UNROLL for (int f = 0; f < FIELDS; f++) P::store(codes + ((c * FIELDS + f) * NR + n) * 64, field[f]);
      }
      grid[n] = grid_of<P>(call, tile + n, b, OFFSET);
    }
    const uint8_t* next = b + 1 < l.n_blocks ? call.codes + tile * l.tile_bytes + (b + 1) * l.block_bytes
                                             : call.codes + (tile + NR) * l.tile_bytes;
    const int64_t piece = ceil_div(l.block_bytes, call.n_groups), n_k4 = l.padded_block / 4;
    for (int64_t i = 0; i < call.n_groups; i++) {
      const Group g = group_at(call, i);
      const int64_t at_block = g.first * l.n_blocks + b * g.tokens;
      const int8_t* q = call.q + g.first * call.padded_inputs + b * l.padded_block * g.tokens;
      a8_block_of<P, NR, BITS == 8>(g.tokens, call, codes, reinterpret_cast<const int32_t*>(q), n_k4, grid, zero,
                                    call.q_scale + at_block, call.q_sum + at_block, totals + g.first * NR * TILE,
                                    {next + i * piece, l.tile_bytes, ceil_div(piece, n_k4)});
    }
  }
  for (int64_t token = 0; token < call.n_tokens; token++)
    for (int n = 0; n < NR; n++) finish<P>(call, token, tile + n, P::floats(totals + (token * NR + n) * TILE));
}

template <class P, int BITS, int T = P::DIRECT>
CK_INLINE void a8_direct_of(const LinearCall& call, int64_t first_tile, int64_t end_tile, Group g) {
  if constexpr (T > 0) {
    if (g.tokens == T) a8_direct<P, BITS, T>(call, first_tile, end_tile, g);
    else a8_direct_of<P, BITS, T - 1>(call, first_tile, end_tile, g);
  }
}

template <class P, int BITS>
void a8_direct_bits(const LinearCall& call, int64_t first_tile, int64_t end_tile) {
  const int64_t step = call.n_groups == 1 ? end_tile - first_tile : 1;  // else a tile stays in cache for all tokens
  for (int64_t tile = first_tile; tile < end_tile; tile += step)
    for (int64_t i = 0; i < call.n_groups; i++) a8_direct_of<P, BITS>(call, tile, tile + step, group_at(call, i));
}

template <class P, int BITS>
void a8_bits(const LinearCall& call, int64_t first_tile, int64_t end_tile) {
  int64_t tile = first_tile;
  for (; tile + P::NR <= end_tile; tile += P::NR) a8_tiles<P, BITS, P::NR>(call, tile);
  for (; tile < end_tile; tile++) a8_tiles<P, BITS, 1>(call, tile);
}

template <class P>
void a8_run_direct(const LinearCall& call, int64_t first_tile, int64_t end_tile) {
  switch (call.layout.bits) {
    case 2: a8_direct_bits<P, 2>(call, first_tile, end_tile); break;
    case 3: a8_direct_bits<P, 3>(call, first_tile, end_tile); break;
    case 4: a8_direct_bits<P, 4>(call, first_tile, end_tile); break;
    default: a8_direct_bits<P, 8>(call, first_tile, end_tile); break;
  }
}

template <class P>
void a8_run(const LinearCall& call, int64_t first_tile, int64_t end_tile) {
  switch (call.layout.bits) {
    case 2: a8_bits<P, 2>(call, first_tile, end_tile); break;
    case 3: a8_bits<P, 3>(call, first_tile, end_tile); break;
    case 4: a8_bits<P, 4>(call, first_tile, end_tile); break;
    default: a8_bits<P, 8>(call, first_tile, end_tile); break;
  }
}

// ---- A16 in float: codes become float, products are added in float ----------------------------------------------------

constexpr int A16_TOKENS = 4, A16_SLAB = 96;

template <class P, int BITS, int T>
CK_NOINLINE void a16_direct(const LinearCall& call, int64_t first_tile, int64_t end_tile, Group g) {
  constexpr int FIELDS = chunk_of(BITS) / 4;
  const Layout& l = call.layout;
  const float* x = reinterpret_cast<const float*>(call.a16) + g.first * call.padded_inputs;
  const float* a_sum = call.a16_sum + g.first * l.n_blocks;
  for (int64_t tile = first_tile; tile < end_tile; tile++) {
    const uint8_t* w = call.codes + tile * l.tile_bytes;
    const float* a = x;
    typename P::Floats total[T];
    CK_UNROLL for (int t = 0; t < T; t++) total[t] = P::broadcast(0.0f);
    for (int64_t b = 0; b < l.n_blocks; b++) {
      const Grid<P> grid = grid_of<P>(call, tile, b, 0);
      const auto zero = call.zeros ? grid.zero : P::broadcast(float(call.zero_point));
      typename P::Floats acc[2][T];
      CK_UNROLL for (int t = 0; t < T; t++) {
        acc[0][t] = P::mul(zero, P::broadcast(-a_sum[b * T + t]));
        acc[1][t] = P::broadcast(0.0f);
      }
      for (int64_t c = 0; c < l.chunks_per_block; c++, w += chunk_bytes_of(BITS)) {
        P::prefetch(w);
        typename P::Bytes field[FIELDS];
        fields_of<P, BITS>(w, field);
        CK_UNROLL for (int f = 0; f < FIELDS; f++, a += 4 * T) {
          const typename P::Floats code[4] = {P::template code<0>(field[f]), P::template code<1>(field[f]),
                                              P::template code<2>(field[f]), P::template code<3>(field[f])};
          CK_UNROLL for (int j = 0; j < 4; j++)
            CK_UNROLL for (int t = 0; t < T; t++)
              acc[j & 1][t] = P::fmadd(code[j], P::broadcast(a[j * T + t]), acc[j & 1][t]);
        }
      }
      CK_UNROLL for (int t = 0; t < T; t++) total[t] = P::fmadd(P::add(acc[0][t], acc[1][t]), grid.scale, total[t]);
    }
    CK_UNROLL for (int t = 0; t < T; t++) finish<P>(call, g.first + t, tile, total[t]);
  }
}

template <class P, int BITS>
void a16_bits(const LinearCall& call, int64_t first_tile, int64_t end_tile) {
  for (int64_t tile = first_tile; tile < end_tile; tile++)  // a tile stays in cache for all tokens
    for (int64_t i = 0; i < call.n_groups; i++) {
      const Group g = group_at(call, i);
      switch (g.tokens) {
        case 1: a16_direct<P, BITS, 1>(call, tile, tile + 1, g); break;
        case 2: a16_direct<P, BITS, 2>(call, tile, tile + 1, g); break;
        case 3: a16_direct<P, BITS, 3>(call, tile, tile + 1, g); break;
        default: a16_direct<P, BITS, 4>(call, tile, tile + 1, g); break;
      }
    }
}

template <class P>
void a16_run(const LinearCall& call, int64_t first_tile, int64_t end_tile) {
  switch (call.layout.bits) {
    case 2: a16_bits<P, 2>(call, first_tile, end_tile); break;
    case 3: a16_bits<P, 3>(call, first_tile, end_tile); break;
    case 4: a16_bits<P, 4>(call, first_tile, end_tile); break;
    default: a16_bits<P, 8>(call, first_tile, end_tile); break;
  }
}

template <class P>
constexpr ck::LinearKernels table() {
  return {{P::DIRECT_TOKENS, {ck::SLAB, P::DIRECT, 1, a8_prepare<P>, a8_run_direct<P>}, {ck::SLAB, P::MT, P::NR, a8_prepare<P>, a8_run<P>}},
          {MAX_FEATURES, {A16_SLAB, A16_TOKENS, 1, a16_prepare_floats<P>, a16_run<P>}, {}}};
}

}  // namespace
#endif
