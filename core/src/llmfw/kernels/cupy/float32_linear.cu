// float32_linear: y = x weight^T + bias in float32 for x of 16 bits and few outputs, such as a router's.
//
// Shapes: x [rows, IN], weight float32 [outputs, IN], bias float32 [outputs] or null, y float32 [rows, outputs];
//   contiguous, 16-byte aligned, IN a multiple of a 16-byte pack of x.
// Launch: block WARPS * 32, grid (ceil(rows / ROWS), ceil(outputs / OUTPUTS)). A block makes ROWS x OUTPUTS results; its
//   warps share the summed dimension, a stretch of 32 packs at a time.
// Numbers: float32 products and sums, which need no order of blocks: results are equal in every run.
#include "common.cuh"

#ifndef IN
#define IN 2048
#endif
#ifndef ROWS
#define ROWS 8
#endif
#ifndef OUTPUTS
#define OUTPUTS 4
#endif

constexpr int WARPS = 8, R = ROWS, N = OUTPUTS, SUMS = R * N;
constexpr int STRETCH = 32 * VEC;                                    // values of one load of a warp
constexpr int TURNS = (IN + STRETCH * WARPS - 1) / (STRETCH * WARPS);  // loads of a warp in each row
constexpr int AT_ONCE = SUMS < 8 ? SUMS : 8;                       // sums that a warp adds up together
static_assert(IN % VEC == 0, "a row is whole packs");

struct alignas(16) Weights {
  float at[VEC];
};

extern "C" __global__ void __launch_bounds__(WARPS * 32)
    float32_linear(float* y, const scalar* x, const float* weight, const float* bias, int rows, int outputs) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = blockIdx.x * R, output = blockIdx.y * N;
  const auto place = [&](int turn) { return (turn * WARPS + warp) * STRETCH + lane * VEC; };
  Weights w[N];
  const auto fetch = [&](int turn) {
    const int at = place(turn);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const float* source = weight + i64(min(output + n, outputs - 1)) * IN + at;
      uint4* to = reinterpret_cast<uint4*>(w + n);
#pragma unroll
      for (int i = 0; i < VEC / 4; ++i) to[i] = at < IN ? stream16(source + 4 * i) : make_uint4(0, 0, 0, 0);
    }
  };
  float sum[SUMS] = {};
  fetch(0);
  follow();
#pragma unroll 1
  for (int turn = 0;;) {
    const int at = place(turn);
    if (at < IN) {
      Pack<VEC> v[R];
#pragma unroll
      for (int r = 0; r < R; ++r) v[r] = load<VEC>(x + i64(min(row + r, rows - 1)) * IN + at);
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
          const float value = to_float(v[r].at[j]);
#pragma unroll
          for (int n = 0; n < N; ++n) sum[r * N + n] += value * w[n].at[j];
        }
    }
    if (++turn >= TURNS) break;
    fetch(turn);
  }

  __shared__ float parts[WARPS][SUMS];
#pragma unroll
  for (int begin = 0; begin < SUMS; begin += AT_ONCE) {
    float own[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) own[i] = sum[begin + i];
    Summed<AT_ONCE, 32>(own).each([&](int i, float total) { parts[warp][begin + i] = total; });
  }
  __syncthreads();
  for (int item = threadIdx.x; item < SUMS; item += WARPS * 32) {
    const int own_row = row + item / N, own_output = output + item % N;
    if (own_row >= rows || own_output >= outputs) continue;
    float total = bias ? bias[own_output] : 0.0f;
#pragma unroll
    for (int i = 0; i < WARPS; ++i) total += parts[i][item];
    y[i64(own_row) * outputs + own_output] = total;
  }
}
