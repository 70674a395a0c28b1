// Packing of integer weights from the disk layout: see layout.h.

#include "layout.h"

namespace {

// Codes of row `words` from input `from`, n of them.
void read_codes(const uint32_t* words, int bits, int64_t from, int64_t n, uint8_t* codes) {
  uint32_t mask = (1u << bits) - 1;
  for (int64_t i = 0; i < n; i++) {
    int64_t bit = (from + i) * bits;
    uint64_t two = words[bit / 32];
    if (bit % 32 + bits > 32) two |= uint64_t(words[bit / 32 + 1]) << 32;
    codes[i] = uint8_t(two >> (bit % 32) & mask);
  }
}

// One chunk of one row: codes [chunk] into the row's four bytes of each plane (they are zero so far).
void write_chunk(int bits, const uint8_t* codes, uint8_t* to) {
  for (int j = 0; j < 4; j++) {
    if (bits == 8) {
      to[j] = codes[j];
    } else if (bits == 4) {
      to[j] = uint8_t(codes[j] | codes[4 + j] << 4);
    } else if (bits == 2) {
      to[j] = uint8_t(codes[j] | codes[4 + j] << 2 | codes[8 + j] << 4 | codes[12 + j] << 6);
    } else {
      static const int low_at[4] = {0, 1, 3, 5}, high_at[4] = {2, 4, 6, 7};
      int a = 0, b = 0, c = 0;
      for (int f = 0; f < 4; f++) {
        int first = codes[4 * f + j], second = codes[16 + 4 * f + j];
        a |= first >> 1 << 2 * f;
        c |= (first & 1) << low_at[f];
        b |= (second & 3) << 2 * f;
        c |= second >> 2 << high_at[f];
      }
      to[j] = uint8_t(a);
      to[64 + j] = uint8_t(b);
      to[128 + j] = uint8_t(c);
    }
  }
}

}  // namespace

extern "C" int64_t ck_weight_bytes(const ck_weight* weight) {
  Layout l;
  int status = layout_of(weight, &l);
  return status ? status : l.bytes;
}

extern "C" int ck_weight_pack(const ck_weight* weight, const int32_t* words, int64_t words_stride, int32_t disk_bits,
                              const void* scale, const uint8_t* zero_points, void* buffer, int64_t buffer_bytes,
                              int32_t n_threads) {
  Layout l;
  int status = layout_of(weight, &l);
  if (status) return status;
  if (!words || !scale || !buffer || (!weight->symmetric && !zero_points)) return CK_ERR_NULL;
  if (disk_bits < 1 || disk_bits > weight->bits) return CK_ERR_BITS;
  if (words_stride < ceil_div(weight->in_features * disk_bits, 32)) return CK_ERR_STRIDE;
  if (buffer_bytes != l.bytes) return CK_ERR_BYTES;
  if (!aligned(buffer, 64)) return CK_ERR_ALIGNMENT;
  if (n_threads < 1) return CK_ERR_THREADS;

  uint8_t* out = static_cast<uint8_t*>(buffer);
  const int64_t scale_bytes = dtype_bytes(weight->scale_dtype);
  const char* scales_in = static_cast<const char*>(scale);
  const Layout& layout = l;
  parallel(n_threads, [&](int thread, int n) {
    Range tiles = share(layout.n_tiles, thread, n);
    for (int64_t tile = tiles.begin; tile < tiles.end; tile++) {
      uint8_t* codes_out = out + tile * layout.tile_bytes;
      memset(codes_out, 0, size_t(layout.tile_bytes));
      for (int row = 0; row < TILE; row++) {
        int64_t o = tile * TILE + row;
        bool there = o < weight->out_features;
        for (int64_t g = 0; g < layout.n_groups; g++) {
          int64_t to = (tile * layout.n_groups + g) * TILE + row, from = o * layout.n_groups + g;
          char* scale_out = reinterpret_cast<char*>(out + layout.scales_at) + to * scale_bytes;
          if (there) memcpy(scale_out, scales_in + from * scale_bytes, size_t(scale_bytes));
          else memset(scale_out, 0, size_t(scale_bytes));
          if (!weight->symmetric) out[layout.zeros_at + to] = there ? zero_points[from] : 0;
        }
        if (!there) continue;
        const uint32_t* stream = reinterpret_cast<const uint32_t*>(words) + o * words_stride;
        for (int64_t b = 0; b < layout.n_blocks; b++) {
          uint8_t codes[MAX_BLOCK] = {0};  // a padded block is no longer than this
          read_codes(stream, disk_bits, block_start(layout, b), block_length(layout, b), codes);
          for (int64_t c = 0; c < layout.chunks_per_block; c++)
            write_chunk(layout.bits, codes + c * layout.chunk,
                        codes_out + b * layout.block_bytes + c * layout.chunk_bytes + 4 * row);
        }
      }
    }
  });
  // the gaps that rounding up to 64 bytes leaves
  int64_t scales_end = l.scales_at + l.n_tiles * l.n_groups * TILE * scale_bytes;
  memset(out + scales_end, 0, size_t(l.zeros_at - scales_end));
  if (!weight->symmetric) {
    int64_t zeros_end = l.zeros_at + l.n_tiles * l.n_groups * TILE;
    memset(out + zeros_end, 0, size_t(l.bytes - zeros_end));
  }
  return CK_OK;
}
