// ck_sign_planes_linear and ck_sign_planes_rows: checks, then the kernels of the instruction set in use, rows shared by threads.

#include "sign_planes.h"

#include "isa.h"

namespace {

using ck::SignPlanesCall;

constexpr int64_t MAX_SIZE = INT32_MAX, MAX_RANK = 1 << 20, MAX_BLOCKS = 1024;

const ck::SignPlanesKernels* kernels_of(int isa) {
#ifdef CK_X86
  if (isa >= ck::AVX512) return ck::sign_planes_avx512();
  if (isa >= ck::AVX2) return ck::sign_planes_avx2();
#endif
  (void)isa;
  return ck::sign_planes_portable();
}

// Offsets in the workspace of a product.
struct Workspace { int64_t y_at, factors_at, steps_at, bytes; };

Workspace workspace_of(int64_t out_features, int64_t in_features) {
  const int64_t n_tiles = ceil_div(in_features, ck::COLUMNS), rows = round_up(out_features, ck::ROWS);
  const int64_t y_at = n_tiles * max64(ck::FLOAT_TILE * 4, ck::WORD_TILE * 2);
  const int64_t factors_at = y_at + rows * 4, steps_at = factors_at + rows * ck::LANES * 4;
  return {y_at, factors_at, steps_at, steps_at + n_tiles * 4};
}

int check(const ck_sign_block* blocks, int64_t n_blocks, int64_t out_features, int64_t in_features, int32_t n_threads) {
  if (out_features < 1 || out_features > MAX_SIZE || in_features < 1 || in_features > MAX_SIZE) return CK_ERR_SHAPE;
  if (n_blocks < 1 || n_blocks > MAX_BLOCKS) return CK_ERR_SHAPE;
  if (n_threads < 1) return CK_ERR_THREADS;
  if (!blocks) return CK_ERR_NULL;
  for (int64_t b = 0; b < n_blocks; b++) {
    if (blocks[b].rank < 1 || blocks[b].rank > MAX_RANK) return CK_ERR_SHAPE;
    if (!blocks[b].signs || !blocks[b].left || !blocks[b].right) return CK_ERR_NULL;
  }
  return CK_OK;
}

SignPlanesCall call_of(const ck_sign_block* blocks, int64_t n_blocks, int64_t out_features, int64_t in_features,
                       const void* scale) {
  SignPlanesCall call = {};
  call.blocks = blocks;
  call.n_blocks = n_blocks;
  call.out_features = out_features;
  call.in_features = in_features;
  call.row_bytes = ceil_div(in_features, 8);
  call.scale = static_cast<const uint16_t*>(scale);
  return call;
}

// What the rows of a weight are rebuilt from, in a workspace of `bytes`.
struct RowsCall { SignPlanesCall call; int64_t bytes; };

RowsCall rows_call(const ck_sign_block* blocks, int64_t n_blocks, int64_t out_features, int64_t in_features,
                   const void* scale, void* workspace) {
  SignPlanesCall call = call_of(blocks, n_blocks, out_features, in_features, scale);
  for (int64_t b = 0; b < n_blocks; b++) call.all_ranks += blocks[b].rank;
  const int64_t inner_bytes = call.all_ranks * round_up(in_features, ck::STRIPE) * 4;
  if (workspace) {
    call.inner = static_cast<float*>(workspace);
    call.outer = reinterpret_cast<float*>(static_cast<char*>(workspace) + inner_bytes);
  }
  return {call, inner_bytes + call.all_ranks * out_features * 4};
}

void one_token(SignPlanesCall& call, const ck::SignPlanesKernels* kernels, bool words, int thread, int n) {
  const int64_t n_groups = ceil_div(call.out_features, ck::ROWS);
  const Range tiles = share(ceil_div(call.in_features, ck::COLUMNS), thread, n), groups = share(n_groups, thread, n);
  const int64_t first = groups.begin * ck::ROWS, end = min64(groups.end * ck::ROWS, call.out_features);
  for (int64_t i = first; i < groups.end * ck::ROWS; i++) call.y[i] = 0;
  for (int64_t b = 0; b < call.n_blocks; b++) {
    call.signs = call.blocks[b].signs;
    call.left = static_cast<const uint16_t*>(call.blocks[b].left);
    call.right = static_cast<const uint16_t*>(call.blocks[b].right);
    call.rank = call.blocks[b].rank;
    for (call.first_rank = 0; call.first_rank < call.rank; call.first_rank += ck::LANES) {
      call.n_ranks = int(min64(ck::LANES, call.rank - call.first_rank));
      CK_BARRIER  // nobody reads the tables before
      (words ? kernels->word_tables : kernels->float_tables)(call, tiles.begin, tiles.end);
      if (words) kernels->word_factors(call, groups.begin, groups.end);
      CK_BARRIER
      if (words) kernels->word_rows(call, groups.begin, groups.end);
      else kernels->float_rows(call, first, end);
    }
  }
}

// Of row i in `y` as words leave it.
CK_INLINE int64_t place_of(int64_t i) { return i - i % ck::ROWS + i % 2 * (ck::ROWS / 2) + i % ck::ROWS / 2; }

}  // namespace

extern "C" int64_t ck_sign_planes_workspace(int64_t out_features, int64_t in_features) {
  if (out_features < 1 || out_features > MAX_SIZE || in_features < 1 || in_features > MAX_SIZE) return CK_ERR_SHAPE;
  return workspace_of(out_features, in_features).bytes;
}

extern "C" int ck_sign_planes_linear(const ck_sign_block* blocks, int64_t n_blocks, int64_t out_features,
                                     int64_t in_features, const void* scale, const void* x, int32_t x_dtype, int64_t tokens,
                                     int64_t x_stride, const void* bias, int32_t bias_dtype, void* out, int64_t out_stride,
                                     int32_t tables, void* workspace, int64_t workspace_bytes, int32_t n_threads) {
  const int status = check(blocks, n_blocks, out_features, in_features, n_threads);
  if (status) return status;
  if (tokens < 0 || tokens > MAX_SIZE) return CK_ERR_SHAPE;
  if (!dtype_known(x_dtype) || (bias && !dtype_known(bias_dtype))) return CK_ERR_DTYPE;
  if (tables != CK_TABLES_FLOAT && tables != CK_TABLES_WORD) return CK_ERR_MODE;
  if (tokens == 0) return CK_OK;
  if (!x || !out || !workspace) return CK_ERR_NULL;
  if (!aligned(workspace, 64)) return CK_ERR_ALIGNMENT;
  if (tokens > 1 && (x_stride < in_features || out_stride < out_features)) return CK_ERR_STRIDE;
  const Workspace parts = workspace_of(out_features, in_features);
  if (workspace_bytes < parts.bytes) return CK_ERR_BYTES;

  const ck::SignPlanesKernels* kernels = kernels_of(ck_isa_current());
  const bool words = tables == CK_TABLES_WORD && kernels->word_rows;
  SignPlanesCall shared = call_of(blocks, n_blocks, out_features, in_features, scale);
  char* space = static_cast<char*>(workspace);
  shared.tables = space;
  shared.y = reinterpret_cast<float*>(space + parts.y_at);
  shared.factors = reinterpret_cast<float*>(space + parts.factors_at);
  shared.steps = reinterpret_cast<float*>(space + parts.steps_at);
  shared.x_dtype = x_dtype;
  parallel(int(min64(n_threads, ceil_div(out_features, ck::ROWS))), [&](int thread, int n) {
    SignPlanesCall call = shared;
    const Range groups = share(ceil_div(out_features, ck::ROWS), thread, n);
    for (int64_t token = 0; token < tokens; token++) {
      call.x = at(x, x_dtype, token * x_stride);
      one_token(call, kernels, words, thread, n);
      for (int64_t i = groups.begin * ck::ROWS; i < min64(groups.end * ck::ROWS, out_features); i++)
        put_float(out, x_dtype, token * out_stride + i,
                 call.y[words ? place_of(i) : i] + (bias ? float_at(bias, bias_dtype, i) : 0.0f));
    }
  });
  return CK_OK;
}

extern "C" int64_t ck_sign_planes_rows_workspace(const ck_sign_block* blocks, int64_t n_blocks, int64_t out_features,
                                                 int64_t in_features) {
  const int status = check(blocks, n_blocks, out_features, in_features, 1);
  return status ? status : rows_call(blocks, n_blocks, out_features, in_features, nullptr, nullptr).bytes;
}

extern "C" int ck_sign_planes_factors(const ck_sign_block* blocks, int64_t n_blocks, int64_t out_features,
                                      int64_t in_features, void* workspace, int64_t workspace_bytes, int32_t n_threads) {
  const int status = check(blocks, n_blocks, out_features, in_features, n_threads);
  if (status) return status;
  if (!workspace) return CK_ERR_NULL;
  if (!aligned(workspace, 64)) return CK_ERR_ALIGNMENT;
  const RowsCall rows = rows_call(blocks, n_blocks, out_features, in_features, nullptr, workspace);
  if (workspace_bytes < rows.bytes) return CK_ERR_BYTES;
  const ck::SignPlanesKernels* kernels = kernels_of(ck_isa_current());
  parallel(n_threads, [&](int thread, int n) {
    const Range stripes = share(ceil_div(in_features, ck::STRIPE), thread, n), mine = share(out_features, thread, n);
    kernels->inner(rows.call, stripes.begin, stripes.end);
    kernels->outer(rows.call, mine.begin, mine.end);
  });
  return CK_OK;
}

extern "C" int ck_sign_planes_rows(const ck_sign_block* blocks, int64_t n_blocks, int64_t out_features, int64_t in_features,
                                   const void* scale, int64_t first_row, int64_t n_rows, void* dense, int32_t dense_dtype,
                                   int64_t dense_stride, const void* workspace, int64_t workspace_bytes,
                                   int32_t n_threads) {
  const int status = check(blocks, n_blocks, out_features, in_features, n_threads);
  if (status) return status;
  if (first_row < 0 || n_rows < 0 || first_row + n_rows > out_features) return CK_ERR_SHAPE;
  if (!dtype_known(dense_dtype)) return CK_ERR_DTYPE;
  if (n_rows == 0) return CK_OK;
  if (!dense || !workspace) return CK_ERR_NULL;
  if (!aligned(workspace, 64)) return CK_ERR_ALIGNMENT;
  if (dense_stride < in_features) return CK_ERR_STRIDE;
  RowsCall rows = rows_call(blocks, n_blocks, out_features, in_features, scale, const_cast<void*>(workspace));  // read only
  if (workspace_bytes < rows.bytes) return CK_ERR_BYTES;
  rows.call.dense = dense;
  rows.call.dense_dtype = dense_dtype;
  rows.call.dense_stride = dense_stride;
  rows.call.first_row = first_row;
  const ck::SignPlanesKernels* kernels = kernels_of(ck_isa_current());
  parallel(int(min64(n_threads, n_rows)), [&](int thread, int n) {
    const Range mine = share(n_rows, thread, n);
    kernels->rows(rows.call, first_row + mine.begin, first_row + mine.end);
  });
  return CK_OK;
}
