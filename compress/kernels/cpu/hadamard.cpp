// ck_hadamard: checks, then threads share the blocks.

#include "hadamard.h"

#include "isa.h"
#include "layout.h"

namespace {

ck::HadamardBlocks kernel_of(int isa) {
#ifdef CK_X86
  if (isa >= ck::AVX512) return ck::hadamard_avx512();
  if (isa >= ck::AVX2) return ck::hadamard_avx2();
#endif
  (void)isa;
  return ck::hadamard_portable();
}

constexpr int64_t LEAST = 8192;  // values that a thread should have: waking one up takes as long as transforming them

int64_t space_of(int64_t block) { return round_up(2 * block * int64_t(sizeof(float)), 64); }

int threads_of(int64_t values, int64_t n_blocks, int32_t n_threads) {
  return int(max64(1, min64(min64(n_threads, n_blocks), values / LEAST)));
}

}  // namespace

extern "C" int64_t ck_hadamard_workspace(int64_t block, int32_t n_threads) {
  if (block < 1 || block > MAX_FEATURES) return CK_ERR_SHAPE;
  if (n_threads < 1) return CK_ERR_THREADS;
  return space_of(block) * n_threads;
}

extern "C" int ck_hadamard(const void* x, int32_t dtype, int64_t rows, int64_t features, int64_t x_stride,
                           const int64_t* orders, int32_t n_cores, const float* cores, int64_t power, float factor,
                           void* out, int64_t out_stride, void* workspace, int64_t workspace_bytes, int32_t n_threads) {
  ck::HadamardCall call;
  if (!dtype_known(dtype)) return CK_ERR_DTYPE;
  if (rows < 0 || rows > MAX_FEATURES || features < 1 || features > MAX_FEATURES) return CK_ERR_SHAPE;
  if (n_cores < 0 || n_cores > ck::MAX_CORES || power < 1 || power > features || (power & (power - 1))) return CK_ERR_SHAPE;
  if (n_cores && (!orders || !cores)) return CK_ERR_NULL;
  call.block = power;
  for (int c = 0; c < n_cores; c++) {
    if (orders[c] < 2 || orders[c] > 4096) return CK_ERR_SHAPE;
    call.order[c] = orders[c];
    call.core[c] = cores;
    cores += orders[c] * orders[c];
    if (call.block > features / orders[c]) return CK_ERR_SHAPE;
    call.block *= orders[c];
  }
  if (features % call.block) return CK_ERR_SHAPE;
  if (n_threads < 1) return CK_ERR_THREADS;
  if (rows == 0) return CK_OK;
  if (!x || !out || !workspace) return CK_ERR_NULL;
  if (rows > 1 && (x_stride < features || out_stride < features)) return CK_ERR_STRIDE;
  if (!aligned(workspace, 64)) return CK_ERR_ALIGNMENT;
  call.x = x;
  call.out = out;
  call.dtype = dtype;
  call.x_stride = x_stride;
  call.out_stride = out_stride;
  call.blocks_per_row = features / call.block;
  call.power = power;
  call.n_cores = n_cores;
  call.factor = factor;
  const int64_t n_blocks = rows * call.blocks_per_row, space = space_of(call.block);
  const int threads = threads_of(rows * features, n_blocks, n_threads);
  if (workspace_bytes < space * threads) return CK_ERR_BYTES;
  const ck::HadamardBlocks kernel = kernel_of(ck_isa_current());
  parallel(threads, [&](int thread, int n) {
    const Range mine = share(n_blocks, thread, n);
    kernel(call, mine.begin, mine.end, reinterpret_cast<float*>(static_cast<char*>(workspace) + thread * space));
  });
  return CK_OK;
}
