// out[row, input] = (code - zero) * scale, [out][in] in 16-bit floats: for the library's matrix product of many tokens.
//
// Rounded to the dtype of the scale, then to that of out: bit for bit the reference. A warp takes a block of 64 x 64; a
// lane's codes of one row and half a block are 8 neighbours: one store of 16 bytes. Bound by bytes: 2 per weight written.
// Speed against the bytes: not measured, no GPU yet.

#include "linear.h"

constexpr int DEQUANTIZE_WARPS = 4;

struct Dequantize {
  const uint8_t *codes, *scales, *zeros;
  uint16_t* out;
  int64_t out_stride;
  int32_t out_features, in_features, input_blocks, n_groups, groups_per_block, blocks_per_group;
  bool scales_bf16;
};

template <class T>
CC_DEVICE uint16_t rounded(float code, float scale, bool bf16) {
  const float value = code * scale;  // exact in float32: at most 9 + 11 significant bits
  const float once = bf16 ? float_of_half<BF16>(half_of_float<BF16>(value)) : float_of_half<F16>(half_of_float<F16>(value));
  return half_of_float<T>(once);
}

template <class T, int BITS, int M>
CC_DEVICE void write_tile(const Dequantize& a, const uint32_t* words, const float* scale, const uint2& zeros, int row_block,
                          int first_input) {
  const int lane = threadIdx.x % LANES, g = lane / 4;
  uint32_t fragments[2][4];
  fragment<F16, BITS, M>(words, fragments[0]);
  fragment<F16, BITS, M>(words + BITS, fragments[1]);
#pragma unroll
  for (int hi = 0; hi < 2; ++hi) {
    const int64_t row = int64_t(row_block) * BLOCK + row_in_block(M, hi, g);
    if (row >= a.out_features) continue;
    const float zero = a.zeros ? zero_of<BITS>(zeros, 2 * M + hi) : 0.0f;
    uint16_t values[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {  // i = 4 s + 2 b + e
      const uint32_t both = fragments[i / 4][2 * (i / 2 % 2) + hi];
      values[i] = rounded<T>(float_of_half<F16>(uint16_t(both >> 16 * (i % 2))) - zero, scale[2 * M + hi], a.scales_bf16);
    }
    uint16_t* out = a.out + row * a.out_stride + first_input;
    if (first_input + 8 <= a.in_features) {
      uint4 v;
      v.x = values[0] | uint32_t(values[1]) << 16, v.y = values[2] | uint32_t(values[3]) << 16;
      v.z = values[4] | uint32_t(values[5]) << 16, v.w = values[6] | uint32_t(values[7]) << 16;
      *reinterpret_cast<uint4*>(out) = v;
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (first_input + i < a.in_features) out[i] = values[i];
    }
  }
}

template <class T, int BITS>
__global__ void __launch_bounds__(DEQUANTIZE_WARPS* LANES) dequantize_kernel(Dequantize a) {
  const int lane = threadIdx.x % LANES, g = lane / 4, t = lane % 4;
  const int row_block = blockIdx.y, k = blockIdx.x * DEQUANTIZE_WARPS + threadIdx.x / LANES;
  if (k >= a.input_blocks) return;
  const uint8_t* codes = a.codes + (int64_t(row_block) * a.input_blocks + k) * block_bytes(BITS) + lane * VECTOR_BYTES;
  uint32_t words[4 * BITS];
#pragma unroll
  for (int j = 0; j < BITS; ++j) {
    const uint4 v = load_constant(codes + j * LANES * VECTOR_BYTES);
    words[4 * j] = v.x, words[4 * j + 1] = v.y, words[4 * j + 2] = v.z, words[4 * j + 3] = v.w;
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int group = a.groups_per_block == 2 ? 2 * k + h : a.groups_per_block == 1 ? k / a.blocks_per_group : 0;
    const int64_t at = int64_t(row_block) * a.n_groups + group;
    float scale[8];
    scales_of(load_16(a.scales + at * SCALE_BYTES + g * 16), a.scales_bf16, scale);
    const uint2 zeros = a.zeros ? load_8(a.zeros + at * ZERO_BYTES + g * 8) : make_uint2(0, 0);
    const uint32_t* half = words + 2 * h * BITS;
    const int first = k * BLOCK + 32 * h + 8 * t;
    write_tile<T, BITS, 0>(a, half, scale, zeros, row_block, first);
    write_tile<T, BITS, 1>(a, half, scale, zeros, row_block, first);
    write_tile<T, BITS, 2>(a, half, scale, zeros, row_block, first);
    write_tile<T, BITS, 3>(a, half, scale, zeros, row_block, first);
  }
}

template <class T>
static void launch(int bits, const Dequantize& a, int row_blocks, void* stream) {
  const dim3 grid(unsigned(ceil_div(a.input_blocks, DEQUANTIZE_WARPS)), unsigned(row_blocks));
  const dim3 block(DEQUANTIZE_WARPS * LANES);
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  switch (bits) {
    case 2: CC_LAUNCH((dequantize_kernel<T, 2>), grid, block, 0, on, a); break;
    case 3: CC_LAUNCH((dequantize_kernel<T, 3>), grid, block, 0, on, a); break;
    case 4: CC_LAUNCH((dequantize_kernel<T, 4>), grid, block, 0, on, a); break;
    default: CC_LAUNCH((dequantize_kernel<T, 8>), grid, block, 0, on, a);
  }
}

extern "C" int cc_dequantize(const cc_weight* weight, const void* buffer, int64_t buffer_bytes, void* out,
                             int64_t out_stride, int32_t dtype, void* stream) {
  Layout l;
  if (int error = layout_of(weight, &l)) return error;
  if (!buffer || !out) return CC_ERR_NULL;
  if (buffer_bytes != l.bytes) return CC_ERR_BYTES;
  if (dtype != CC_F16 && dtype != CC_BF16) return CC_ERR_DTYPE;
  if (reinterpret_cast<uintptr_t>(buffer) % 16 || reinterpret_cast<uintptr_t>(out) % 16) return CC_ERR_ALIGNMENT;
  if (out_stride < weight->in_features || out_stride % 8) return CC_ERR_STRIDE;
  if (l.row_blocks > 65535) return CC_ERR_SHAPE;
  const uint8_t* base = static_cast<const uint8_t*>(buffer);
  const Dequantize a = {base, base + l.scales_at, weight->symmetric ? nullptr : base + l.zeros_at,
                        static_cast<uint16_t*>(out), out_stride, int32_t(weight->out_features),
                        int32_t(weight->in_features), l.input_blocks, l.n_groups, l.groups_per_block, l.blocks_per_group,
                        weight->scale_dtype == CC_BF16};
  dtype == CC_F16 ? launch<F16>(weight->bits, a, l.row_blocks, stream) : launch<BF16>(weight->bits, a, l.row_blocks, stream);
  return int(cudaGetLastError());
}
