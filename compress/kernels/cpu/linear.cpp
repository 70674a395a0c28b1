// ck_linear: checks, then slabs of tokens; in each slab activations are prepared, then threads share the tiles of rows.

#include "linear.h"

#include "isa.h"

namespace {

const ck::LinearKernels* kernels_of(int isa, bool halves) {  // halves: bfloat16 that is kept
#ifdef CK_X86
  switch (isa) {
    case ck::AVX2: return ck::linear_avx2();
    case ck::AVX2_VNNI: return ck::has_avx_vnni() ? ck::linear_avx2vnni() : ck::linear_avx2vnni_vl();
    case ck::AVX512: return ck::linear_avx512();
    case ck::AVX512_BF16: return halves ? ck::linear_avx512bf16() : ck::linear_avx512();
    default: break;
  }
#endif
  (void)isa, (void)halves;
  return ck::linear_portable();
}

// Offsets in the workspace: activations, then a scale and a sum per token and block.
struct Workspace { int64_t scales_at, sums_at, bytes; };

Workspace workspace_of(const Layout& l, int64_t tokens, int32_t activations) {
  int64_t slab = min64(tokens, ck::SLAB), padded = l.n_blocks * l.padded_block;
  int64_t per_input = activations == CK_A8 ? 1 : ck::A16_BYTES;
  int64_t scales_at = round_up(slab * padded * per_input, 64);
  int64_t sums_at = scales_at + round_up(slab * l.n_blocks * 4, 64);
  return {scales_at, sums_at, sums_at + round_up(slab * l.n_blocks * 4, 64)};
}

}  // namespace

extern "C" int64_t ck_linear_workspace(const ck_weight* weight, int64_t tokens, int32_t activations) {
  Layout l;
  int status = layout_of(weight, &l);
  if (status) return status;
  if (tokens < 0 || tokens > MAX_FEATURES) return CK_ERR_SHAPE;
  if (activations != CK_A8 && activations != CK_A16) return CK_ERR_MODE;
  return workspace_of(l, tokens, activations).bytes;
}

extern "C" int ck_linear(const ck_weight* weight, const void* buffer, int64_t buffer_bytes, const void* x, int32_t x_dtype,
                         int64_t tokens, int64_t x_stride, const void* bias, int32_t bias_dtype, void* out,
                         int64_t out_stride, int32_t activations, void* workspace, int64_t workspace_bytes,
                         int32_t n_threads) {
  LinearCall call;
  int status = layout_of(weight, &call.layout);
  if (status) return status;
  const Layout& l = call.layout;
  if (tokens < 0 || tokens > MAX_FEATURES) return CK_ERR_SHAPE;
  if (!dtype_known(x_dtype) || (bias && !dtype_known(bias_dtype))) return CK_ERR_DTYPE;
  if (activations != CK_A8 && activations != CK_A16) return CK_ERR_MODE;
  if (buffer_bytes != l.bytes) return CK_ERR_BYTES;
  if (n_threads < 1) return CK_ERR_THREADS;
  if (tokens == 0) return CK_OK;
  if (!buffer || !x || !out || !workspace) return CK_ERR_NULL;
  if (!aligned(buffer, 64) || !aligned(workspace, 64)) return CK_ERR_ALIGNMENT;
  if (tokens > 1 && (x_stride < weight->in_features || out_stride < weight->out_features)) return CK_ERR_STRIDE;
  Workspace parts = workspace_of(l, tokens, activations);
  if (workspace_bytes < parts.bytes) return CK_ERR_BYTES;

  const uint8_t* data = static_cast<const uint8_t*>(buffer);
  char* space = static_cast<char*>(workspace);
  call.codes = data;
  call.scales = data + l.scales_at;
  call.zeros = weight->symmetric ? nullptr : data + l.zeros_at;
  call.scale_dtype = weight->scale_dtype;
  call.zero_point = weight->zero_point;
  call.out_features = weight->out_features;
  call.x = x;
  call.out = out;
  call.bias = bias;
  call.x_dtype = x_dtype;
  call.bias_dtype = bias_dtype;
  call.x_stride = x_stride;
  call.out_stride = out_stride;
  call.padded_inputs = l.n_blocks * l.padded_block;
  call.q = reinterpret_cast<int8_t*>(space);
  call.a16 = space;
  call.q_scale = reinterpret_cast<float*>(space + parts.scales_at);
  call.a16_sum = call.q_scale;
  call.q_sum = reinterpret_cast<int32_t*>(space + parts.sums_at);

  const bool a8 = activations == CK_A8;
  const ck::LinearKernels* kernels = kernels_of(ck_isa_current(), !a8 && x_dtype == CK_BF16);
  const ck::LinearWays& ways = a8 ? kernels->a8 : kernels->a16;
  const ck::LinearWay way = tokens <= ways.direct_tokens ? ways.direct : ways.unpacked;
  const int64_t n_slabs = ceil_div(tokens, way.slab), n_units = ceil_div(l.n_tiles, way.unit);
  parallel(int(min64(n_threads, n_units)), [&](int thread, int n) {
    LinearCall mine = call;
    const Range units = share(n_units, thread, n);
    for (int64_t slab = 0; slab < n_slabs; slab++) {
      const Range these = {tokens * slab / n_slabs, tokens * (slab + 1) / n_slabs};
      mine.first_token = these.begin;
      mine.n_tokens = these.end - these.begin;
      mine.n_groups = ceil_div(mine.n_tokens, way.group);
      if (slab > 0) { CK_BARRIER }  // nobody reads the activations of the slab before
      const Range pairs = share(mine.n_groups * mine.layout.n_blocks, thread, n);
      way.prepare(mine, pairs.begin, pairs.end);
      CK_BARRIER
      way.run(mine, units.begin * way.unit, min64(units.end * way.unit, mine.layout.n_tiles));
    }
  });
  return CK_OK;
}
