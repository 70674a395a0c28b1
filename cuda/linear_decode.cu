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

// What a lane copies, block after block.
template <int BITS, int NT>
struct DecodeSource {
  const uint8_t *codes, *scales, *zeros;  // of the row block; codes of the next block at this lane
  const uint16_t* x[NT];                  // of the next block: this lane's 8 inputs of each token
  int x_left;                             // columns of x from there on
  bool token[NT];                         // there is such a token
  int codes_to, x_to[2], lane_scale;      // places in a stage
  Walk walk;
};

template <int BITS, int NT>
CC_DEVICE DecodeSource<BITS, NT> decode_source(const Linear& a, const Stage& stage, int row_block, int k) {
  const int lane = threadIdx.x % LANES, g = lane / 4, t = lane % 4;
  DecodeSource<BITS, NT> from;
  from.codes = a.codes + (int64_t(row_block) * a.input_blocks + k) * block_bytes(BITS) + lane * VECTOR_BYTES;
  from.scales = a.scales + int64_t(row_block) * a.n_groups * SCALE_BYTES + lane * 16;
  from.zeros = a.zeros + int64_t(row_block) * a.n_groups * ZERO_BYTES + lane * 8;
#pragma unroll
  for (int n = 0; n < NT; ++n) {
    const int token = n * TOKENS + g;
    from.token[n] = token < a.tokens;
    from.x[n] = a.x + (from.token[n] ? token : 0) * a.x_stride + k * BLOCK + 8 * t;
  }
  from.x_left = a.x_columns - k * BLOCK - 8 * t;
  from.codes_to = keep(lane * VECTOR_BYTES);
  from.x_to[0] = keep(stage.x_at + x_chunk(g, t));
  from.x_to[1] = keep(stage.x_at + x_chunk(g, 4 + t));
  from.lane_scale = keep(lane);
  from.walk = walk_from(a, k);
  return from;
}

// The next block is on its way into a stage at `to`.
template <int BITS, int NT>
CC_DEVICE void issue(const Linear& a, const Stage& stage, DecodeSource<BITS, NT>& from, uint8_t* to, uint64_t policy) {
#pragma unroll
  for (int j = 0; j < BITS; ++j)
    copy_once(to + from.codes_to + j * LANES * VECTOR_BYTES, from.codes + j * LANES * VECTOR_BYTES, policy);
#pragma unroll
  for (int n = 0; n < NT; ++n)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const bool real = from.token[n] && 32 * h < from.x_left;
      copy_or_zero(to + from.x_to[h] + n * X_BYTES, real ? from.x[n] + 32 * h : a.x, real);
    }
  if (from.lane_scale < 8 * a.groups_per_block) {
    copy_or_zero(to + stage.scales_at + from.lane_scale * 16, from.scales + int64_t(from.walk.group) * SCALE_BYTES, true);
    if (!a.symmetric) copy_8(to + stage.zeros_at + from.lane_scale * 8, from.zeros + int64_t(from.walk.group) * ZERO_BYTES);
  }
  from.codes += block_bytes(BITS);
#pragma unroll
  for (int n = 0; n < NT; ++n) from.x[n] += BLOCK;
  from.x_left -= BLOCK;
  advance(a, from.walk);
}

template <class T, int BITS, int NT>
__global__ void __launch_bounds__(DECODE_WARPS* LANES) decode_kernel(Linear a) {
  CC_SHARED(shared);
  const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, g = lane / 4, t = lane % 4;
  const int row_block = blockIdx.x, split = blockIdx.y;
  const int part = split * DECODE_WARPS + warp, parts = a.splits * DECODE_WARPS;
  const Range run = share(a.input_blocks, part, parts);
  const Stage stage = stage_of(BITS, 1, NT * TOKENS, a.groups_per_block, a.symmetric);
  uint8_t* const ring = shared + warp * STAGES<BITS> * stage.bytes;
  uint8_t* const ring_end = ring + STAGES<BITS> * stage.bytes;
  const uint64_t policy = read_once();
  DecodeSource<BITS, NT> from = decode_source<BITS, NT>(a, stage, row_block, run.begin);
  const Places places = places_of(stage, 0, BITS, 0, a.groups_per_block);
  Walk walk = from.walk;

  Sums<NT> s;
  clear(s);
  uint8_t *to = ring, *here = ring;  // the stages to be filled and used next
#pragma unroll
  for (int i = 0; i < STAGES<BITS> - 1; ++i) {
    if (run.begin + i < run.end) issue(a, stage, from, to, policy);
    copies_commit();
    to += stage.bytes;
  }
  for (int k = run.begin; k < run.end; ++k) {
    copies_wait<STAGES<BITS> - 2>();  // block k has come for this lane,
    warp_barrier();                   // for all lanes; and all are done with block k - 1, whose place is taken next
    if (k + STAGES<BITS> - 1 < run.end) issue(a, stage, from, to, policy);
    copies_commit();
    to = to + stage.bytes == ring_end ? ring : to + stage.bytes;
    const bool ends = a.groups_per_block == 1 && (k + 1 == run.end || walk.rest + 1 == a.blocks_per_group);
    block_product<T, BITS, NT>(s, a, here, places, ends);
    here = here + stage.bytes == ring_end ? ring : here + stage.bytes;
    advance(a, walk);
  }
  if (a.groups_per_block == 0)
    close_group<BITS>(s, a.scales + int64_t(row_block) * SCALE_BYTES + g * 16,
                      a.zeros + int64_t(row_block) * ZERO_BYTES + g * 8, a.symmetric, a.scales_bf16);
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
  const int ring = DECODE_WARPS * STAGES<BITS> * stage_of(BITS, 1, NT * TOKENS, a.groups_per_block, a.symmetric).bytes;
  if (int error = allow_shared(decode_kernel<T, BITS, NT>, largest > sums ? largest : sums, &allowed)) return error;
  CC_LAUNCH((decode_kernel<T, BITS, NT>), dim3(unsigned(a.row_blocks), unsigned(a.splits)), dim3(DECODE_WARPS * LANES),
            ring > sums ? ring : sums, static_cast<cudaStream_t>(stream), a);
  add_splits<T>(a, stream);
  return int(cudaGetLastError());
}

template <class T, int NT>
static int decode_bits(int bits, const Linear& a, void* stream) {
#ifdef CC_ONLY_BITS  // a quick build, to look at the code of one width
  return bits == CC_ONLY_BITS ? decode<T, CC_ONLY_BITS, NT>(a, stream) : CC_ERR_BITS;
#else
  switch (bits) {
    case 2: return decode<T, 2, NT>(a, stream);
    case 3: return decode<T, 3, NT>(a, stream);
    case 4: return decode<T, 4, NT>(a, stream);
    default: return decode<T, 8, NT>(a, stream);
  }
#endif
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
