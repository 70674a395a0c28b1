// Packed integer weights: tiles of 16 rows, so that an instruction that adds four products into each 32-bit lane serves 16
// rows at once, and a row's sum never has to be gathered from lanes.
//
// Inputs come in blocks: a group of up to 128 inputs is a block, a longer group is cut into blocks of 128 (the last one may
// be short). Blocks are padded with code 0 to whole chunks of `chunk` inputs; activations are padded with 0.
//
//   codes   [tile][block][chunk][64 bytes, three times 64 for 3 bits]
//           byte 4 r + j belongs to row r of the tile. With k counted from the start of the chunk:
//   8 bits  chunk  4   code(j)
//   4 bits  chunk  8   code(j) | code(4 + j) << 4
//   2 bits  chunk 16   code(j) | code(4 + j) << 2 | code(8 + j) << 4 | code(12 + j) << 6
//   3 bits  chunk 32   fields f = 0..7 are k = 4 f + j; planes of two bits A (f < 4) and B, and of one bit C:
//           A  code >> 1 at bits 2 f;  low bits in C at bit 0, 1, 3, 5 for f = 0..3:   so f > 0 is (A | C) in place
//           B  code & 3 at bits 2 (f - 4);  high bits in C at bit 2, 4, 6, 7 for f = 4..7: so f < 7 is (B | C) in place
//   scales  [tile][group][16] of scale_dtype
//   zeros   [tile][group][16] bytes, if asymmetric
//
// Each part starts at a multiple of 64 bytes. Rows behind the last one have scale 0.

#ifndef CK_LAYOUT_H
#define CK_LAYOUT_H

#include "common.h"

namespace {

constexpr int TILE = 16;        // rows
constexpr int MAX_BLOCK = 128;  // inputs that share an activation scale, and an int32 sum
constexpr int64_t MAX_FEATURES = int64_t(1) << 30;
constexpr int64_t MAX_BYTES = int64_t(1) << 46;

constexpr int chunk_of(int bits) { return bits == 8 ? 4 : bits == 4 ? 8 : bits == 2 ? 16 : 32; }
constexpr int chunk_bytes_of(int bits) { return bits == 3 ? 192 : 64; }

}  // namespace

namespace ck {

struct Layout {
  int bits, chunk, chunk_bytes;
  int64_t n_tiles, n_groups, group_size;
  int64_t block, padded_block;  // inputs in a block, and with its padding
  int64_t blocks_per_group, n_blocks, chunks_per_block;
  int64_t block_bytes, tile_bytes;                 // of codes
  int64_t scales_at, zeros_at, bytes;              // offsets in the buffer
};

}  // namespace ck

namespace {

using ck::Layout;

// CK_OK, or what is wrong.
CK_INLINE int layout_of(const ck_weight* w, Layout* l) {
  if (!w) return CK_ERR_NULL;
  if (w->version != CK_LAYOUT_VERSION || w->reserved != 0) return CK_ERR_VERSION;
  if (w->bits != 2 && w->bits != 3 && w->bits != 4 && w->bits != 8) return CK_ERR_BITS;
  if (!dtype_known(w->scale_dtype)) return CK_ERR_DTYPE;
  if (w->out_features < 1 || w->in_features < 1 || w->out_features > MAX_FEATURES || w->in_features > MAX_FEATURES)
    return CK_ERR_SHAPE;
  if (w->group_size < 1 || w->group_size > w->in_features || w->in_features % w->group_size) return CK_ERR_GROUP;
  if (w->symmetric != 0 && w->symmetric != 1) return CK_ERR_ZERO_POINT;
  if (w->zero_point < 0 || w->zero_point >= 1 << w->bits) return CK_ERR_ZERO_POINT;
  l->bits = w->bits;
  l->chunk = chunk_of(w->bits);
  l->chunk_bytes = chunk_bytes_of(w->bits);
  l->group_size = w->group_size;
  l->n_groups = w->in_features / w->group_size;
  l->block = min64(w->group_size, MAX_BLOCK);
  l->padded_block = round_up(l->block, l->chunk);
  l->blocks_per_group = ceil_div(w->group_size, l->block);
  l->n_blocks = l->n_groups * l->blocks_per_group;
  l->chunks_per_block = l->padded_block / l->chunk;
  l->n_tiles = ceil_div(w->out_features, TILE);
  l->block_bytes = l->chunks_per_block * l->chunk_bytes;
  l->tile_bytes = l->n_blocks * l->block_bytes;
  if (l->tile_bytes > MAX_BYTES / l->n_tiles) return CK_ERR_SHAPE;
  int64_t n_scales = l->n_tiles * l->n_groups * TILE;
  l->scales_at = l->n_tiles * l->tile_bytes;  // whole chunks: a multiple of 64
  l->zeros_at = round_up(l->scales_at + n_scales * dtype_bytes(w->scale_dtype), 64);
  l->bytes = round_up(l->zeros_at + (w->symmetric ? 0 : n_scales), 64);
  return CK_OK;
}

// First input of a block, and how many it has.
CK_INLINE int64_t block_start(const Layout& l, int64_t b) {
  return b / l.blocks_per_group * l.group_size + b % l.blocks_per_group * l.block;
}
CK_INLINE int64_t block_length(const Layout& l, int64_t b) {
  return min64(l.block, l.group_size - b % l.blocks_per_group * l.block);
}

}  // namespace
#endif
