// rms_norm, add_rms_norm, layer_norm and gated_rms_norm over rows of HIDDEN values (references of the same names).
//
// Shapes: x, residual, out [rows, HIDDEN] contiguous, weight, bias [HIDDEN]; 16-byte aligned, HIDDEN a multiple
//   of a 16-byte pack. add_rms_norm writes the normalised sum over x and the sum over residual, add_rms_norm_wide to a
//   residual in float32. gated_rms_norm: x, out [tokens, groups, HIDDEN], gate the same with tokens gate_stride apart,
//   weight [groups, HIDDEN]; a row is one group of one token.
// Launch: block (THREADS, ROWS), grid ceil(rows / ROWS). THREADS lanes hold one row in registers; ROWS > 1 only
//   with THREADS == 32, where a warp needs no shared memory.
// Numbers: statistics in float32; roundings where the reference rounds.
#include "common.cuh"

#ifndef HIDDEN
#define HIDDEN 4096
#endif
#ifndef THREADS
#define THREADS 256
#endif
#ifndef ROWS
#define ROWS 1
#endif

constexpr int PACKS = HIDDEN / VEC;
constexpr int PER_LANE = (PACKS + THREADS - 1) / THREADS;
static_assert(HIDDEN % VEC == 0, "a row is whole packs");
static_assert(THREADS % 32 == 0 && (ROWS == 1 || THREADS == 32), "one row a block, or one row a warp");

// Sum of x over the THREADS lanes of this row.
__device__ __forceinline__ float row_sum(float x) {
  x = warp_sum(x);
  if (THREADS == 32) return x;
  __shared__ float parts[THREADS / 32];
  __syncthreads();  // the last use of parts is over
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0;
#pragma unroll
  for (int i = 0; i < THREADS / 32; ++i) sum += parts[i];
  return sum;
}

// x[row] * weight after normalisation, written to out; values holds the row's packs of this lane.
__device__ __forceinline__ void write_rms(scalar* out, const float (&values)[PER_LANE][VEC],
                                          const Pack<VEC> (&weights)[PER_LANE], i64 row, float eps, float offset) {
  float squares = 0;
#pragma unroll
  for (int i = 0; i < PER_LANE; ++i)
#pragma unroll
    for (int j = 0; j < VEC; ++j) squares += values[i][j] * values[i][j];
  const float scale = rsqrtf(row_sum(squares) * (1.0f / HIDDEN) + eps);
#pragma unroll
  for (int i = 0; i < PER_LANE; ++i) {
    const int pack = threadIdx.x + i * THREADS;
    if (pack >= PACKS) continue;
    const Pack<VEC> w = weights[i];
    Pack<VEC> y;
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
      const float normed = values[i][j] * scale;
      y.at[j] = from_float(offset != 0 ? normed * (offset + to_float(w.at[j])) : rounded(normed) * to_float(w.at[j]));
    }
    store<VEC>(out + row * HIDDEN + pack * VEC, y);
  }
}

// This lane's packs of the weight; read before the kernel follows the one before it.
__device__ __forceinline__ void read_weight(Pack<VEC> (&weights)[PER_LANE], const scalar* weight) {
#pragma unroll
  for (int i = 0; i < PER_LANE; ++i)
    if (int(threadIdx.x) + i * THREADS < PACKS) weights[i] = load<VEC>(weight + (threadIdx.x + i * THREADS) * VEC);
}

extern "C" __global__ void __launch_bounds__(THREADS* ROWS)
    rms_norm(scalar* out, const scalar* x, const scalar* weight, int rows, float eps, float offset) {
  Pack<VEC> weights[PER_LANE];
  read_weight(weights, weight);
  follow_briefly();
  const i64 row = i64(blockIdx.x) * ROWS + threadIdx.y;
  if (row >= rows) return;
  float values[PER_LANE][VEC] = {};
#pragma unroll
  for (int i = 0; i < PER_LANE; ++i) {
    const int pack = threadIdx.x + i * THREADS;
    if (pack >= PACKS) continue;
    const Pack<VEC> a = load<VEC>(x + row * HIDDEN + pack * VEC);
#pragma unroll
    for (int j = 0; j < VEC; ++j) values[i][j] = to_float(a.at[j]);
  }
  write_rms(out, values, weights, row, eps, offset);
}

// Numbers of a residual of the kernel's own dtype, or in float32.
template <class T>
struct alignas(16) Several {
  T at[VEC];
};
__device__ __forceinline__ float widened(float x) { return x; }
__device__ __forceinline__ void narrow(float& to, float from) { to = from; }
#if DTYPE != F32
__device__ __forceinline__ float widened(scalar x) { return to_float(x); }
__device__ __forceinline__ void narrow(scalar& to, float from) { to = from_float(from); }
#endif

template <class T>
__device__ __forceinline__ void add_norm(scalar* x, T* residual, const scalar* weight, int rows, float eps,
                                         float offset) {
  Pack<VEC> weights[PER_LANE];
  read_weight(weights, weight);
  follow_briefly();
  const i64 row = i64(blockIdx.x) * ROWS + threadIdx.y;
  if (row >= rows) return;
  float values[PER_LANE][VEC] = {};
#pragma unroll
  for (int i = 0; i < PER_LANE; ++i) {
    const int pack = threadIdx.x + i * THREADS;
    if (pack >= PACKS) continue;
    const Pack<VEC> a = load<VEC>(x + row * HIDDEN + pack * VEC);
    Several<T>& sum = *reinterpret_cast<Several<T>*>(residual + row * HIDDEN + pack * VEC);
    Several<T> total = sum;
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
      narrow(total.at[j], to_float(a.at[j]) + widened(total.at[j]));
      values[i][j] = rounded(widened(total.at[j]));
    }
    sum = total;
  }
  write_rms(x, values, weights, row, eps, offset);
}

extern "C" __global__ void __launch_bounds__(THREADS* ROWS)
    add_rms_norm(scalar* x, scalar* residual, const scalar* weight, int rows, float eps, float offset) {
  add_norm(x, residual, weight, rows, eps, offset);
}

extern "C" __global__ void __launch_bounds__(THREADS* ROWS)
    add_rms_norm_wide(scalar* x, float* residual, const scalar* weight, int rows, float eps, float offset) {
  add_norm(x, residual, weight, rows, eps, offset);
}

extern "C" __global__ void __launch_bounds__(THREADS* ROWS)
    gated_rms_norm(scalar* out, const scalar* x, const scalar* gate, const scalar* weight, int rows, float eps,
                   i64 gate_stride, int groups) {
  const i64 row = i64(blockIdx.x) * ROWS + threadIdx.y;
  const i64 token = row / groups;
  const int group = int(row - token * groups);
  Pack<VEC> weights[PER_LANE];
  read_weight(weights, weight + i64(group) * HIDDEN);
  follow_briefly();
  if (row >= rows) return;
  float values[PER_LANE][VEC] = {};
#pragma unroll
  for (int i = 0; i < PER_LANE; ++i) {
    const int pack = threadIdx.x + i * THREADS;
    if (pack >= PACKS) continue;
    const Pack<VEC> a = load<VEC>(x + row * HIDDEN + pack * VEC);
    const Pack<VEC> b = load<VEC>(gate + token * gate_stride + group * HIDDEN + pack * VEC);
#pragma unroll
    for (int j = 0; j < VEC; ++j) values[i][j] = to_float(a.at[j]) * silu(to_float(b.at[j]));
  }
  write_rms(out, values, weights, row, eps, 0.0f);
}

// weight and bias may be null.
extern "C" __global__ void __launch_bounds__(THREADS* ROWS)
    layer_norm(scalar* out, const scalar* x, const scalar* weight, const scalar* bias, int rows, float eps) {
  follow_briefly();
  const i64 row = i64(blockIdx.x) * ROWS + threadIdx.y;
  if (row >= rows) return;
  float values[PER_LANE][VEC] = {};
  float sum = 0;
#pragma unroll
  for (int i = 0; i < PER_LANE; ++i) {
    const int pack = threadIdx.x + i * THREADS;
    if (pack >= PACKS) continue;
    const Pack<VEC> a = load<VEC>(x + row * HIDDEN + pack * VEC);
#pragma unroll
    for (int j = 0; j < VEC; ++j) sum += values[i][j] = to_float(a.at[j]);
  }
  const float mean = row_sum(sum) * (1.0f / HIDDEN);
  float squares = 0;
#pragma unroll
  for (int i = 0; i < PER_LANE; ++i) {
    if (threadIdx.x + i * THREADS >= PACKS) continue;
#pragma unroll
    for (int j = 0; j < VEC; ++j) squares += (values[i][j] - mean) * (values[i][j] - mean);
  }
  const float scale = rsqrtf(row_sum(squares) * (1.0f / HIDDEN) + eps);
#pragma unroll
  for (int i = 0; i < PER_LANE; ++i) {
    const int pack = threadIdx.x + i * THREADS;
    if (pack >= PACKS) continue;
    Pack<VEC> w, b, y;
    if (weight) w = load<VEC>(weight + pack * VEC);
    if (bias) b = load<VEC>(bias + pack * VEC);
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
      float value = (values[i][j] - mean) * scale;
      if (weight) value *= to_float(w.at[j]);
      if (bias) value += to_float(b.at[j]);
      y.at[j] = from_float(value);
    }
    store<VEC>(out + row * HIDDEN + pack * VEC, y);
  }
}
