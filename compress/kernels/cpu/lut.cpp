// ck_lut_linear, ck_lut_dense: checks, then threads share the rows.

#include "lut.h"

#include "isa.h"
#include "layout.h"

namespace {

const ck::LutKernels* kernels_of(int isa) {
#ifdef CK_X86
  if (isa >= ck::AVX512) return ck::lut_avx512();
  if (isa >= ck::AVX2) return ck::lut_avx2();
#endif
  (void)isa;
  return ck::lut_portable();
}

constexpr int64_t LEAST = 32768;  // weights that a thread should have

int checked(const ck_lut* lut, ck::LutCall* call) {
  if (!lut) return CK_ERR_NULL;
  if (lut->bits < 2 || lut->bits > 4) return CK_ERR_BITS;
  if (!dtype_known(lut->dtype)) return CK_ERR_DTYPE;
  const int64_t out = lut->out_features, in = lut->in_features;
  if (out < 1 || in < 1 || out > MAX_FEATURES || in > MAX_FEATURES || out > MAX_BYTES / in) return CK_ERR_SHAPE;
  if (!lut->codes || !lut->table) return CK_ERR_NULL;
  if (lut->row_bytes < ceil_div(in * lut->bits, 8)) return CK_ERR_STRIDE;
  const int64_t size = lut->group_size;
  if (lut->scale && size != in && (size < 16 || size % 16 || in % size)) return CK_ERR_GROUP;
  call->codes = static_cast<const uint8_t*>(lut->codes);
  call->row_bytes = lut->row_bytes;
  call->table = lut->table;
  call->scale = lut->scale;
  call->dtype = lut->dtype;
  call->bits = lut->bits;
  call->padded = round_up(in, 16);
  call->group_size = lut->scale && size != in ? size : call->padded;
  call->n_groups = lut->scale ? in / size : 1;
  call->out_features = out;
  call->in_features = in;
  return CK_OK;
}

}  // namespace

extern "C" int64_t ck_lut_workspace(int64_t in_features, int64_t tokens) {
  if (in_features < 1 || in_features > MAX_FEATURES || tokens < 0 || tokens > MAX_FEATURES) return CK_ERR_SHAPE;
  return round_up(in_features, 16) * tokens * int64_t(sizeof(float));
}

extern "C" int ck_lut_linear(const ck_lut* lut, const void* x, int32_t x_dtype, int64_t tokens, int64_t x_stride,
                             const void* bias, int32_t bias_dtype, void* out, int32_t out_dtype, int64_t out_stride,
                             void* workspace, int64_t workspace_bytes, int32_t n_threads) {
  ck::LutCall call;
  int status = checked(lut, &call);
  if (status) return status;
  if (tokens < 0 || tokens > MAX_FEATURES) return CK_ERR_SHAPE;
  if (!dtype_known(x_dtype) || !dtype_known(out_dtype) || (bias && !dtype_known(bias_dtype))) return CK_ERR_DTYPE;
  if (n_threads < 1) return CK_ERR_THREADS;
  if (tokens == 0) return CK_OK;
  if (!x || !out || !workspace) return CK_ERR_NULL;
  if (tokens > 1 && (x_stride < call.in_features || out_stride < call.out_features)) return CK_ERR_STRIDE;
  if (!aligned(workspace, 64)) return CK_ERR_ALIGNMENT;
  if (workspace_bytes < ck_lut_workspace(call.in_features, tokens)) return CK_ERR_BYTES;
  call.out_dtype = out_dtype;
  call.out_stride = out_stride;
  call.bias = bias;
  call.bias_dtype = bias_dtype;
  float* space = static_cast<float*>(workspace);
  const ck::LutKernels* kernels = kernels_of(ck_isa_current());
  const int64_t work = call.out_features * call.in_features / LEAST;
  const int threads = int(max64(1, min64(min64(n_threads, call.out_features), work)));
  parallel(threads, [&](int thread, int n) {
    const Range mine = share(tokens, thread, n);
    for (int64_t t = mine.begin; t < mine.end; t++)
      kernels->prepare(at(x, x_dtype, t * x_stride), x_dtype, call.in_features, call.padded, space + t * call.padded);
    CK_BARRIER
    const Range part = share(call.out_features, thread, n);
    for (int64_t first = 0; first < tokens; first += ck::LUT_TOKENS) {
      ck::LutCall some = call;
      some.x = space + first * call.padded;
      some.tokens = int(min64(ck::LUT_TOKENS, tokens - first));
      some.out = at(out, out_dtype, first * out_stride);
      kernels->run[call.bits - 2](some, part.begin, part.end);
    }
  });
  return CK_OK;
}

extern "C" int ck_lut_dense(const ck_lut* lut, void* out, int32_t out_dtype, int64_t out_stride, int32_t n_threads) {
  ck::LutCall call;
  int status = checked(lut, &call);
  if (status) return status;
  if (!dtype_known(out_dtype)) return CK_ERR_DTYPE;
  if (n_threads < 1) return CK_ERR_THREADS;
  if (!out) return CK_ERR_NULL;
  if (out_stride < call.in_features) return CK_ERR_STRIDE;
  call.out = out;
  call.out_dtype = out_dtype;
  call.out_stride = out_stride;
  const ck::LutKernels* kernels = kernels_of(ck_isa_current());
  parallel(int(min64(n_threads, call.out_features)), [&](int thread, int n) {
    const Range part = share(call.out_features, thread, n);
    kernels->write[call.bits - 2](call, part.begin, part.end);
  });
  return CK_OK;
}
