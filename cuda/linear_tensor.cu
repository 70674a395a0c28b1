// out = x W^T + hidden L^T + bias for 17 to 64 tokens, or more in tiles of 64.
//
// Operands as in linear_decode.cu. A thread block computes 256 rows by 32 or 64 tokens: 4 warps along the rows, each with
// its own codes, times 1 or 2 along the tokens, which share them. Codes, x and scales come by asynchronous copies, STAGES
// blocks of inputs deep. 256 rows, because x passes from the L2 once per thread block: with 64 tokens 128 bytes per input,
// as many as the codes of 256 rows at 4 bits.
// Bound by the bytes of the codes below about 40 (A100) to 75 (H100) tokens at 4 bits, by the tensor cores above.
// mma.sync, not wgmma: below 64 tokens the former is not what limits, and above the library's product takes over.
// Speed against the bytes: not measured, no GPU yet.

#include "linear.h"

constexpr int ROW_WARPS = 4;
constexpr int WARP_TILES = 4;                       // of 8 tokens
constexpr int WARP_TOKENS = WARP_TILES * TOKENS;    // 32
constexpr int OUT_STRIDE = BLOCK + 4;               // floats between tokens, as in linear_decode.cu

// What a thread copies, block after block: its warp's codes, shared with the other warps of the same rows, and 2 pieces of x.
struct TensorSource {
  const uint8_t *codes, *scales, *zeros;  // of the row block; codes of the next block at this lane
  const uint16_t* x[2];                   // of the next block
  int x_left;                             // columns of x from there on
  bool token[2];                          // there is such a token
  int codes_to, x_to[2];                  // places in a stage
  Walk walk;
};

template <int BITS, int TW>
CC_DEVICE TensorSource tensor_source(const Linear& a, const Stage& stage, int row_block, int first_token, int k) {
  const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, chunk = threadIdx.x % 8;
  TensorSource from;
  from.codes = a.codes + (int64_t(row_block) * a.input_blocks + k) * block_bytes(BITS) + lane * VECTOR_BYTES;
  from.scales = a.scales + int64_t(row_block) * a.n_groups * SCALE_BYTES + lane * 16;
  from.zeros = a.zeros + int64_t(row_block) * a.n_groups * ZERO_BYTES + lane * 8;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int token = threadIdx.x / 8 + i * (TW * WARP_TOKENS / 2);
    from.token[i] = first_token + token < a.tokens;
    from.x[i] = a.x + (from.token[i] ? first_token + token : 0) * a.x_stride + k * BLOCK + 8 * chunk;
    from.x_to[i] = stage.x_at + x_chunk(token, chunk);
  }
  from.x_left = a.x_columns - k * BLOCK - 8 * chunk;
  from.codes_to = warp / TW * block_bytes(BITS) + lane * VECTOR_BYTES;
  from.walk = walk_from(a, k);
  return from;
}

// The next block is on its way into a stage at `to`.
template <int BITS, int TW>
CC_DEVICE void issue(const Linear& a, const Stage& stage, TensorSource& from, uint8_t* to, uint64_t policy) {
  const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
#pragma unroll
  for (int j = 0; j < BITS; ++j)
    if (j % TW == warp % TW)
      copy_once(to + from.codes_to + j * LANES * VECTOR_BYTES, from.codes + j * LANES * VECTOR_BYTES, policy);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const bool real = from.token[i] && from.x_left > 0;
    copy_or_zero(to + from.x_to[i], real ? from.x[i] : a.x, real);
    from.x[i] += BLOCK;
  }
  if (warp % TW == 0 && lane < 8 * a.groups_per_block) {
    const int at = warp / TW * a.groups_per_block;
    copy_or_zero(to + stage.scales_at + at * SCALE_BYTES + lane * 16,
                 from.scales + int64_t(from.walk.group) * SCALE_BYTES, true);
    if (!a.symmetric)
      copy_8(to + stage.zeros_at + at * ZERO_BYTES + lane * 8, from.zeros + int64_t(from.walk.group) * ZERO_BYTES);
  }
  from.codes += block_bytes(BITS);
  from.x_left -= BLOCK;
  advance(a, from.walk);
}

template <class T, int BITS, int TW>
__global__ void __launch_bounds__(ROW_WARPS* TW* LANES) tensor_kernel(Linear a) {
  constexpr int NT = WARP_TILES;
  CC_SHARED(shared);
  const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, g = lane / 4, t = lane % 4;
  const int row_warp = warp / TW, token_warp = warp % TW;
  const int first_row_block = blockIdx.x * ROW_WARPS, split = blockIdx.y, first_token = blockIdx.z * TW * WARP_TOKENS;
  const int row_block = min(first_row_block + row_warp, a.row_blocks - 1);  // the last warps may do the last rows again
  const Range run = share(a.input_blocks, split, a.splits);
  const Stage stage = stage_of(BITS, ROW_WARPS, TW * WARP_TOKENS, a.groups_per_block, a.symmetric);
  uint8_t* const ring_end = shared + STAGES<BITS> * stage.bytes;
  const uint64_t policy = read_once();
  TensorSource from = tensor_source<BITS, TW>(a, stage, row_block, first_token, run.begin);
  const Places places = places_of(stage, row_warp, BITS, token_warp * WARP_TOKENS, a.groups_per_block);
  Walk walk = from.walk;

  Sums<NT> s;
  clear(s);
  uint8_t *to = shared, *here = shared;  // the stages to be filled and used next
#pragma unroll
  for (int i = 0; i < STAGES<BITS> - 1; ++i) {
    if (run.begin + i < run.end) issue<BITS, TW>(a, stage, from, to, policy);
    copies_commit();
    to += stage.bytes;
  }
  for (int k = run.begin; k < run.end; ++k) {
    copies_wait<STAGES<BITS> - 2>();  // block k has come for this thread,
    block_barrier();                  // for all threads; and all are done with block k - 1, whose place is taken next
    if (k + STAGES<BITS> - 1 < run.end) issue<BITS, TW>(a, stage, from, to, policy);
    copies_commit();
    to = to + stage.bytes == ring_end ? shared : to + stage.bytes;
    const bool ends = a.groups_per_block == 1 && (k + 1 == run.end || walk.rest + 1 == a.blocks_per_group);
    block_product<T, BITS, NT>(s, a, here, places, ends);
    here = here + stage.bytes == ring_end ? shared : here + stage.bytes;
    advance(a, walk);
  }
  if (a.groups_per_block == 0)
    close_group<BITS>(s, a.scales + int64_t(row_block) * SCALE_BYTES + g * 16,
                      a.zeros + int64_t(row_block) * ZERO_BYTES + g * 8, a.symmetric, a.scales_bf16);
  const int warp_token = first_token + token_warp * WARP_TOKENS;
  if (a.left) low_rank<T, NT>(s, a, row_block, warp_token, share(a.rank_blocks, split, a.splits));

  block_barrier();  // the ring is free: each warp turns its sums there, 8 tokens at a time, to write whole runs of rows
  float* turned = reinterpret_cast<float*>(shared) + warp * TOKENS * OUT_STRIDE;
#pragma unroll
  for (int n = 0; n < NT; ++n) {
    warp_barrier();
#pragma unroll
    for (int m = 0; m < TILES; ++m)
#pragma unroll
      for (int c = 0; c < 4; ++c) turned[(2 * t + c % 2) * OUT_STRIDE + row_in_block(m, c / 2, g)] = s.total[m][n][c];
    warp_barrier();
    for (int i = lane; i < TOKENS * BLOCK; i += LANES) {
      const int token = warp_token + n * TOKENS + i / BLOCK;
      if (token < a.tokens && first_row_block + row_warp < a.row_blocks)
        store<T>(a, token, row_block * BLOCK + i % BLOCK, split, turned[i / BLOCK * OUT_STRIDE + i % BLOCK]);
    }
  }
}

template <class T, int BITS, int TW>
static int tensor(const Linear& a, void* stream) {
  static uint64_t allowed = 0;
  const int largest = STAGES<BITS> * stage_of(BITS, ROW_WARPS, TW * WARP_TOKENS, 2, false).bytes;
  const int ring = STAGES<BITS> * stage_of(BITS, ROW_WARPS, TW * WARP_TOKENS, a.groups_per_block, a.symmetric).bytes;
  static_assert(ROW_WARPS * TW * TOKENS * OUT_STRIDE * 4 <= STAGES<BITS> * (TW * WARP_TOKENS * BLOCK * 2 + 4 * 1024), "ring");
  if (int error = allow_shared(tensor_kernel<T, BITS, TW>, largest, &allowed)) return error;
  const dim3 grid(unsigned(ceil_div(a.row_blocks, ROW_WARPS)), unsigned(a.splits),
                  unsigned(ceil_div(a.tokens, TW * WARP_TOKENS)));
  CC_LAUNCH((tensor_kernel<T, BITS, TW>), grid, dim3(ROW_WARPS * TW * LANES), ring, static_cast<cudaStream_t>(stream), a);
  add_splits<T>(a, stream);
  return int(cudaGetLastError());
}

template <class T, int TW>
static int tensor_bits(int bits, const Linear& a, void* stream) {
#ifdef CC_ONLY_BITS  // a quick build, to look at the code of one width
  return bits == CC_ONLY_BITS ? tensor<T, CC_ONLY_BITS, TW>(a, stream) : CC_ERR_BITS;
#else
  switch (bits) {
    case 2: return tensor<T, 2, TW>(a, stream);
    case 3: return tensor<T, 3, TW>(a, stream);
    case 4: return tensor<T, 4, TW>(a, stream);
    default: return tensor<T, 8, TW>(a, stream);
  }
#endif
}

extern "C" int cc_linear_tensor(const cc_weight* weight, const void* buffer, int64_t buffer_bytes,
                                const cc_operands* operands, void* stream) {
  Linear a;
  if (int error = linear_of(weight, buffer, buffer_bytes, operands, &a)) return error;
  if (a.tokens > 65535) return CC_ERR_TOKENS;  // the third axis of a grid, and the second of add_splits
  if (a.tokens == 0) return CC_OK;
  const bool narrow = a.tokens <= WARP_TOKENS;
  if (operands->dtype == CC_F16)
    return narrow ? tensor_bits<F16, 1>(weight->bits, a, stream) : tensor_bits<F16, 2>(weight->bits, a, stream);
  return narrow ? tensor_bits<BF16, 1>(weight->bits, a, stream) : tensor_bits<BF16, 2>(weight->bits, a, stream);
}
