// The kernels of sign_planes.h but for the word tables, for the vectors V of 16 floats; `flip_positive(v, bits)` is the unit's:
// lanes whose bit is 1 change their sign.

#ifndef CK_SIGN_PLANES_KERNEL_H
#define CK_SIGN_PLANES_KERNEL_H

#include "sign_planes.h"

namespace {

using ck::COLUMNS;
using ck::LANES;
using ck::SignPlanesCall;

CK_INLINE uint64_t sign_word(const uint8_t* row, int64_t byte, int64_t row_bytes) {  // 8 bytes; 0 behind the row's end
  uint64_t word = 0;
  memcpy(&word, row + byte, size_t(min64(8, row_bytes - byte)));
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
    const bool whole = tile * 8 + 8 <= call.row_bytes;
    for (int64_t i = first_row; i < end_row; i++) {
      const uint8_t* row = call.signs + i * call.row_bytes;
      uint64_t word;
      if (whole) memcpy(&word, row + tile * 8, 8);
      else word = sign_word(row, tile * 8, call.row_bytes);
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

// Right factors of all blocks, transposed: [rank][padded in], zeros behind the inputs.
template <class V>
void inner_factors(const SignPlanesCall& call, int64_t first, int64_t end) {
  float* to = call.inner;
  for (int64_t b = 0; b < call.n_blocks; b++) {
    const ck_sign_block& block = call.blocks[b];
    const uint16_t* right = static_cast<const uint16_t*>(block.right);
    for (int64_t c0 = 0; c0 < block.rank; c0 += LANES) {
      const int n = int(min64(LANES, block.rank - c0));
      for (int64_t j0 = first; j0 < end; j0 += LANES) {
        alignas(64) float square[LANES * LANES];
        for (int i = 0; i < LANES; i++)
          V::store(square + i * LANES, j0 + i < call.in_features ? ranks_of<V>(right, j0 + i, block.rank, c0, n)
                                                                 : V::broadcast(0.0f));
        for (int c = 0; c < n; c++)
          for (int i = 0; i < LANES; i++) to[(c0 + c) * call.padded_inputs + j0 + i] = square[i * LANES + c];
      }
    }
    to += block.rank * call.padded_inputs;
  }
}

template <class V, int R, int C>  // R rows by C vectors of columns
CK_INLINE void rebuilt_tile(const SignPlanesCall& call, int64_t row, int64_t column) {
  using Floats = typename V::Floats;
  Floats total[R][C];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < C; v++) total[r][v] = V::broadcast(0.0f);
  const float* inner = call.inner + column;
  for (int64_t b = 0; b < call.n_blocks; b++) {
    const ck_sign_block& block = call.blocks[b];
    const uint16_t* left = static_cast<const uint16_t*>(block.left) + row * block.rank;
    Floats term[R][C];
    for (int r = 0; r < R; r++)
      for (int v = 0; v < C; v++) term[r][v] = V::broadcast(0.0f);
    for (int64_t c0 = 0; c0 < block.rank; c0 += LANES) {
      const int n = int(min64(LANES, block.rank - c0));
      alignas(64) float outer[R][LANES];
      for (int r = 0; r < R; r++) V::store(outer[r], ranks_of<V>(left, r, block.rank, c0, n));
      for (int c = 0; c < n; c++) {
        Floats columns[C];
        for (int v = 0; v < C; v++) columns[v] = V::floats(inner + v * LANES);
        inner += call.padded_inputs;
        for (int r = 0; r < R; r++) {
          const Floats factor = V::broadcast(outer[r][c]);
          for (int v = 0; v < C; v++) term[r][v] = V::fmadd(factor, columns[v], term[r][v]);
        }
      }
    }
    for (int r = 0; r < R; r++) {
      const uint8_t* signs = block.signs + (row + r) * call.row_bytes;
      const uint64_t word = sign_word(signs, column / 8, call.row_bytes);
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
      if (n == LANES) {
        V::store_as(to, call.dense_dtype, w);
      } else {
        alignas(64) float kept[LANES];
        V::store_as(kept, call.dense_dtype, w);
        memcpy(to, kept, size_t(n * dtype_bytes(call.dense_dtype)));
      }
    }
  }
}

template <class V, int R, int C>
void rebuilt_rows(const SignPlanesCall& call, int64_t first, int64_t end) {
  constexpr int64_t STRIPE = 512;  // columns: their right factors stay in the caches while all rows pass
  for (int64_t stripe = 0; stripe < call.in_features; stripe += STRIPE) {
    const int64_t stop = min64(stripe + STRIPE, call.in_features);
    int64_t row = first;
    for (; row + R <= end; row += R)
      for (int64_t j = stripe; j < stop; j += C * LANES) rebuilt_tile<V, R, C>(call, row, j);
    for (; row < end; row++)
      for (int64_t j = stripe; j < stop; j += C * LANES) rebuilt_tile<V, 1, C>(call, row, j);
  }
}

}  // namespace
#endif
