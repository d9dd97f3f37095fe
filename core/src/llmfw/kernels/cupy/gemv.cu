// linear and gated_linear for 1 to 4 rows: y = x weight^T + bias, streaming the weight once at the speed of memory.
//
// Shapes: x [ROWS, IN], weight [outputs, IN], bias [outputs] or null, y [ROWS, outputs]; contiguous, 16-byte aligned,
//   IN a multiple of a 16-byte pack. GATED: weight [2 * outputs, IN] = gate | up, bias alike, y = silu(gate) * up.
//   An RMS norm may be divided between two products of one row. ADDS (add_linear): residual [1, outputs] += x weight^T,
//   y = residual * (number + norm_weight [outputs]). NORMED (normed_linear): x is that y, residual [1, IN] what was added
//   to, and sums are divided by sqrt(mean(residual^2) + number) before the bias is added.
// Launch: block WARPS * 32, grid ceil(outputs / (R * WARPS / KW)). A warp serves R outputs: R rows of the weight, or
//   R pairs of rows; KW warps share them, each with every KW-th stretch of 32 packs; U packs of each row are in
//   flight a lane. The best R, KW, U differs by shape: tune.py chooses.
// Numbers: float32 products and sums; roundings where the references round.
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
#ifndef ADDS
#define ADDS 0
#endif
#ifndef NORMED
#define NORMED 0
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

static_assert(ROWS == 1 || !(ADDS || NORMED), "a norm is divided between products of one row");
constexpr int WARPS = 8, R = OUTPUTS, KW = SHARERS, U = IN_FLIGHT;

#if NORMED
// Adds the squares of 8 values: lane 4g + c brings some of row g, and of column g, of a product whose diagonal counts.
__device__ __forceinline__ void add_squares(float (&sums)[4], const uint4& values) {
  mma(sums[0], sums[1], sums[2], sums[3], values.x, 0, values.y, 0, values.x, values.y);
  mma(sums[0], sums[1], sums[2], sums[3], values.z, 0, values.w, 0, values.z, values.w);
}

// What of the diagonal this lane has: row g's is in columns 2c and 2c + 1.
__device__ __forceinline__ float own_square(const float (&sums)[4]) {
  const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  return c != g / 2 ? 0 : g % 2 ? sums[1] : sums[0];
}
#endif

// Blocks of few loads are over so soon that it counts how many are on a multiprocessor: as many as without a norm.
#if ADDS && OUTPUTS * IN_FLIGHT <= 2
#define BOUNDS __launch_bounds__(WARPS * 32, 8)
#else
#define BOUNDS __launch_bounds__(WARPS * 32)
#endif

extern "C" __global__ void BOUNDS
    gemv(scalar* y, const scalar* x, const scalar* weight, const scalar* bias, int outputs, scalar* residual,
         const scalar* norm_weight, float number) {
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

  // Which result this thread stores, if any: of a warp's sums, or of those that a team left in shared memory.
  const int value = KW > 1 ? threadIdx.x % (R * ROWS) : lane, of_team = KW > 1 ? threadIdx.x / (R * ROWS) : warp;
  const int row = value % ROWS, output = (blockIdx.x * TEAMS + of_team) * R + value / ROWS;
  const bool finishes = (KW > 1 ? of_team < TEAMS : value < R * ROWS) && output < outputs;
  const i64 place = i64(row) * outputs + output;
  static_assert(TEAMS * R * ROWS <= WARPS * 32 && R * ROWS <= 32, "a thread has one result at most");

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
#if NORMED
  float squares[4] = {};
#endif
  fetch(0);
  scalar factor = 0, before = 0;
  if (ADDS && finishes) factor = norm_weight[output];
  follow([&] {
    if (ADDS && finishes) before = residual[place];
  });
#pragma unroll 1
  for (int turn = 0;;) {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int at = ((turn + u) * KW + part) * STRETCH + lane * VEC;
#if NORMED
      uint4 values = make_uint4(0, 0, 0, 0);
      if ((TEAMS == 1 || (turn + u) % TEAMS == team) && (WHOLE || at < IN))  // of the teams one adds
        values = *reinterpret_cast<const uint4*>(residual + at);
      add_squares(squares, values);
#endif
      if (!(WHOLE || at < IN)) continue;
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

  __shared__ float parts[WARPS][READ * ROWS];
  if (KW > 1 && lane == 0)
#pragma unroll
    for (int r = 0; r < READ; ++r)
#pragma unroll
      for (int m = 0; m < ROWS; ++m) parts[warp][r * ROWS + m] = sum[r][m];
#if NORMED
  __shared__ float squares_of[WARPS];
  const float own = warp_sum(own_square(squares));
  if (lane == 0) squares_of[warp] = own;
#endif
  if (KW > 1 || NORMED) __syncthreads();
  if (!finishes) return;

  constexpr int UP = GATED ? R * ROWS : 0;  // from a gate's sum to its up's
  float gate = 0, up = 0;
  if (KW > 1) {
#pragma unroll
    for (int i = 0; i < KW; ++i) {
      gate += parts[of_team * KW + i][value];
      if (GATED) up += parts[of_team * KW + i][value + UP];
    }
  } else {
#pragma unroll
    for (int i = 0; i < R * ROWS; ++i)
      if (lane == i) gate = sum[i / ROWS][i % ROWS], up = sum[(i + UP) / ROWS][i % ROWS];
  }
#if NORMED
  float total = 0;
#pragma unroll
  for (int i = 0; i < WARPS; ++i) total += squares_of[i];
  const float scale = rsqrtf(total * (1.0f / IN) + number);
  gate *= scale, up *= scale;
#endif
  if (bias) {
    gate += to_float(bias[output]);
    if (GATED) up += to_float(bias[outputs + output]);
  }
  if (ADDS) {
    const float total = rounded(to_float(before) + rounded(gate));
    residual[place] = from_float(total);
    y[place] = from_float(total * (number + to_float(factor)));
  } else {
    y[place] = from_float(GATED ? rounded(silu(rounded(gate))) * rounded(up) : gate);
  }
}
