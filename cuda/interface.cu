// The parts of the C interface that launch nothing: versions, sizes, checks.

#include "linear.h"

#ifndef CC_SOURCE_DIGEST
#define CC_SOURCE_DIGEST ""
#endif
#ifndef CC_ARCHITECTURES
#define CC_ARCHITECTURES ""
#endif

constexpr int MAX_SPLITS = 64;

static bool aligned(const void* p, uintptr_t to) { return reinterpret_cast<uintptr_t>(p) % to == 0; }

int linear_of(const cc_weight* weight, const void* buffer, int64_t buffer_bytes, const cc_operands* o, Linear* a) {
  Layout l;
  if (int error = layout_of(weight, &l)) return error;
  if (!o || !buffer) return CC_ERR_NULL;
  if (o->tokens < 0 || o->tokens > MAX_FEATURES) return CC_ERR_TOKENS;
  if (o->tokens > 0 && (!o->x || !o->out)) return CC_ERR_NULL;
  if ((o->hidden == nullptr) != (o->left == nullptr)) return CC_ERR_NULL;
  if (buffer_bytes != l.bytes) return CC_ERR_BYTES;
  if (o->dtype != CC_F16 && o->dtype != CC_BF16) return CC_ERR_DTYPE;
  if (o->splits < 1 || o->splits > MAX_SPLITS) return CC_ERR_SPLITS;
  if (o->x_columns != round_up(weight->in_features, 8)) return CC_ERR_SHAPE;
  if (o->x_stride < o->x_columns || o->x_stride % 8 || o->out_stride < weight->out_features) return CC_ERR_STRIDE;
  if (!aligned(buffer, 16) || !aligned(o->x, 16) || !aligned(o->out, 2) || !aligned(o->bias, 2)) return CC_ERR_ALIGNMENT;
  if (o->left) {
    if (o->rank < 8 || o->rank % 8 || o->rank > MAX_FEATURES) return CC_ERR_SHAPE;
    if (o->hidden_stride < o->rank || o->hidden_stride % 8) return CC_ERR_STRIDE;
    if (!aligned(o->left, 16) || !aligned(o->hidden, 16)) return CC_ERR_ALIGNMENT;
  }
  const int64_t workspace = cc_linear_workspace(weight, o->tokens, o->splits);
  if (workspace > 0) {
    if (!o->workspace) return CC_ERR_NULL;
    if (o->workspace_bytes < workspace) return CC_ERR_BYTES;
    if (!aligned(o->workspace, 16)) return CC_ERR_ALIGNMENT;
  }
  const uint8_t* base = static_cast<const uint8_t*>(buffer);
  *a = Linear();
  a->codes = base;
  a->scales = base + l.scales_at;
  a->zeros = base + l.zeros_at;  // nothing is there if symmetric
  a->symmetric = weight->symmetric != 0;
  a->x = static_cast<const uint16_t*>(o->x);
  a->hidden = static_cast<const uint16_t*>(o->hidden);
  a->bias = static_cast<const uint16_t*>(o->bias);
  a->left = static_cast<const uint8_t*>(o->left);
  a->out = static_cast<uint16_t*>(o->out);
  a->partial = static_cast<float*>(o->workspace);
  a->x_stride = o->x_stride;
  a->hidden_stride = o->hidden_stride;
  a->out_stride = o->out_stride;
  a->tokens = int32_t(o->tokens);
  a->x_columns = int32_t(o->x_columns);
  a->rank = o->left ? int32_t(o->rank) : 0;
  a->out_features = int32_t(weight->out_features);
  a->row_blocks = l.row_blocks;
  a->input_blocks = l.input_blocks;
  a->rank_blocks = int32_t(ceil_div(a->rank, BLOCK));
  a->n_groups = l.n_groups;
  a->groups_per_block = l.groups_per_block;
  a->blocks_per_group = l.blocks_per_group;
  a->splits = o->splits;
  a->scales_bf16 = weight->scale_dtype == CC_BF16;
  return CC_OK;
}

extern "C" {

int32_t cc_abi_version(void) { return CC_ABI_VERSION; }
const char* cc_source_digest(void) { return CC_SOURCE_DIGEST; }
const char* cc_architectures(void) { return CC_ARCHITECTURES; }

const char* cc_status_text(int status) {
  switch (status) {
    case CC_OK: return nullptr;
    case CC_ERR_NULL: return "a pointer is missing";
    case CC_ERR_VERSION: return "the packed buffer is of another version";
    case CC_ERR_BITS: return "bits are not 2, 3, 4 or 8";
    case CC_ERR_SHAPE: return "a size is out of range";
    case CC_ERR_GROUP: return "the group is neither 32, a multiple of 64, nor the whole row";
    case CC_ERR_DTYPE: return "the dtype is neither float16 nor bfloat16";
    case CC_ERR_BYTES: return "a buffer has the wrong size";
    case CC_ERR_ALIGNMENT: return "a pointer is not aligned";
    case CC_ERR_STRIDE: return "a stride is too small or not a multiple of 8";
    case CC_ERR_TOKENS: return "too many tokens for this kernel";
    case CC_ERR_SPLITS: return "splits are not 1 to 64";
    case CC_ERR_ZERO_POINT: return "symmetric is neither 0 nor 1";
    default: break;
  }
#ifndef CC_EMULATE
  if (status > 0) return cudaGetErrorString(cudaError_t(status));
#endif
  return "unknown error";
}

int64_t cc_weight_bytes(const cc_weight* weight) {
  Layout l;
  const int error = layout_of(weight, &l);
  return error ? error : l.bytes;
}

int64_t cc_linear_workspace(const cc_weight* weight, int64_t tokens, int32_t splits) {
  Layout l;
  if (int error = layout_of(weight, &l)) return error;
  if (splits < 1 || splits > MAX_SPLITS) return CC_ERR_SPLITS;
  if (tokens < 0 || tokens > MAX_FEATURES) return CC_ERR_TOKENS;
  return splits == 1 ? 0 : splits * tokens * l.row_blocks * BLOCK * int64_t(sizeof(float));
}
}
