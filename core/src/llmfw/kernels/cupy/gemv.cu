// linear for 1 to 4 rows: y = x weight^T + bias, streaming the weight once at the speed of memory.
//
// Shapes: x [ROWS, IN], weight [outputs, IN], bias [outputs] or null, y [ROWS, outputs]; contiguous, 16-byte aligned,
//   IN a multiple of a 16-byte pack.
// Launch: block WARPS * 32, grid ceil(outputs / (R * WARPS / KW)). A warp serves R rows of the weight; KW warps share
//   them, each with every KW-th stretch of 32 packs; U packs of each row are in flight a lane. The best R, KW, U
//   differs by shape: tune.py chooses among the VARIANTS below.
// Numbers: float32 products and sums.
#include "common.cuh"

#ifndef IN
#define IN 4096
#endif
#ifndef ROWS
#define ROWS 1
#endif

constexpr int WARPS = 8;

template <int R, int KW, int U>
__device__ __forceinline__ void gemv(scalar* y, const scalar* x, const scalar* weight, const scalar* bias,
                                     int outputs) {
  constexpr int STRETCH = 32 * VEC;                                // values of one load of a warp
  constexpr int TURNS = (IN + STRETCH * KW - 1) / (STRETCH * KW);  // loads of a warp in each row
  constexpr int TEAMS = WARPS / KW;                                // groups of KW warps in the block
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = warp % KW, team = warp / KW;
  const int first = (blockIdx.x * TEAMS + team) * R;
  const scalar* source[R];
#pragma unroll
  for (int r = 0; r < R; ++r) source[r] = weight + i64(min(first + r, outputs - 1)) * IN;

  float sum[R][ROWS] = {};
#pragma unroll 1
  for (int turn = 0; turn < TURNS; turn += U) {
    uint4 w[U][R];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int at = ((turn + u) * KW + part) * STRETCH + lane * VEC;
      const bool inside = (IN % (STRETCH * KW * U) == 0) || at < IN;
#pragma unroll
      for (int r = 0; r < R; ++r) w[u][r] = inside ? stream16(source[r] + at) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int at = ((turn + u) * KW + part) * STRETCH + lane * VEC;
      if (!(IN % (STRETCH * KW * U) == 0 || at < IN)) break;
#pragma unroll
      for (int m = 0; m < ROWS; ++m) {
        const Pack<VEC> v = load<VEC>(x + m * IN + at);
#pragma unroll
        for (int r = 0; r < R; ++r) {
          const Pack<VEC> z = *reinterpret_cast<const Pack<VEC>*>(&w[u][r]);
#pragma unroll
          for (int j = 0; j < VEC; ++j) sum[r][m] += to_float(z.at[j]) * to_float(v.at[j]);
        }
      }
    }
  }

#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int m = 0; m < ROWS; ++m) sum[r][m] = warp_sum(sum[r][m]);

  __shared__ float parts[WARPS][R * ROWS];
  if constexpr (KW > 1) {
    if (lane == 0)
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int m = 0; m < ROWS; ++m) parts[warp][r * ROWS + m] = sum[r][m];
    __syncthreads();
    for (int item = threadIdx.x; item < TEAMS * R * ROWS; item += WARPS * 32) {
      const int their_team = item / (R * ROWS), value = item % (R * ROWS), m = value % ROWS;
      const int output = (blockIdx.x * TEAMS + their_team) * R + value / ROWS;
      float total = 0;
#pragma unroll
      for (int i = 0; i < KW; ++i) total += parts[their_team * KW + i][value];
      if (output < outputs) y[i64(m) * outputs + output] = from_float(bias ? total + to_float(bias[output]) : total);
    }
  } else {
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int m = 0; m < ROWS; ++m)
        if (lane == r * ROWS + m && first + r < outputs) {
          const float total = bias ? sum[r][m] + to_float(bias[first + r]) : sum[r][m];
          y[i64(m) * outputs + first + r] = from_float(total);
        }
  }
}

#define VARIANT(R, KW, U)                                                                                    \
  extern "C" __global__ void __launch_bounds__(WARPS * 32)                                                   \
      gemv_r##R##_k##KW##_u##U(scalar* y, const scalar* x, const scalar* weight, const scalar* bias, int outputs) { \
    gemv<R, KW, U>(y, x, weight, bias, outputs);                                                             \
  }

VARIANT(1, 1, 4)
VARIANT(1, 2, 2)
VARIANT(1, 2, 4)
VARIANT(1, 4, 2)
VARIANT(1, 4, 4)
VARIANT(1, 8, 2)
VARIANT(2, 1, 2)
VARIANT(2, 1, 4)
VARIANT(2, 2, 2)
VARIANT(2, 4, 2)
VARIANT(2, 4, 4)
VARIANT(2, 8, 2)
VARIANT(4, 2, 2)
VARIANT(4, 8, 1)
