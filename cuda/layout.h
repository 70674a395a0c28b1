// The packed weight, and which code of it lies where.
//
// Y^T = W X^T on tensor cores: W is the first operand of mma.m16n8k16, tokens are its 8 columns. A block is 64 rows by 64
// inputs: 4 row tiles m by 4 steps of the instruction, 128 codes for each of the warp's 32 lanes. Lane = 4 g + t holds
//
//   rows    16 m + 8 hi + g                      m = 0..3, hi = 0, 1          (g = 0..7)
//   inputs  32 h + 8 t + 4 s + 2 b + e           step = 2 h + s, b, e = 0, 1  (t = 0..3)
//
// so that a lane's inputs of half a block are 8 neighbours: 16 bytes of activations, which are the second operand of two
// steps as they are. The order of inputs inside the instruction does not matter, as long as both operands agree.
//
// A step's 32 codes of a lane are 16 pairs (e = 0 in the low half of a 32-bit word, e = 1 in the high half), pair
// p = 4 m + 2 b + hi being register 2 b + hi of tile m's fragment. They fill `bits` words:
//
//   2, 4, 8 bits   pair p in word p / (16 / bits), from bit (p mod (16 / bits)) * bits of both halves
//   3 bits         pair p < 15 in word p / 5, from bit p mod 5 * 3; bit i of pair 15 is bit 15 of word i
//
// A lane has 4 * bits words of a block: `bits` vectors of 128 bits. In memory:
//
//   codes   [row block][input block][vector][lane][4 words]        row and input blocks behind the matrix: the middle code
//   scales  [row block][group][g][m][hi]  16-bit floats; 0 behind the matrix
//   zeros   [row block][group][g][m][hi]  one byte each, if asymmetric
//
// Each part starts at a multiple of 128 bytes. Groups: 32 (an odd number of them is padded to an even one), any multiple of
// 64, or a whole row. compress/kernels/cuda/layout.py builds all this.

#ifndef CC_LAYOUT_H
#define CC_LAYOUT_H

#include "compress_cuda.h"
#include "platform.h"

constexpr int BLOCK = 64;        // rows, and inputs, of a block
constexpr int TILES = 4;         // of 16 rows in a block
constexpr int LANES = 32;
constexpr int VECTOR_BYTES = 16;
constexpr int SCALE_BYTES = BLOCK * 2;  // of a block of rows and a group
constexpr int ZERO_BYTES = BLOCK;
constexpr int64_t MAX_FEATURES = int64_t(1) << 30;

struct Layout {
  int32_t row_blocks, input_blocks, n_groups;  // groups as stored
  int32_t groups_per_block;                    // 2: groups of 32; 1: of whole blocks; 0: one per row
  int32_t blocks_per_group;
  int64_t scales_at, zeros_at, bytes;
};

CC_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
CC_HD int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

CC_HD int row_in_block(int m, int hi, int g) { return 16 * m + 8 * hi + g; }
CC_HD int input_in_block(int step, int t, int b, int e) { return 32 * (step / 2) + 8 * t + 4 * (step % 2) + 2 * b + e; }

// Bytes of a lane's codes in one block for all 32 lanes.
CC_HD int block_bytes(int bits) { return bits * LANES * VECTOR_BYTES; }

// Part `part` of `parts` of n things: [begin, end).
struct Range {
  int32_t begin, end;
};
CC_HD Range share(int64_t n, int64_t part, int64_t parts) {
  return {int32_t(n * part / parts), int32_t(n * (part + 1) / parts)};
}

// CC_OK, or what is wrong.
CC_HD int layout_of(const cc_weight* w, Layout* l) {
  if (!w) return CC_ERR_NULL;
  if (w->version != CC_LAYOUT_VERSION || w->reserved != 0) return CC_ERR_VERSION;
  if (w->bits != 2 && w->bits != 3 && w->bits != 4 && w->bits != 8) return CC_ERR_BITS;
  if (w->scale_dtype != CC_F16 && w->scale_dtype != CC_BF16) return CC_ERR_DTYPE;
  if (w->symmetric != 0 && w->symmetric != 1) return CC_ERR_ZERO_POINT;
  if (w->out_features < 1 || w->in_features < 1 || w->out_features > MAX_FEATURES || w->in_features > MAX_FEATURES)
    return CC_ERR_SHAPE;
  int64_t group = w->group_size;
  if (group < 1 || group > w->in_features || w->in_features % group) return CC_ERR_GROUP;
  if (group != w->in_features && group != BLOCK / 2 && group % BLOCK) return CC_ERR_GROUP;
  l->row_blocks = int32_t(ceil_div(w->out_features, BLOCK));
  l->input_blocks = int32_t(ceil_div(w->in_features, BLOCK));
  l->groups_per_block = group == w->in_features ? 0 : group == BLOCK / 2 ? 2 : 1;
  l->blocks_per_group = l->groups_per_block == 1 ? int32_t(group / BLOCK) : 1;
  l->n_groups = l->groups_per_block == 0   ? 1
                : l->groups_per_block == 1 ? int32_t(w->in_features / group)
                                           : 2 * l->input_blocks;
  l->scales_at = int64_t(l->row_blocks) * l->input_blocks * block_bytes(w->bits);
  l->zeros_at = l->scales_at + int64_t(l->row_blocks) * l->n_groups * SCALE_BYTES;
  l->bytes = round_up(l->zeros_at + (w->symmetric ? 0 : int64_t(l->row_blocks) * l->n_groups * ZERO_BYTES), 128);
  return CC_OK;
}

#endif
