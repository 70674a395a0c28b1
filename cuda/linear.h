// What the two linears share: a block's product on tensor cores, scales and zero points, the low-rank part.
//
//   sum[row, token] = sum over groups  scale[row, group] (sum over the group  (code - c) x  -  (zero - c) sum over it  x)
//
// Codes enter the tensor cores as exact small integers; scales meet float32 sums, once per group. The sums of x that zero
// points need come from one more multiplication, by ones: no instruction per code.

#ifndef CC_LINEAR_H
#define CC_LINEAR_H

#include "convert.h"
#include "launch.h"
#include "layout.h"

template <int BITS>
constexpr int STAGES = BITS == 8 ? 3 : 4;  // blocks of inputs under way, to hide the latency of memory; what fits in 99 KB
constexpr int TOKENS = 8;         // columns of an mma
constexpr int X_BYTES = TOKENS * BLOCK * 2;  // a block of inputs of 8 tokens

// The kernels' view of cc_weight and cc_operands.
struct Linear {
  const uint8_t *codes, *scales, *zeros;
  const uint16_t *x, *hidden, *bias;
  const uint8_t* left;
  uint16_t* out;
  float* partial;  // [splits][tokens][row_blocks * BLOCK], where splits > 1
  int64_t x_stride, hidden_stride, out_stride;
  int32_t tokens, x_columns, rank, out_features;
  int32_t row_blocks, input_blocks, rank_blocks, n_groups, groups_per_block, blocks_per_group;
  int32_t splits;
  bool symmetric, scales_bf16;
};

// Shared memory of a stage, for `rows` row blocks and `tokens` tokens: codes, x, scales, zeros. Scales of a group per row
// are read at the end instead.
struct Stage {
  int x_at, scales_at, zeros_at, bytes;
};
CC_HD Stage stage_of(int bits, int rows, int tokens, int groups_per_block, bool symmetric) {
  Stage s;
  s.x_at = rows * block_bytes(bits);
  s.scales_at = s.x_at + tokens / TOKENS * X_BYTES;
  s.zeros_at = s.scales_at + rows * groups_per_block * SCALE_BYTES;
  s.bytes = s.zeros_at + (symmetric ? 0 : rows * groups_per_block * ZERO_BYTES);
  return s;
}

// Where 16 bytes of x lie in a stage: chunk c (8 inputs) of a token. Odd tokens have the halves of their 128 bytes swapped,
// so that the 8 lanes that shared memory serves at a time read 8 different 16-byte banks.
CC_HD int x_chunk(int token, int c) { return token * (BLOCK * 2) + ((c ^ (token & 1) * 4) * VECTOR_BYTES); }

// Which group block k belongs to, without a division per block.
struct Walk {
  int32_t group, rest;  // the group's number, and how many of its blocks lie before
};
CC_DEVICE Walk walk_from(const Linear& a, int k) {
  if (a.groups_per_block == 2) return {2 * k, 0};
  return {k / a.blocks_per_group, k % a.blocks_per_group};
}
CC_DEVICE void advance(const Linear& a, Walk& w) {
  if (a.groups_per_block == 2) w.group += 2;
  else if (++w.rest == a.blocks_per_group) ++w.group, w.rest = 0;
}

template <int NT>
struct Sums {
  float group[TILES][NT][4];  // of the group at hand, without its scale
  float x[NT][4];             // sums of x over that group, if asymmetric
  float total[TILES][NT][4];
};

template <int NT>
CC_DEVICE void clear_group(Sums<NT>& s) {
#pragma unroll
  for (int n = 0; n < NT; ++n)
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      s.x[n][c] = 0.0f;
#pragma unroll
      for (int m = 0; m < TILES; ++m) s.group[m][n][c] = 0.0f;
    }
}

template <int NT>
CC_DEVICE void clear(Sums<NT>& s) {
  clear_group(s);
#pragma unroll
  for (int m = 0; m < TILES; ++m)
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int c = 0; c < 4; ++c) s.total[m][n][c] = 0.0f;
}

// The group at hand joins the total. scales, zeros: those of its rows, at this lane's g.
template <int BITS, int NT>
CC_DEVICE void close_group(Sums<NT>& s, const uint8_t* scales, const uint8_t* zeros, bool symmetric, bool bf16) {
  float scale[8];
  scales_of(load_16(scales), bf16, scale);
  if (!symmetric) {
    const uint2 packed = load_8(zeros);
#pragma unroll
    for (int m = 0; m < TILES; ++m)
#pragma unroll
      for (int hi = 0; hi < 2; ++hi) {
        const float zero = zero_of<BITS>(packed, 2 * m + hi);
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
          for (int c = 0; c < 2; ++c) s.group[m][n][2 * hi + c] -= zero * s.x[n][c];
      }
  }
#pragma unroll
  for (int m = 0; m < TILES; ++m)
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int c = 0; c < 4; ++c) s.total[m][n][c] += scale[2 * m + c / 2] * s.group[m][n][c];
  clear_group(s);
}

// One step, 16 inputs: all row tiles by all tokens.
template <class T, int BITS, int NT>
CC_DEVICE void step(Sums<NT>& s, const uint32_t* words, const uint32_t (*b)[2], bool sum_x) {
  uint32_t a[4];
#define CC_TILE(M)                                                                 \
  fragment<T, BITS, M>(words, a);                                                  \
  _Pragma("unroll") for (int n = 0; n < NT; ++n) multiply<T>(s.group[M][n], a, b[n][0], b[n][1]);
  CC_TILE(0) CC_TILE(1) CC_TILE(2) CC_TILE(3)
#undef CC_TILE
  if (sum_x) {
    constexpr uint32_t one = both(uint32_t(T::BIAS) << T::MANTISSA);
    const uint32_t ones[4] = {one, one, one, one};
#pragma unroll
    for (int n = 0; n < NT; ++n) multiply<T>(s.x[n], ones, b[n][0], b[n][1]);
  }
}

// Where a lane finds its parts of a block in a stage, in bytes.
struct Places {
  int codes, x[2], scales, zeros;  // first vector; x of either half of its first token; of its rows and first group, at its g
};
CC_DEVICE Places places_of(const Stage& stage, int row, int bits, int first_token, int groups_per_block) {
  const int lane = threadIdx.x % LANES, g = lane / 4, t = lane % 4;
  return {keep(row * block_bytes(bits) + lane * VECTOR_BYTES),
          {keep(stage.x_at + x_chunk(first_token + g, t)), keep(stage.x_at + x_chunk(first_token + g, 4 + t))},
          keep(stage.scales_at + row * groups_per_block * SCALE_BYTES + g * 16),
          keep(stage.zeros_at + row * groups_per_block * ZERO_BYTES + g * 8)};
}

// A block that lies in a stage.
template <class T, int BITS, int NT>
CC_DEVICE void block_product(Sums<NT>& s, const Linear& a, const uint8_t* stage, const Places& at, bool group_ends) {
  uint32_t words[4 * BITS];
#pragma unroll
  for (int j = 0; j < BITS; ++j) {
    const uint4 v = load_16(stage + at.codes + j * LANES * VECTOR_BYTES);
    words[4 * j] = v.x, words[4 * j + 1] = v.y, words[4 * j + 2] = v.z, words[4 * j + 3] = v.w;
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    uint4 v[NT];
#pragma unroll
    for (int n = 0; n < NT; ++n) v[n] = load_16(stage + at.x[h] + n * X_BYTES);
    uint32_t b[NT][2];
#pragma unroll
    for (int n = 0; n < NT; ++n) b[n][0] = v[n].x, b[n][1] = v[n].y;
    step<T, BITS, NT>(s, words + (2 * h) * BITS, b, !a.symmetric);
#pragma unroll
    for (int n = 0; n < NT; ++n) b[n][0] = v[n].z, b[n][1] = v[n].w;
    step<T, BITS, NT>(s, words + (2 * h + 1) * BITS, b, !a.symmetric);
    if (a.groups_per_block == 2 || (h == 1 && group_ends)) {
      const int group = a.groups_per_block == 2 ? h : 0;
      close_group<BITS>(s, stage + at.scales + group * SCALE_BYTES, stage + at.zeros + group * ZERO_BYTES, a.symmetric,
                        a.scales_bf16);
    }
  }
}

// hidden left^T, for blocks of 64 ranks: 16-bit fragments [row block][rank block][step][m][lane][4 registers], read directly.
template <class T, int NT>
CC_DEVICE void low_rank(Sums<NT>& s, const Linear& a, int row_block, int first_token, Range blocks) {
  const int lane = threadIdx.x % LANES, g = lane / 4, t = lane % 4;
  for (int k = blocks.begin; k < blocks.end; ++k) {
    const uint8_t* left = a.left + ((int64_t(row_block) * a.rank_blocks + k) * 16 * LANES + lane) * VECTOR_BYTES;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      uint4 v[NT];
      const int column = k * BLOCK + 32 * h + 8 * t;
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const int token = first_token + n * TOKENS + g;
        v[n] = token < a.tokens && column < a.rank ? load_constant(a.hidden + token * a.hidden_stride + column)
                                                   : make_uint4(0, 0, 0, 0);
      }
#pragma unroll
      for (int second = 0; second < 2; ++second)
#pragma unroll
        for (int m = 0; m < TILES; ++m) {
          const uint4 l = load_constant(left + ((2 * h + second) * TILES + m) * LANES * VECTOR_BYTES);
          const uint32_t fragment[4] = {l.x, l.y, l.z, l.w};
#pragma unroll
          for (int n = 0; n < NT; ++n)
            multiply<T>(s.total[m][n], fragment, second ? v[n].z : v[n].x, second ? v[n].w : v[n].y);
        }
    }
  }
}

// The value of one output, or its part in this split.
template <class T>
CC_DEVICE void store(const Linear& a, int token, int row, int split, float value) {
  if (a.splits > 1) {
    a.partial[(int64_t(split) * a.tokens + token) * a.row_blocks * BLOCK + row] = value;
  } else if (row < a.out_features) {
    if (a.bias) value += float_of_half<T>(a.bias[row]);
    a.out[token * a.out_stride + row] = half_of_float<T>(value);
  }
}

// Adds the splits in order, so that every run gives the same bits. One output per thread.
template <class T>
__global__ void add_splits_kernel(Linear a) {
  const int row = blockIdx.x * blockDim.x + threadIdx.x, token = blockIdx.y;
  if (row >= a.out_features) return;
  const int64_t step = int64_t(a.tokens) * a.row_blocks * BLOCK;
  const float* p = a.partial + int64_t(token) * a.row_blocks * BLOCK + row;
  float value = 0.0f;
  for (int split = 0; split < a.splits; ++split) value += p[split * step];
  if (a.bias) value += float_of_half<T>(a.bias[row]);
  a.out[token * a.out_stride + row] = half_of_float<T>(value);
}

// Host: checks what both linears are given. CC_OK, or what is wrong.
int linear_of(const cc_weight* weight, const void* buffer, int64_t buffer_bytes, const cc_operands* operands, Linear* a);

constexpr int ADD_THREADS = 128;

template <class T>
static void add_splits(const Linear& a, void* stream) {
  if (a.splits == 1) return;
  CC_LAUNCH(add_splits_kernel<T>, dim3(unsigned(ceil_div(a.out_features, ADD_THREADS)), unsigned(a.tokens)),
            dim3(ADD_THREADS), 0, static_cast<cudaStream_t>(stream), a);
}

#endif
