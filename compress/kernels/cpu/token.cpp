// ck_token_*: what a decoder block does with one token between its products. Small: one thread each.

#include "token.h"

#include "isa.h"
#include "layout.h"

namespace {

const ck::TokenKernels* kernels_of(int isa) {
#ifdef CK_X86
  if (isa >= ck::AVX512) return ck::token_avx512();
  if (isa >= ck::AVX2) return ck::token_avx2();
#endif
  (void)isa;
  return ck::token_portable();
}

}  // namespace

extern "C" int ck_token_norm(const void* x, const void* weight, void* out, int32_t dtype, int64_t n, float eps) {
  if (!dtype_known(dtype)) return CK_ERR_DTYPE;
  if (n < 1 || n > MAX_FEATURES) return CK_ERR_SHAPE;
  if (!x || !weight || !out) return CK_ERR_NULL;
  kernels_of(ck_isa_current())->norm(x, weight, out, dtype, n, eps);
  return CK_OK;
}

extern "C" int ck_token_gated(const void* gate, const void* up, void* out, int32_t dtype, int64_t n) {
  if (!dtype_known(dtype)) return CK_ERR_DTYPE;
  if (n < 1 || n > MAX_FEATURES) return CK_ERR_SHAPE;
  if (!gate || !up || !out) return CK_ERR_NULL;
  kernels_of(ck_isa_current())->gated(gate, up, out, dtype, n);
  return CK_OK;
}

extern "C" int ck_token_turn(void* qkv, const void* cos, const void* sin, int32_t dtype, int64_t heads, int64_t key_heads,
                             int64_t head, void* keys, void* values, int64_t key_stride, int64_t value_stride) {
  if (!dtype_known(dtype)) return CK_ERR_DTYPE;
  if (heads < 1 || key_heads < 1 || head < 2 || head % 2 || head > MAX_FEATURES || heads > MAX_FEATURES / head ||
      key_heads > MAX_FEATURES / head)
    return CK_ERR_SHAPE;
  if (!qkv || !cos || !sin || !keys || !values) return CK_ERR_NULL;
  if (key_heads > 1 && (key_stride < head || value_stride < head)) return CK_ERR_STRIDE;
  const ck::TokenKernels* kernels = kernels_of(ck_isa_current());
  for (int64_t i = 0; i < heads; i++) {
    void* query = at(qkv, dtype, i * head);
    kernels->turn(query, cos, sin, query, dtype, head);
  }
  for (int64_t i = 0; i < key_heads; i++) {
    kernels->turn(at(qkv, dtype, (heads + i) * head), cos, sin, at(keys, dtype, i * key_stride), dtype, head);
    memcpy(at(values, dtype, i * value_stride), at(qkv, dtype, (heads + key_heads + i) * head),
           size_t(head * dtype_bytes(dtype)));
  }
  return CK_OK;
}
