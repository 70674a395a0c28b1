// The C interface of the CUDA kernels. The caller owns all memory; nothing here allocates, synchronises, prints or throws:
// a call puts kernels on `stream` (a cudaStream_t) of the current device and returns, so it can be captured in a graph.
//
// A function that returns int gives 0, a negative CC_ERR_* (then nothing was launched), or a positive cudaError_t.
// Pointers are device memory. Sizes and strides are in elements, `bytes` in bytes.

#ifndef COMPRESS_CUDA_H
#define COMPRESS_CUDA_H

#include <stdint.h>

#define CC_ABI_VERSION 1     // changes with any signature or struct here; the loader refuses another one
#define CC_LAYOUT_VERSION 1  // of packed buffers; they are made at load and never stored

#if defined(_WIN32)
#define CC_API __declspec(dllexport)
#else
#define CC_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum { CC_BF16 = 1, CC_F16 = 2 };  // dtypes, numbered as in the CPU kernels

enum {
  CC_OK = 0,
  CC_ERR_NULL = -1,
  CC_ERR_VERSION = -2,
  CC_ERR_BITS = -3,
  CC_ERR_SHAPE = -4,
  CC_ERR_GROUP = -5,
  CC_ERR_DTYPE = -6,
  CC_ERR_BYTES = -7,
  CC_ERR_ALIGNMENT = -8,
  CC_ERR_STRIDE = -9,
  CC_ERR_TOKENS = -10,
  CC_ERR_SPLITS = -11,
  CC_ERR_ZERO_POINT = -13
};

CC_API int32_t cc_abi_version(void);
CC_API const char* cc_source_digest(void);     // of the sources it was built from
CC_API const char* cc_architectures(void);     // machine code inside: "80 86 89 90a"
CC_API const char* cc_status_text(int status);  // NULL for CC_OK

// ---- grouped integer weights ---------------------------------------------------------------------------------------
// weight = (code - zero_point) * scale, one scale and zero point per row and group of inputs. layout.h has the layout.

typedef struct {
  int32_t version;      // CC_LAYOUT_VERSION
  int32_t bits;         // 2, 3, 4 or 8
  int32_t symmetric;    // 1: zero point 2^(bits-1) everywhere; 0: one byte per row and group in the buffer
  int32_t scale_dtype;  // CC_BF16 or CC_F16, as kept in the buffer
  int64_t out_features, in_features;
  int64_t group_size;   // 32, a multiple of 64, or in_features
  int64_t reserved;     // 0
} cc_weight;

CC_API int64_t cc_weight_bytes(const cc_weight* weight);  // of the packed buffer; negative: CC_ERR_*

// What a linear reads and writes beside its weight. All 16-bit floats are of `dtype`.
typedef struct {
  const void* x;        // [tokens][x_stride]; 16-byte aligned, x_stride a multiple of 8
  void* out;            // [tokens][out_stride]
  const void* bias;     // [out_features] or NULL
  const void* hidden;   // low rank: [tokens][hidden_stride], aligned as x, or NULL
  const void* left;     // low rank: packed 16-bit fragments (layout.py: pack_left); NULL with hidden
  void* workspace;      // 16-byte aligned, any contents
  int64_t workspace_bytes;
  int64_t tokens, x_stride, out_stride, hidden_stride;
  int64_t x_columns;    // in_features rounded up to a multiple of 8; x is 0 behind in_features
  int64_t rank;         // columns of hidden, a multiple of 8
  int32_t dtype;
  int32_t splits;       // of the inputs, each summed by other blocks and added up in order: 1 .. 64
} cc_operands;

// out = x weight^T + hidden left^T + bias, summed in float32. Decode: 1 to 16 tokens. Tensor: any number, in tiles of 64.
CC_API int64_t cc_linear_workspace(const cc_weight* weight, int64_t tokens, int32_t splits);  // bytes; negative: CC_ERR_*
CC_API int cc_linear_decode(const cc_weight* weight, const void* buffer, int64_t buffer_bytes,
                            const cc_operands* operands, void* stream);
CC_API int cc_linear_tensor(const cc_weight* weight, const void* buffer, int64_t buffer_bytes,
                            const cc_operands* operands, void* stream);

// out [out_features][out_stride]: the weight, rounded to the dtype of its scales, then to `dtype`. out 16-byte aligned,
// out_stride a multiple of 8.
CC_API int cc_dequantize(const cc_weight* weight, const void* buffer, int64_t buffer_bytes, void* out, int64_t out_stride,
                         int32_t dtype, void* stream);

// ---- Hadamard transform --------------------------------------------------------------------------------------------
// Along rows of n = n_blocks * block inputs, block = orders[0] * ... * orders[n_cores - 1] * 2^log2: x H, or x H^T.
// signs: for each core, orders[i] rows of ceil(orders[i] / 32) words, bit j of row k set where the core has -1 at [k, j].
CC_API int cc_hadamard(const void* x, int64_t x_stride, void* out, int64_t out_stride, int64_t rows, int64_t n_blocks,
                       int32_t log2, int32_t n_cores, const int32_t* orders, const void* signs, int32_t transposed,
                       int32_t dtype, void* stream);
CC_API int64_t cc_hadamard_largest(void);  // block that fits the shared memory of the current device

#ifdef __cplusplus
}
#endif
#endif
