// The kernels of sign_planes.h but for the word tables, for the vectors V of 16 floats; `flip_positive(v, bits)` is the unit's:
// lanes whose bit is 1 change their sign.

#ifndef CK_SIGN_PLANES_KERNEL_H
#define CK_SIGN_PLANES_KERNEL_H

#include "pieces.h"
#include "sign_planes.h"

namespace {

using ck::COLUMNS;
using ck::LANES;
using ck::SignPlanesCall;
using ck::STRIPE;

CK_INLINE uint64_t sign_word(const uint8_t* row, int64_t byte, int64_t row_bytes) {  // 8 bytes; 0 behind the row's end
  uint64_t word = 0;
  if (byte + 8 <= row_bytes) memcpy(&word, row + byte, 8);
  else memcpy(&word, row + byte, size_t(row_bytes - byte));
  return word;
}

CK_INLINE float scaled_input(const SignPlanesCall& call, int64_t j) {
  const float x = float_at(call.x, call.x_dtype, j);
  return call.scale ? x * float_of_f16(call.scale[j]) : x;
}

// LANES ranks of row i of a factor, as floats; those that are not there are 0.
template <class V>
CK_INLINE typename V::Floats ranks_of(const uint16_t* factor, int64_t i, int64_t rank, int64_t first, int n) {
  const uint16_t* p = factor + i * rank + first;
  if (n == LANES) return V::floats(p, CK_F16);
  uint16_t kept[LANES] = {};
  memcpy(kept, p, size_t(n) * 2);
  return V::floats(kept, CK_F16);
}

template <class V>
void float_tables(const SignPlanesCall& call, int64_t first_tile, int64_t end_tile) {
  using Floats = typename V::Floats;
  for (int64_t tile = first_tile; tile < end_tile; tile++) {
    for (int table = 0; table < ck::FLOAT_TABLES; table++) {
      float* to = static_cast<float*>(call.tables) + tile * ck::FLOAT_TILE + table * 16 * LANES;
      Floats sums[16];
      for (int i = 0; i < 4; i++) {
        const int64_t j = tile * COLUMNS + table * 4 + i;
        Floats z = V::broadcast(0.0f);
        if (j < call.in_features)
          z = V::mul(V::broadcast(scaled_input(call, j)), ranks_of<V>(call.right, j, call.rank, call.first_rank, call.n_ranks));
        for (int p = 0; p < 1 << i; p++) {  // the sums of fewer inputs, once with -z and once with +z
          const Floats before = i ? sums[p] : V::broadcast(0.0f);
          sums[p] = V::sub(before, z);
          sums[p + (1 << i)] = V::add(before, z);
        }
      }
      for (int p = 0; p < 16; p++) V::store(to + p * LANES, sums[p]);
    }
  }
}

template <class V>
void float_rows(const SignPlanesCall& call, int64_t first_row, int64_t end_row) {
  using Floats = typename V::Floats;
  const int64_t n_tiles = ceil_div(call.in_features, COLUMNS);
  for (int64_t i = first_row; i < end_row; i++) V::store(call.factors + i * LANES, V::broadcast(0.0f));
  for (int64_t tile = 0; tile < n_tiles; tile++) {  // the tables of a tile stay in the first-level cache
    const float* tables = static_cast<const float*>(call.tables) + tile * ck::FLOAT_TILE;
    for (int64_t i = first_row; i < end_row; i++) {
      uint64_t word = sign_word(call.signs + i * call.row_bytes, tile * 8, call.row_bytes);
      Floats even = V::floats(call.factors + i * LANES), odd = V::broadcast(0.0f);
      for (int table = 0; table < ck::FLOAT_TABLES; table += 2) {
        even = V::add(even, V::floats(tables + table * 16 * LANES + (word & 15) * LANES));
        odd = V::add(odd, V::floats(tables + (table + 1) * 16 * LANES + (word >> 4 & 15) * LANES));
        word >>= 8;
      }
      V::store(call.factors + i * LANES, V::add(even, odd));
    }
  }
  for (int64_t i = first_row; i < end_row; i++) {
    const Floats left = ranks_of<V>(call.left, i, call.rank, call.first_rank, call.n_ranks);
    alignas(64) float products[LANES];
    V::store(products, V::mul(left, V::floats(call.factors + i * LANES)));
    float sum = 0;
    for (int c = 0; c < LANES; c++) sum += products[c];
    call.y[i] += sum;
  }
}

// Right factors of all blocks, transposed: [columns / STRIPE][rank of a block][STRIPE], zeros behind the inputs.
template <class V>
void inner_factors(const SignPlanesCall& call, int64_t first, int64_t end) {
  for (int64_t stripe = first; stripe < end; stripe++) {
    float* to = call.inner + stripe * call.all_ranks * STRIPE;
    for (int64_t b = 0; b < call.n_blocks; b++) {
      const ck_sign_block& block = call.blocks[b];
      const uint16_t* right = static_cast<const uint16_t*>(block.right);
      for (int64_t c0 = 0; c0 < block.rank; c0 += LANES) {
        const int n = int(min64(LANES, block.rank - c0));
        alignas(64) float square[STRIPE][LANES];
        for (int i = 0; i < STRIPE; i++) {
          const int64_t j = stripe * STRIPE + i;
          V::store(square[i], j < call.in_features ? ranks_of<V>(right, j, block.rank, c0, n) : V::broadcast(0.0f));
        }
        for (int c = 0; c < n; c++)
          for (int i = 0; i < STRIPE; i++) to[c * STRIPE + i] = square[i][c];
        to += n * STRIPE;
      }
    }
  }
}

// Left factors as floats: [row][all ranks of all blocks].
template <class V>
void outer_factors(const SignPlanesCall& call, int64_t first, int64_t end) {
  for (int64_t i = first; i < end; i++) {
    float* to = call.outer + i * call.all_ranks;
    for (int64_t b = 0; b < call.n_blocks; b++) {
      const ck_sign_block& block = call.blocks[b];
      const uint16_t* left = static_cast<const uint16_t*>(block.left);
      for (int64_t c0 = 0; c0 < block.rank; c0 += LANES) {
        const int n = int(min64(LANES, block.rank - c0));
        alignas(64) float ranks[LANES];
        V::store(ranks, ranks_of<V>(left, i, block.rank, c0, n));
        memcpy(to, ranks, size_t(n) * 4);
        to += n;
      }
    }
  }
}

template <class V, int R, int C>  // R rows by C vectors of columns
CK_INLINE void rebuilt_tile(const SignPlanesCall& call, int64_t row, int64_t column) {
  using Floats = typename V::Floats;
  Floats total[R][C];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < C; v++) total[r][v] = V::broadcast(0.0f);
  const float* inner = call.inner + column / STRIPE * call.all_ranks * STRIPE + column % STRIPE;
  const float* outer = call.outer + row * call.all_ranks;
  for (int64_t b = 0; b < call.n_blocks; b++) {
    const ck_sign_block& block = call.blocks[b];
    Floats term[R][C];
    for (int r = 0; r < R; r++)
      for (int v = 0; v < C; v++) term[r][v] = V::broadcast(0.0f);
    for (int64_t c = 0; c < block.rank; c++) {
      Floats columns[C];
      for (int v = 0; v < C; v++) columns[v] = V::floats(inner + v * LANES);
      for (int r = 0; r < R; r++) {
        const Floats factor = V::broadcast(outer[r * call.all_ranks]);
        for (int v = 0; v < C; v++) term[r][v] = V::fmadd(factor, columns[v], term[r][v]);
      }
      inner += STRIPE;
      outer++;
    }
    for (int r = 0; r < R; r++) {
      const uint64_t word = sign_word(block.signs + (row + r) * call.row_bytes, column / 8, call.row_bytes);
      for (int v = 0; v < C; v++)
        total[r][v] = V::sub(total[r][v], flip_positive(term[r][v], uint32_t(word >> (16 * v)) & 0xffff));
    }
  }
  for (int v = 0; v < C; v++) {
    const int64_t j = column + v * LANES;
    const int64_t n = min64(LANES, call.in_features - j);
    if (n <= 0) break;
    Floats scale = V::broadcast(1.0f);
    if (call.scale) scale = ranks_of<V>(call.scale, j, 1, 0, int(n));
    for (int r = 0; r < R; r++) {
      const Floats w = call.scale ? V::mul(total[r][v], scale) : total[r][v];
      void* to = at(call.dense, call.dense_dtype, (row + r - call.first_row) * call.dense_stride + j);
      store_piece<V>(to, call.dense_dtype, n, w);
    }
  }
}

constexpr int64_t PANEL = 512;  // columns: their right factors stay in the caches while all rows pass

template <class V, int R, int C>
void rebuilt_rows(const SignPlanesCall& call, int64_t first, int64_t end) {
  for (int64_t panel = 0; panel < call.in_features; panel += PANEL) {
    const int64_t stop = min64(panel + PANEL, call.in_features);
    int64_t row = first;
    for (; row + R <= end; row += R)
      for (int64_t j = panel; j < stop; j += C * LANES) rebuilt_tile<V, R, C>(call, row, j);
    for (; row < end; row++)
      for (int64_t j = panel; j < stop; j += C * LANES) rebuilt_tile<V, 1, C>(call, row, j);
  }
}

}  // namespace
#endif
