// linear and gated_linear for 1 to 4 rows: y = x weight^T + bias, streaming the weight once at the speed of memory.
//
// Shapes: x [ROWS, IN], weight [outputs, IN], bias [outputs] or null, y [ROWS, outputs]; contiguous, 16-byte aligned,
//   IN a multiple of a 16-byte pack. GATED: weight [2 * outputs, IN] = gate | up, bias alike, y = silu(gate) * up.
// Launch: block WARPS * 32, grid ceil(outputs / (R * WARPS / KW)). A warp serves R outputs: R rows of the weight, or
//   R pairs of rows; KW warps share them, each with every KW-th stretch of 32 packs; U packs of each row are in
//   flight a lane. The best R, KW, U differs by shape: tune.py chooses.
// Numbers: float32 products and sums; GATED rounds where the references of linear and silu_and_mul round.
#include "common.cuh"

#ifndef IN
#define IN 4096
#endif
#ifndef ROWS
#define ROWS 1
#endif
#ifndef GATED
#define GATED 0
#endif
#ifndef OUTPUTS
#define OUTPUTS 2
#endif
#ifndef SHARERS
#define SHARERS 8
#endif
#ifndef IN_FLIGHT
#define IN_FLIGHT 2
#endif

constexpr int WARPS = 8, R = OUTPUTS, KW = SHARERS, U = IN_FLIGHT;

extern "C" __global__ void __launch_bounds__(WARPS * 32)
    gemv(scalar* y, const scalar* x, const scalar* weight, const scalar* bias, int outputs) {
  constexpr int STRETCH = 32 * VEC;                                // values of one load of a warp
  constexpr int TURNS = (IN + STRETCH * KW - 1) / (STRETCH * KW);  // loads of a warp in each row
  constexpr int TEAMS = WARPS / KW;                                // groups of KW warps in the block
  constexpr int READ = GATED ? 2 * R : R;                          // rows of the weight that a warp reads
  constexpr bool WHOLE = IN % (STRETCH * KW * U) == 0;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = warp % KW, team = warp / KW;
  const int first = (blockIdx.x * TEAMS + team) * R;
  const scalar* source[READ];
#pragma unroll
  for (int r = 0; r < READ; ++r)
    source[r] = weight + (i64(min(first + r % R, outputs - 1)) + (r < R ? 0 : outputs)) * IN;

  uint4 w[U][READ];
  const auto fetch = [&](int turn) {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int at = ((turn + u) * KW + part) * STRETCH + lane * VEC;
#pragma unroll
      for (int r = 0; r < READ; ++r) w[u][r] = WHOLE || at < IN ? stream16(source[r] + at) : make_uint4(0, 0, 0, 0);
    }
  };
  float sum[READ][ROWS] = {};
  fetch(0);
  follow();
#pragma unroll 1
  for (int turn = 0;;) {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int at = ((turn + u) * KW + part) * STRETCH + lane * VEC;
      if (!(WHOLE || at < IN)) break;
#pragma unroll
      for (int m = 0; m < ROWS; ++m) {
        const Pack<VEC> v = load<VEC>(x + m * IN + at);
#pragma unroll
        for (int r = 0; r < READ; ++r) {
          const Pack<VEC> z = *reinterpret_cast<const Pack<VEC>*>(&w[u][r]);
#pragma unroll
          for (int j = 0; j < VEC; ++j) sum[r][m] += to_float(z.at[j]) * to_float(v.at[j]);
        }
      }
    }
    turn += U;
    if (turn >= TURNS) break;
    fetch(turn);
  }

#pragma unroll
  for (int r = 0; r < READ; ++r)
#pragma unroll
    for (int m = 0; m < ROWS; ++m) sum[r][m] = warp_sum(sum[r][m]);

  // The output from its sum, or from the sums of gate and up.
  const auto finish = [&](int output, float gate, float up) {
    if (bias) gate += to_float(bias[output]);
    if (!GATED) return from_float(gate);
    if (bias) up += to_float(bias[outputs + output]);
    return from_float(rounded(silu(rounded(gate))) * rounded(up));
  };
  constexpr int UP = GATED ? R * ROWS : 0;  // from a gate's sum to its up's
  __shared__ float parts[WARPS][READ * ROWS];
  if constexpr (KW > 1) {
    if (lane == 0)
#pragma unroll
      for (int r = 0; r < READ; ++r)
#pragma unroll
        for (int m = 0; m < ROWS; ++m) parts[warp][r * ROWS + m] = sum[r][m];
    __syncthreads();
    for (int item = threadIdx.x; item < TEAMS * R * ROWS; item += WARPS * 32) {
      const int their_team = item / (R * ROWS), value = item % (R * ROWS), m = value % ROWS;
      const int output = (blockIdx.x * TEAMS + their_team) * R + value / ROWS;
      float gate = 0, up = 0;
#pragma unroll
      for (int i = 0; i < KW; ++i) {
        gate += parts[their_team * KW + i][value];
        if (GATED) up += parts[their_team * KW + i][value + UP];
      }
      if (output < outputs) y[i64(m) * outputs + output] = finish(output, gate, up);
    }
  } else {
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int m = 0; m < ROWS; ++m)
        if (lane == r * ROWS + m && first + r < outputs)
          y[i64(m) * outputs + first + r] = finish(first + r, sum[r][m], sum[r + (GATED ? R : 0)][m]);
  }
}
