// out = x W^T + hidden L^T + bias for 1 to 16 tokens.
//
// x [tokens][in], W in packed codes (layout.h), out [tokens][out], 16-bit floats; float32 sums. Bound by bytes: the codes.
//
// A warp owns 64 rows and a run of input blocks. Each of its lanes copies 16 bytes at a time of codes, x and scales into a
// ring of STAGES blocks of its warp's own; no barrier of the whole thread block stands in the loop. The warps of a thread
// block, and then the thread blocks of a row block (`splits`), share the inputs; their sums are added in order.
// Speed against the bytes: not measured, no GPU yet.

#include "linear.h"

constexpr int DECODE_WARPS = 4;  // with 4 stages of 4 bits 48 KB: 2 thread blocks in the 100 KB of sm_86, 4 in an H100's 228
constexpr int SUM_STRIDE = BLOCK + 4;  // floats between tokens: a warp's stores fall into 32 different banks

template <class T, int BITS, int NT>
CC_DEVICE void decode_issue(const Linear& a, const Stage& stage, uint8_t* to, int row_block, int k, uint64_t policy) {
  const int lane = threadIdx.x % LANES, g = lane / 4, t = lane % 4;
  const uint8_t* codes = a.codes + (int64_t(row_block) * a.input_blocks + k) * block_bytes(BITS) + lane * VECTOR_BYTES;
#pragma unroll
  for (int j = 0; j < BITS; ++j)
    copy_once(to + (j * LANES + lane) * VECTOR_BYTES, codes + j * LANES * VECTOR_BYTES, policy);
#pragma unroll
  for (int n = 0; n < NT; ++n)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int token = n * TOKENS + g, column = k * BLOCK + 32 * h + 8 * t;
      const bool real = token < a.tokens && column < a.x_columns;
      copy_or_zero(to + stage.x_at + x_chunk(token, 4 * h + t), real ? a.x + token * a.x_stride + column : a.x, real);
    }
  if (lane < 8 * a.groups_per_block) {
    const int64_t at = int64_t(row_block) * a.n_groups + (a.groups_per_block == 2 ? 2 * k : k / a.blocks_per_group);
    copy_or_zero(to + stage.scales_at + lane * 16, a.scales + at * SCALE_BYTES + lane * 16, true);
    if (a.zeros) copy_8(to + stage.zeros_at + lane * 8, a.zeros + at * ZERO_BYTES + lane * 8);
  }
}

template <class T, int BITS, int NT>
__global__ void __launch_bounds__(DECODE_WARPS* LANES) decode_kernel(Linear a) {
  CC_SHARED(shared);
  const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, g = lane / 4, t = lane % 4;
  const int row_block = blockIdx.x, split = blockIdx.y;
  const int part = split * DECODE_WARPS + warp, parts = a.splits * DECODE_WARPS;
  const Range run = share(a.input_blocks, part, parts);
  const Stage stage = stage_of(BITS, 1, NT * TOKENS, a.groups_per_block, a.zeros == nullptr);
  uint8_t* ring = shared + warp * STAGES<BITS> * stage.bytes;
  const uint64_t policy = read_once();

  Sums<NT> s;
  clear(s);
#pragma unroll
  for (int i = 0; i < STAGES<BITS> - 1; ++i) {
    if (run.begin + i < run.end)
      decode_issue<T, BITS, NT>(a, stage, ring + i * stage.bytes, row_block, run.begin + i, policy);
    copies_commit();
  }
  for (int k = run.begin; k < run.end; ++k) {
    copies_wait<STAGES<BITS> - 2>();  // block k has come for this lane,
    warp_barrier();             // for all lanes; and all are done with block k - 1, whose place is taken next
    const int next = k + STAGES<BITS> - 1;
    if (next < run.end)
      decode_issue<T, BITS, NT>(a, stage, ring + (next - run.begin) % STAGES<BITS> * stage.bytes, row_block, next, policy);
    copies_commit();
    const uint8_t* here = ring + (k - run.begin) % STAGES<BITS> * stage.bytes;
    const bool ends = a.groups_per_block == 1 && (k + 1 == run.end || (k + 1) % a.blocks_per_group == 0);
    block_product<T, BITS, NT>(s, a, here + lane * VECTOR_BYTES, here + stage.x_at + g * BLOCK * 2,
                               here + stage.scales_at + g * 16, a.zeros ? here + stage.zeros_at + g * 8 : nullptr, ends);
  }
  if (a.groups_per_block == 0) {
    const int64_t at = row_block;
    close_group<BITS>(s, a.scales + at * SCALE_BYTES + g * 16, a.zeros ? a.zeros + at * ZERO_BYTES + g * 8 : nullptr,
                      a.scales_bf16);
  }
  if (a.left) low_rank<T, NT>(s, a, row_block, 0, share(a.rank_blocks, part, parts));

  block_barrier();  // the rings are free: the sums of all warps go there
  float* sums = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int m = 0; m < TILES; ++m)
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int c = 0; c < 4; ++c)
        sums[(warp * NT * TOKENS + n * TOKENS + 2 * t + c % 2) * SUM_STRIDE + row_in_block(m, c / 2, g)] = s.total[m][n][c];
  block_barrier();
  for (int i = threadIdx.x; i < a.tokens * BLOCK; i += DECODE_WARPS * LANES) {
    const int token = i / BLOCK, row = i % BLOCK;
    float value = 0.0f;
#pragma unroll
    for (int w = 0; w < DECODE_WARPS; ++w) value += sums[(w * NT * TOKENS + token) * SUM_STRIDE + row];
    store<T>(a, token, row_block * BLOCK + row, split, value);
  }
}

template <class T, int BITS, int NT>
static int decode(const Linear& a, void* stream) {
  static uint64_t allowed = 0;
  const int largest = DECODE_WARPS * STAGES<BITS> * stage_of(BITS, 1, NT * TOKENS, 2, false).bytes;
  const int sums = DECODE_WARPS * NT * TOKENS * SUM_STRIDE * int(sizeof(float));
  const int ring = DECODE_WARPS * STAGES<BITS> * stage_of(BITS, 1, NT * TOKENS, a.groups_per_block, a.zeros == nullptr).bytes;
  if (int error = allow_shared(decode_kernel<T, BITS, NT>, largest > sums ? largest : sums, &allowed)) return error;
  CC_LAUNCH((decode_kernel<T, BITS, NT>), dim3(unsigned(a.row_blocks), unsigned(a.splits)), dim3(DECODE_WARPS * LANES),
            ring > sums ? ring : sums, static_cast<cudaStream_t>(stream), a);
  add_splits<T>(a, stream);
  return int(cudaGetLastError());
}

template <class T, int NT>
static int decode_bits(int bits, const Linear& a, void* stream) {
  switch (bits) {
    case 2: return decode<T, 2, NT>(a, stream);
    case 3: return decode<T, 3, NT>(a, stream);
    case 4: return decode<T, 4, NT>(a, stream);
    default: return decode<T, 8, NT>(a, stream);
  }
}

extern "C" int cc_linear_decode(const cc_weight* weight, const void* buffer, int64_t buffer_bytes,
                                const cc_operands* operands, void* stream) {
  Linear a;
  if (int error = linear_of(weight, buffer, buffer_bytes, operands, &a)) return error;
  if (a.tokens > 2 * TOKENS) return CC_ERR_TOKENS;
  if (a.tokens == 0) return CC_OK;
  if (operands->dtype == CC_F16)
    return a.tokens <= TOKENS ? decode_bits<F16, 1>(weight->bits, a, stream) : decode_bits<F16, 2>(weight->bits, a, stream);
  return a.tokens <= TOKENS ? decode_bits<BF16, 1>(weight->bits, a, stream) : decode_bits<BF16, 2>(weight->bits, a, stream);
}
