// What sign_planes.cpp and the units that hold its kernels agree on.
//
// One or few tokens: y = sum_b left_b (S_b z_b), z_b[j][c] = x[j] scale[j] right_b[j][c]. Signs of neighbouring inputs together are
// a number; what that number makes of their z's is looked up in a table, not added up. Two forms of table:
//
//   floats   per 4 inputs 16 sums [16][16 ranks] float32: an addition of 16 lanes for the 4 signs of a row
//   words    per 5 inputs 32 sums, int16: one permutation looks up 32 rows; z is rounded so that the sums of 64 inputs fit
//
// More tokens: rows of the weight are rebuilt, in registers, for a product that the caller makes.

#ifndef CK_SIGN_PLANES_H
#define CK_SIGN_PLANES_H

#include "common.h"

namespace ck {

constexpr int LANES = 16;     // ranks worked on at a time
constexpr int COLUMNS = 64;   // inputs of a tile
constexpr int STRIPE = 2 * LANES;  // columns whose right factors lie together
constexpr int ROWS = 32;      // rows worked on at a time by words
constexpr int FLOAT_TABLES = COLUMNS / 4, WORD_TABLES = 13;  // of a tile; words: 4 x 3 of five inputs, one of the four left over
constexpr int64_t FLOAT_TILE = FLOAT_TABLES * 16 * LANES;    // floats
constexpr int64_t WORD_TILE = LANES * WORD_TABLES * 32;      // int16

// One product of one token, or rows of the weight.
struct SignPlanesCall {
  const ck_sign_block* blocks;
  int64_t n_blocks, out_features, in_features, row_bytes;
  const uint16_t* scale;  // float16 [in], or null
  const void* x;          // [in] of x_dtype
  int32_t x_dtype;

  const uint8_t* signs;   // of the block that is worked on, and its ranks first_rank .. first_rank + n_ranks
  const uint16_t *left, *right;
  int64_t rank, first_rank;
  int n_ranks;
  void* tables;           // [tile]: floats [FLOAT_TILE] or int16 [WORD_TILE]
  float* steps;           // words: [tile], what a unit of the tables is worth
  float* factors;         // words: [rows / ROWS][LANES][ROWS], the left factor; floats: sums [out][LANES]
  float* y;               // [out rounded up to ROWS]; words: of ROWS rows those of even number before those of odd

  float* inner;           // rows: right factors [stripe of columns][all ranks][STRIPE]
  float* outer;           // left factors [row][all ranks]
  int64_t all_ranks;
  void* dense;
  int32_t dense_dtype;
  int64_t dense_stride, first_row;
};

struct SignPlanesKernels {
  void (*float_tables)(const SignPlanesCall& call, int64_t first_tile, int64_t end_tile);
  void (*float_rows)(const SignPlanesCall& call, int64_t first_row, int64_t end_row);
  void (*word_tables)(const SignPlanesCall& call, int64_t first_tile, int64_t end_tile);  // null: has no such form
  void (*word_factors)(const SignPlanesCall& call, int64_t first_group, int64_t end_group);  // groups of ROWS rows
  void (*word_rows)(const SignPlanesCall& call, int64_t first_group, int64_t end_group);
  void (*inner)(const SignPlanesCall& call, int64_t first_stripe, int64_t end_stripe);
  void (*outer)(const SignPlanesCall& call, int64_t first_row, int64_t end_row);
  void (*rows)(const SignPlanesCall& call, int64_t first_row, int64_t end_row);
};

const SignPlanesKernels* sign_planes_portable();
const SignPlanesKernels* sign_planes_avx2();
const SignPlanesKernels* sign_planes_avx512();

}  // namespace ck
#endif
