// out = x H, or x H^T: rows of blocks, H_block = H_K1 (x) H_K2 (x) ... (x) H_2^log2, entries +-1/sqrt(block).
//
// x [rows][n_blocks * block], 16-bit floats; float32 inside. A thread block takes one block of one row into shared memory
// and transforms axis after axis in place: the power of two by butterflies, 3 stages at a time in registers; a core K by a
// warp per column, its K values in registers. A core's signs come as bits (compress_cuda.h); H^T takes their transpose.
// Bound by bytes for powers of two (4 per input), by shuffles for large cores. Speed: not measured, no GPU yet.

#include "convert.h"
#include "launch.h"

constexpr int HADAMARD_THREADS = 512;
constexpr int MAX_CORES = 4, MAX_CORE = 256;

struct Hadamard {
  const uint16_t* x;
  uint16_t* out;
  const uint32_t* signs;
  int64_t x_stride, out_stride;
  int32_t block, log2, n_cores;
  int32_t orders[MAX_CORES];
  int32_t signs_words;
  bool transposed;
  float scale;
};

// Stages of distance `step`, 2 step, ... of the Sylvester matrix: 2^LOG inputs per thread in registers.
template <int LOG>
CC_DEVICE void butterflies(float* values, int n, int step) {
  constexpr int SIZE = 1 << LOG;
  for (int i = threadIdx.x; i < n / SIZE; i += HADAMARD_THREADS) {
    float* at = values + i / step * step * SIZE + i % step;
    float v[SIZE];
#pragma unroll
    for (int j = 0; j < SIZE; ++j) v[j] = at[j * step];
#pragma unroll
    for (int bit = 1; bit < SIZE; bit *= 2)
#pragma unroll
      for (int j = 0; j < SIZE; ++j)
        if (!(j & bit)) {
          const float a = v[j], b = v[j | bit];
          v[j] = a + b, v[j | bit] = a - b;
        }
#pragma unroll
    for (int j = 0; j < SIZE; ++j) at[j * step] = v[j];
  }
}

// An axis of `order` values that lie `behind` apart, by a matrix of signs: out[j] = sum_k v[k] sign[k, j].
template <int PER_LANE>
CC_DEVICE void core_axis(float* values, int n, int behind, int order, const uint32_t* signs, bool transposed) {
  constexpr int WARPS = HADAMARD_THREADS / LANES;
  const int lane = threadIdx.x % LANES, words = (order + 31) / 32;
  for (int column = threadIdx.x / LANES; column < n / order; column += WARPS) {
    float* at = values + int64_t(column / behind) * behind * order + column % behind;
    float v[PER_LANE], sum[PER_LANE];
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
      const int j = i * LANES + lane;
      v[i] = j < order ? at[j * behind] : 0.0f;
      sum[i] = 0.0f;
    }
#pragma unroll
    for (int part = 0; part < PER_LANE; ++part) {
      const int end = min(order - part * LANES, LANES);  // not above 0 behind the last value
      for (int from = 0; from < end; ++from) {
        const int k = part * LANES + from;
        const float value = from_lane(v[part], from);
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i) {
          const int j = i * LANES + lane;
          if (j < order) {
            const uint32_t word = transposed ? signs[j * words + k / 32] >> k % 32 : signs[k * words + i] >> lane;
            sum[i] += word & 1 ? -value : value;
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
      const int j = i * LANES + lane;
      if (j < order) at[j * behind] = sum[i];
    }
  }
}

template <class T>
__global__ void __launch_bounds__(HADAMARD_THREADS, 1) hadamard_kernel(Hadamard a) {
  CC_SHARED(shared);
  float* values = reinterpret_cast<float*>(shared);
  const int64_t first = int64_t(blockIdx.y) * a.block;
  const uint16_t* x = a.x + int64_t(blockIdx.x) * a.x_stride + first;
  uint16_t* out = a.out + int64_t(blockIdx.x) * a.out_stride + first;
  for (int i = threadIdx.x; i < a.block; i += HADAMARD_THREADS) values[i] = float_of_half<T>(x[i]);
  block_barrier();
  int done = 0;
  for (; done + 3 <= a.log2; done += 3) {
    butterflies<3>(values, a.block, 1 << done);
    block_barrier();
  }
  if (a.log2 - done == 2) butterflies<2>(values, a.block, 1 << done);
  if (a.log2 - done == 1) butterflies<1>(values, a.block, 1 << done);
  block_barrier();
  int behind = 1 << a.log2;
  const uint32_t* end = a.signs + a.signs_words;
#pragma unroll
  for (int i = MAX_CORES - 1; i >= 0; --i) {
    if (i >= a.n_cores) continue;
    end -= a.orders[i] * ((a.orders[i] + 31) / 32);
    if (a.orders[i] <= 2 * LANES) core_axis<2>(values, a.block, behind, a.orders[i], end, a.transposed);
    else core_axis<MAX_CORE / LANES>(values, a.block, behind, a.orders[i], end, a.transposed);
    behind *= a.orders[i];
    block_barrier();
  }
  for (int i = threadIdx.x; i < a.block; i += HADAMARD_THREADS) out[i] = half_of_float<T>(values[i] * a.scale);
}

static int largest_shared(int* bytes) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return error == cudaSuccess ? CC_OK : failed(error);
}

extern "C" int64_t cc_hadamard_largest(void) {
  int bytes = 0;
  return largest_shared(&bytes) ? 0 : bytes / int(sizeof(float));
}

template <class T>
static int hadamard(const Hadamard& a, int64_t rows, int64_t n_blocks, void* stream) {
  static uint64_t allowed = 0;
  int largest = 0;
  if (int error = largest_shared(&largest)) return error;
  if (int error = allow_shared(hadamard_kernel<T>, largest, &allowed)) return error;
  CC_LAUNCH(hadamard_kernel<T>, dim3(unsigned(rows), unsigned(n_blocks)), dim3(HADAMARD_THREADS),
            a.block * int(sizeof(float)), static_cast<cudaStream_t>(stream), a);
  return int(cudaGetLastError());
}

extern "C" int cc_hadamard(const void* x, int64_t x_stride, void* out, int64_t out_stride, int64_t rows, int64_t n_blocks,
                           int32_t log2, int32_t n_cores, const int32_t* orders, const void* signs, int32_t transposed,
                           int32_t dtype, void* stream) {
  if (!x || !out || (n_cores > 0 && (!orders || !signs))) return CC_ERR_NULL;
  if (dtype != CC_F16 && dtype != CC_BF16) return CC_ERR_DTYPE;
  if (log2 < 0 || log2 > 20 || n_cores < 0 || n_cores > MAX_CORES || n_blocks < 1 || n_blocks > 65535) return CC_ERR_SHAPE;
  if (rows < 0 || rows > INT32_MAX) return CC_ERR_TOKENS;
  Hadamard a = {};
  int64_t block = int64_t(1) << log2;
  for (int i = 0; i < n_cores; ++i) {
    if (orders[i] < 2 || orders[i] > MAX_CORE) return CC_ERR_SHAPE;
    a.orders[i] = orders[i];
    a.signs_words += orders[i] * ((orders[i] + 31) / 32);
    block *= orders[i];
    if (block > cc_hadamard_largest()) return CC_ERR_SHAPE;
  }
  if (block > cc_hadamard_largest()) return CC_ERR_SHAPE;
  if (x_stride < n_blocks * block || out_stride < n_blocks * block) return CC_ERR_STRIDE;
  if (rows == 0) return CC_OK;
  a.x = static_cast<const uint16_t*>(x);
  a.out = static_cast<uint16_t*>(out);
  a.signs = static_cast<const uint32_t*>(signs);
  a.x_stride = x_stride;
  a.out_stride = out_stride;
  a.block = int32_t(block);
  a.log2 = log2;
  a.n_cores = n_cores;
  a.transposed = transposed != 0;
  a.scale = 1.0f / sqrtf(float(block));
  return dtype == CC_F16 ? hadamard<F16>(a, rows, n_blocks, stream) : hadamard<BF16>(a, rows, n_blocks, stream);
}
