// ck_rows_linear, ck_rows_dense: checks, then threads share the rows.

#include "rows.h"

#include "isa.h"
#include "layout.h"

namespace {

const ck::RowsKernels* kernels_of(int isa) {
#ifdef CK_X86
  if (isa >= ck::AVX512) return ck::rows_avx512();
  if (isa >= ck::AVX2) return ck::rows_avx2();
#endif
  (void)isa;
  return ck::rows_portable();
}

const ck::RowsHalves* halves_of(int isa) {
#ifdef CK_X86
  if (isa == ck::AVX512_BF16) return ck::rows_avx512bf16();
#endif
  (void)isa;
  return nullptr;
}

constexpr int64_t LEAST = 32768;  // values that a thread should have

int checked(const ck_rows* rows, ck::RowsCall* call) {
  if (!rows) return CK_ERR_NULL;
  if (rows->kind < CK_ROWS_DENSE || rows->kind > CK_ROWS_PAIRS) return CK_ERR_MODE;
  if (!dtype_known(rows->dtype)) return CK_ERR_DTYPE;
  const int64_t out = rows->out_features, in = rows->in_features;
  if (out < 1 || in < 1 || out > MAX_FEATURES || in > MAX_FEATURES || out > MAX_BYTES / in) return CK_ERR_SHAPE;
  if (rows->n_values < 0 || rows->per_row < 0 || rows->per_row > in) return CK_ERR_SHAPE;
  if (rows->kind == CK_ROWS_DENSE && rows->n_values != out * in) return CK_ERR_BYTES;
  if (rows->kind == CK_ROWS_PAIRS && (in % 4 || rows->per_row != in / 2)) return CK_ERR_SHAPE;
  if (rows->per_row && rows->n_values != rows->per_row * out) return CK_ERR_BYTES;
  if (rows->kind != CK_ROWS_DENSE && rows->places_stride < ceil_div(in, 32)) return CK_ERR_STRIDE;
  if (rows->n_values && !rows->values) return CK_ERR_NULL;
  if (rows->kind != CK_ROWS_DENSE && !rows->places) return CK_ERR_NULL;
  call->values = static_cast<const char*>(rows->values);
  call->n_values = rows->n_values;
  call->places = rows->places;
  call->places_stride = rows->places_stride;
  call->per_row = rows->per_row;
  call->in_features = in;
  call->padded = round_up(in, 16);
  return CK_OK;
}

}  // namespace

extern "C" int64_t ck_rows_workspace(int64_t in_features, int64_t tokens) {
  if (in_features < 1 || in_features > MAX_FEATURES || tokens < 0 || tokens > MAX_FEATURES) return CK_ERR_SHAPE;
  return round_up(in_features, 16) * tokens * int64_t(sizeof(float));
}

extern "C" int ck_rows_linear(const ck_rows* rows, const void* x, int32_t x_dtype, int64_t tokens, int64_t x_stride,
                              const void* bias, int32_t bias_dtype, void* out, int32_t out_dtype, int64_t out_stride,
                              int32_t add, void* workspace, int64_t workspace_bytes, int32_t n_threads) {
  ck::RowsCall call;
  int status = checked(rows, &call);
  if (status) return status;
  if (tokens < 0 || tokens > MAX_FEATURES) return CK_ERR_SHAPE;
  if (!dtype_known(x_dtype) || !dtype_known(out_dtype) || (bias && !dtype_known(bias_dtype))) return CK_ERR_DTYPE;
  if (n_threads < 1) return CK_ERR_THREADS;
  if (tokens == 0) return CK_OK;
  if (!x || !out || !workspace) return CK_ERR_NULL;
  if (tokens > 1 && (x_stride < rows->in_features || out_stride < rows->out_features)) return CK_ERR_STRIDE;
  if (!aligned(workspace, 64)) return CK_ERR_ALIGNMENT;
  if (workspace_bytes < ck_rows_workspace(rows->in_features, tokens)) return CK_ERR_BYTES;
  call.out_dtype = out_dtype;
  call.out_stride = out_stride;
  call.bias = bias;
  call.bias_dtype = bias_dtype;
  call.add = add != 0;
  float* space = static_cast<float*>(workspace);
  const ck::RowsKernels* kernels = kernels_of(ck_isa_current());
  const ck::RowsHalves* halves =
      rows->dtype == CK_BF16 && x_dtype == CK_BF16 ? halves_of(ck_isa_current()) : nullptr;
  const int64_t out_features = rows->out_features, work = out_features * rows->in_features / LEAST;
  const int threads = int(max64(1, min64(min64(n_threads, out_features), work)));
  parallel(threads, [&](int thread, int n) {
    const Range mine = share(tokens, thread, n), part = share(out_features, thread, n);
    if (halves) {  // a token takes no more of the workspace than as floats
      uint16_t* to = reinterpret_cast<uint16_t*>(space);
      for (int64_t t = mine.begin; t < mine.end; t++)
        halves->prepare(at(x, x_dtype, t * x_stride), call.in_features, to + t * round_up(call.in_features, 32));
      CK_BARRIER
      ck::RowsCall all = call;
      all.x = space;
      all.tokens = int(tokens);
      all.out = out;
      halves->run[rows->kind](all, part.begin, part.end);
      return;
    }
    for (int64_t t = mine.begin; t < mine.end; t++)
      kernels->prepare(at(x, x_dtype, t * x_stride), x_dtype, call.in_features, call.padded, space + t * call.padded);
    CK_BARRIER
    for (int64_t first = 0; first < tokens; first += ck::ROW_TOKENS) {
      ck::RowsCall some = call;
      some.x = space + first * call.padded;
      some.tokens = int(min64(ck::ROW_TOKENS, tokens - first));
      some.out = at(out, out_dtype, first * out_stride);
      kernels->run[rows->kind][rows->dtype](some, part.begin, part.end);
    }
  });
  return CK_OK;
}

extern "C" int ck_rows_dense(const ck_rows* rows, void* out, int32_t out_dtype, int64_t out_stride, int32_t n_threads) {
  ck::RowsCall call;
  int status = checked(rows, &call);
  if (status) return status;
  if (!dtype_known(out_dtype)) return CK_ERR_DTYPE;
  if (n_threads < 1) return CK_ERR_THREADS;
  if (!out) return CK_ERR_NULL;
  if (out_stride < rows->in_features) return CK_ERR_STRIDE;
  call.out = out;
  call.out_dtype = out_dtype;
  call.out_stride = out_stride;
  const ck::RowsKernels* kernels = kernels_of(ck_isa_current());
  parallel(int(min64(n_threads, rows->out_features)), [&](int thread, int n) {
    const Range part = share(rows->out_features, thread, n);
    kernels->write[rows->kind][rows->dtype](call, part.begin, part.end);
  });
  return CK_OK;
}
