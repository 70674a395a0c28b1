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

template <class T, int BITS, int TW>
CC_DEVICE void tensor_issue(const Linear& a, const Stage& stage, uint8_t* to, int first_row_block, int first_token, int k,
                            uint64_t policy) {
  constexpr int THREADS = ROW_WARPS * TW * LANES, PER_ROW = BITS * LANES;
  const int thread = threadIdx.x;
#pragma unroll
  for (int i = thread; i < ROW_WARPS * PER_ROW; i += THREADS) {
    const int row_block = min(first_row_block + i / PER_ROW, a.row_blocks - 1);
    copy_once(to + i * VECTOR_BYTES,
              a.codes + (int64_t(row_block) * a.input_blocks + k) * block_bytes(BITS) + i % PER_ROW * VECTOR_BYTES, policy);
  }
#pragma unroll
  for (int i = thread; i < TW * WARP_TOKENS * 8; i += THREADS) {
    const int token = i / 8, chunk = i % 8, column = k * BLOCK + chunk * 8;
    const bool real = first_token + token < a.tokens && column < a.x_columns;
    copy_or_zero(to + stage.x_at + x_chunk(token, chunk), real ? a.x + (first_token + token) * a.x_stride + column : a.x,
                 real);
  }
  const int per_row = 8 * a.groups_per_block;
  if (thread < ROW_WARPS * per_row) {
    const int row_block = min(first_row_block + thread / per_row, a.row_blocks - 1), i = thread % per_row;
    const int64_t at = int64_t(row_block) * a.n_groups + (a.groups_per_block == 2 ? 2 * k : k / a.blocks_per_group);
    copy_or_zero(to + stage.scales_at + thread * 16, a.scales + at * SCALE_BYTES + i * 16, true);
    if (a.zeros) copy_8(to + stage.zeros_at + thread * 8, a.zeros + at * ZERO_BYTES + i * 8);
  }
}

template <class T, int BITS, int TW>
__global__ void __launch_bounds__(ROW_WARPS* TW* LANES) tensor_kernel(Linear a) {
  constexpr int NT = WARP_TILES;
  CC_SHARED(shared);
  const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, g = lane / 4, t = lane % 4;
  const int row_warp = warp / TW, token_warp = warp % TW;
  const int first_row_block = blockIdx.x * ROW_WARPS, split = blockIdx.y, first_token = blockIdx.z * TW * WARP_TOKENS;
  const int row_block = min(first_row_block + row_warp, a.row_blocks - 1);
  const Range run = share(a.input_blocks, split, a.splits);
  const Stage stage = stage_of(BITS, ROW_WARPS, TW * WARP_TOKENS, a.groups_per_block, a.zeros == nullptr);
  const uint64_t policy = read_once();

  Sums<NT> s;
  clear(s);
#pragma unroll
  for (int i = 0; i < STAGES<BITS> - 1; ++i) {
    if (run.begin + i < run.end)
      tensor_issue<T, BITS, TW>(a, stage, shared + i * stage.bytes, first_row_block, first_token, run.begin + i, policy);
    copies_commit();
  }
  for (int k = run.begin; k < run.end; ++k) {
    copies_wait<STAGES<BITS> - 2>();  // block k has come for this thread,
    block_barrier();            // for all threads; and all are done with block k - 1, whose place is taken next
    const int next = k + STAGES<BITS> - 1;
    if (next < run.end)
      tensor_issue<T, BITS, TW>(a, stage, shared + (next - run.begin) % STAGES<BITS> * stage.bytes, first_row_block, first_token,
                                next, policy);
    copies_commit();
    const uint8_t* here = shared + (k - run.begin) % STAGES<BITS> * stage.bytes;
    const int groups = row_warp * a.groups_per_block;
    const bool ends = a.groups_per_block == 1 && (k + 1 == run.end || (k + 1) % a.blocks_per_group == 0);
    block_product<T, BITS, NT>(s, a, here + row_warp * block_bytes(BITS) + lane * VECTOR_BYTES,
                               here + stage.x_at + (token_warp * WARP_TOKENS + g) * BLOCK * 2,
                               here + stage.scales_at + groups * SCALE_BYTES + g * 16,
                               a.zeros ? here + stage.zeros_at + groups * ZERO_BYTES + g * 8 : nullptr, ends);
  }
  if (a.groups_per_block == 0) {
    const int64_t at = row_block;
    close_group<BITS>(s, a.scales + at * SCALE_BYTES + g * 16, a.zeros ? a.zeros + at * ZERO_BYTES + g * 8 : nullptr,
                      a.scales_bf16);
  }
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
  const int ring = STAGES<BITS> * stage_of(BITS, ROW_WARPS, TW * WARP_TOKENS, a.groups_per_block, a.zeros == nullptr).bytes;
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
  switch (bits) {
    case 2: return tensor<T, 2, TW>(a, stream);
    case 3: return tensor<T, 3, TW>(a, stream);
    case 4: return tensor<T, 4, TW>(a, stream);
    default: return tensor<T, 8, TW>(a, stream);
  }
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
