// The C interface of the compiled kernels. The caller owns all memory; nothing here allocates, prints or throws.
//
// A function that returns int gives 0, or a negative CK_ERR_*: then nothing was read or written. Sizes are in elements,
// strides in elements, `bytes` in bytes.

#ifndef COMPRESS_KERNELS_H
#define COMPRESS_KERNELS_H

#include <stdint.h>

#define CK_ABI_VERSION 1     // changes with any signature or struct here; the loader refuses another one
#define CK_LAYOUT_VERSION 1  // of packed buffers; they are made at load and never stored

#if defined(_WIN32)
#define CK_API __declspec(dllexport)
#else
#define CK_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum { CK_F32 = 0, CK_BF16 = 1, CK_F16 = 2 };  // dtypes

enum {
  CK_OK = 0,
  CK_ERR_NULL = -1,
  CK_ERR_VERSION = -2,
  CK_ERR_BITS = -3,
  CK_ERR_SHAPE = -4,
  CK_ERR_GROUP = -5,
  CK_ERR_DTYPE = -6,
  CK_ERR_BYTES = -7,
  CK_ERR_ALIGNMENT = -8,
  CK_ERR_STRIDE = -9,
  CK_ERR_THREADS = -10,
  CK_ERR_MODE = -11,
  CK_ERR_ISA = -12,
  CK_ERR_ZERO_POINT = -13
};

CK_API int32_t ck_abi_version(void);
CK_API const char* ck_source_digest(void);       // of the sources it was built from
CK_API const char* ck_status_text(int status);

// Instruction sets, slowest first. The fastest that this processor has is in use until another one is set.
CK_API int ck_isa_count(void);
CK_API const char* ck_isa_name(int isa);         // NULL: no such number
CK_API int ck_isa_supported(int isa);            // built in, and this processor has it
CK_API int ck_isa_current(void);
CK_API int ck_isa_set(int isa);                  // CK_ERR_ISA if not supported
CK_API int ck_threads_used(int n_threads);       // how many threads a region that asks for so many gets

// ---- grouped integer weights ---------------------------------------------------------------------------------------
// weight = (code - zero_point) * scale, one scale (and zero point) per row and group of inputs. layout.h has the layout.

typedef struct {
  int32_t version;      // CK_LAYOUT_VERSION
  int32_t bits;         // of a code in the buffer: 2, 3, 4 or 8
  int32_t symmetric;    // 1: `zero_point` everywhere; 0: one byte per row and group in the buffer
  int32_t zero_point;   // 0 .. 2^bits - 1
  int32_t scale_dtype;  // as they are kept in the buffer
  int32_t reserved;     // 0
  int64_t out_features, in_features;
  int64_t group_size;   // divides in_features
} ck_weight;

CK_API int64_t ck_weight_bytes(const ck_weight* weight);  // of the packed buffer; negative: CK_ERR_*

// words: codes of `disk_bits` <= bits bits as they are stored: a bit stream per row, low bits first, [out][words_stride].
// scale [out][groups] of scale_dtype; zero_points one byte each [out][groups], NULL if symmetric. buffer: 64-byte aligned.
CK_API int ck_weight_pack(const ck_weight* weight, const int32_t* words, int64_t words_stride, int32_t disk_bits,
                          const void* scale, const uint8_t* zero_points, void* buffer, int64_t buffer_bytes,
                          int32_t n_threads);

enum { CK_A8 = 8, CK_A16 = 16 };  // activations: rounded to 8 bits per token and block of inputs, or kept

CK_API int64_t ck_linear_workspace(const ck_weight* weight, int64_t tokens, int32_t activations);  // bytes

// out[t, o] = sum_i x[t, i] weight[o, i] + bias[o].  x [tokens][x_stride], out [tokens][out_stride] of x_dtype;
// bias [out] of bias_dtype or NULL. workspace: 64-byte aligned, any contents.
CK_API int ck_linear(const ck_weight* weight, const void* buffer, int64_t buffer_bytes, const void* x, int32_t x_dtype,
                     int64_t tokens, int64_t x_stride, const void* bias, int32_t bias_dtype, void* out,
                     int64_t out_stride, int32_t activations, void* workspace, int64_t workspace_bytes,
                     int32_t n_threads);

// ---- sign planes ---------------------------------------------------------------------------------------------------
// weight = (sum_b signs_b * (left_b right_b^T)) * scale per column.

typedef struct {
  const uint8_t* signs;  // [out][ceil(in / 8)], bit j % 8 of byte j / 8 is column j, 1 for +1
  const void* left;      // float16 [out][rank]
  const void* right;     // float16 [in][rank]
  int64_t rank;
} ck_sign_block;

enum { CK_TABLES_FLOAT = 0, CK_TABLES_WORD = 1 };  // sums of few inputs in float32, or in int16 where there are such kernels

CK_API int64_t ck_sign_planes_workspace(int64_t out_features, int64_t in_features);  // bytes

// out[t, o] = sum_i x[t, i] weight[o, i] + bias[o], one token after the other. scale float16 [in] or NULL; bias or NULL.
CK_API int ck_sign_planes_linear(const ck_sign_block* blocks, int64_t n_blocks, int64_t out_features, int64_t in_features,
                                 const void* scale, const void* x, int32_t x_dtype, int64_t tokens, int64_t x_stride,
                                 const void* bias, int32_t bias_dtype, void* out, int64_t out_stride, int32_t tables,
                                 void* workspace, int64_t workspace_bytes, int32_t n_threads);

// Rows of the weight, for a product of many tokens that the caller makes. ck_sign_planes_factors prepares the workspace once.
CK_API int64_t ck_sign_planes_rows_workspace(const ck_sign_block* blocks, int64_t n_blocks, int64_t out_features,
                                             int64_t in_features);
CK_API int ck_sign_planes_factors(const ck_sign_block* blocks, int64_t n_blocks, int64_t out_features, int64_t in_features,
                                  void* workspace, int64_t workspace_bytes, int32_t n_threads);
CK_API int ck_sign_planes_rows(const ck_sign_block* blocks, int64_t n_blocks, int64_t out_features, int64_t in_features,
                               const void* scale, int64_t first_row, int64_t n_rows, void* dense, int32_t dense_dtype,
                               int64_t dense_stride, const void* workspace, int64_t workspace_bytes, int32_t n_threads);

// ---- Hadamard transforms ---------------------------------------------------------------------------------------------
// out[r] = x[r] H * factor, H block-diagonal; a block is the Kronecker product of `n_cores` matrices of +-1 of these orders
// (float, row by row, one after the other) and Sylvester's matrix of order `power`. out may be x.

CK_API int64_t ck_hadamard_workspace(int64_t block, int32_t n_threads);  // bytes
CK_API int ck_hadamard(const void* x, int32_t dtype, int64_t rows, int64_t features, int64_t x_stride,
                       const int64_t* orders, int32_t n_cores, const float* cores, int64_t power, float factor,
                       void* out, int64_t out_stride, void* workspace, int64_t workspace_bytes, int32_t n_threads);

// ---- the limits of the processor, for whoever holds the clock --------------------------------------------------------

// Reads all of a buffer; mixed: the exclusive or of its words. 64-byte aligned, whole multiples of 64 bytes.
CK_API int ck_roofline_read(const void* buffer, int64_t bytes, int32_t n_threads, uint64_t* mixed);

enum { CK_UNIT_F32 = 0, CK_UNIT_BF16 = 1, CK_UNIT_INT8 = 2 };
// Multiplies and adds without touching memory. Returns how many operations (a product and a sum are two); CK_ERR_ISA: the
// instruction set has no such unit.
CK_API int64_t ck_roofline_compute(int32_t unit, int64_t rounds, int32_t n_threads);

// ---- what a decoder block does with one token between its products ------------------------------------------------------
// In the dtype of the model, rounded where torch rounds between operations. Contiguous; out may be an input.

// out = weight * (x / sqrt(mean(x^2) + eps))
CK_API int ck_token_norm(const void* x, const void* weight, void* out, int32_t dtype, int64_t n, float eps);
// out = gate / (1 + e^-gate) * up
CK_API int ck_token_gated(const void* gate, const void* up, void* out, int32_t dtype, int64_t n);
// qkv [heads + 2 key_heads][head]. Queries are turned where they lie, keys into keys[i * key_stride], values are copied.
// Turning, by cos and sin [head]: x cos + (-second half of x, first half) sin.
CK_API int ck_token_turn(void* qkv, const void* cos, const void* sin, int32_t dtype, int64_t heads, int64_t key_heads,
                         int64_t head, void* keys, void* values, int64_t key_stride, int64_t value_stride);

// ---- weights as they are stored, row by row --------------------------------------------------------------------------
// Floats without packing: all of a row, or those of its places that are kept. For few tokens: a row is read once for four.

enum { CK_ROWS_DENSE = 0, CK_ROWS_BITS = 1, CK_ROWS_PAIRS = 2 };

typedef struct {
  int32_t kind;           // CK_ROWS_BITS: a bit per column; CK_ROWS_PAIRS: of four columns two, two bits for each place
  int32_t dtype;          // of the values
  int64_t out_features, in_features;
  const void* values;     // row by row, without gaps
  int64_t n_values;
  int64_t per_row;        // values of each row; 0: as many as bits are set (what is beyond n_values counts as zero)
  const uint32_t* places; // [out][places_stride]
  int64_t places_stride;  // words
} ck_rows;

CK_API int64_t ck_rows_workspace(int64_t in_features, int64_t tokens);  // bytes

// out[t, o] (+)= sum_i x[t, i] weight[o, i] + bias[o], added in float32; `add`: to what is in out.
CK_API int ck_rows_linear(const ck_rows* rows, const void* x, int32_t x_dtype, int64_t tokens, int64_t x_stride,
                          const void* bias, int32_t bias_dtype, void* out, int32_t out_dtype, int64_t out_stride,
                          int32_t add, void* workspace, int64_t workspace_bytes, int32_t n_threads);

// The weight itself, [out][out_stride].
CK_API int ck_rows_dense(const ck_rows* rows, void* out, int32_t out_dtype, int64_t out_stride, int32_t n_threads);

// ---- weights from tables ---------------------------------------------------------------------------------------------
// Codes of 2 to 4 bits as they are stored, and the values that they stand for. For few tokens: a row is read once for four.

typedef struct {
  int32_t bits;
  int32_t dtype;          // of table and scale
  int64_t out_features, in_features;
  int64_t group_size;     // with scales: a multiple of 16 that divides in_features, or in_features
  const void* codes;      // [out][row_bytes], a stream of bits per row, low bits first
  int64_t row_bytes;
  const void* table;      // [2^bits]; [out][2^bits] where scale is NULL
  const void* scale;      // [out][in_features / group_size] or NULL; a weight is table[code] * scale, rounded to dtype
} ck_lut;

CK_API int64_t ck_lut_workspace(int64_t in_features, int64_t tokens);  // bytes

// out[t, o] = sum_i x[t, i] weight[o, i] + bias[o], added in float32.
CK_API int ck_lut_linear(const ck_lut* lut, const void* x, int32_t x_dtype, int64_t tokens, int64_t x_stride,
                         const void* bias, int32_t bias_dtype, void* out, int32_t out_dtype, int64_t out_stride,
                         void* workspace, int64_t workspace_bytes, int32_t n_threads);

// The weight itself, [out][out_stride].
CK_API int ck_lut_dense(const ck_lut* lut, void* out, int32_t out_dtype, int64_t out_stride, int32_t n_threads);

#ifdef __cplusplus
}
#endif
#endif
