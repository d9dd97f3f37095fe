// linear for 1 to 64 rows on tensor cores: y = x weight^T + bias, the weight streamed once, 16-bit types.
//
// Shapes: x [rows, IN], weight [outputs, IN], bias [outputs] or null, y [rows, outputs]; contiguous, 16-byte aligned,
//   IN a multiple of 64, rows at most ROWS.
// Launch: block WARPS * 32, grid ceil(outputs / (16 T * WARPS / KW)). A warp serves 16 T rows of the weight (the
//   first operand of mma) and all rows of x (the second, 8 a tile); KW warps share them, each with every KW-th
//   stretch of 64 values, and meet in shared memory.
// Numbers: float32 sums on tensor cores.
//
// Operands go from memory to registers: a lane's 16 bytes of a row hold what it needs for two mma steps when both
// operands are read in the same order of the summed dimension.
#include "common.cuh"

#ifndef IN
#define IN 4096
#endif
#ifndef ROWS
#define ROWS 8
#endif

#ifndef WEIGHT_TILES
#define WEIGHT_TILES 1
#endif
#ifndef SHARERS
#define SHARERS 8
#endif

#if DTYPE != F32

constexpr int WARPS = 8, T = WEIGHT_TILES, KW = SHARERS;
constexpr int TILES = ROWS / 8;  // mma tiles over the rows of x
static_assert(IN % 64 == 0 && ROWS % 8 == 0, "whole stretches and tiles");

// The weight's part of one stretch of 64 values: [16-row tile][row g, row g + 8][16-byte load].
struct Stretch {
  uint4 at[T][2][2];
};

__device__ __forceinline__ void fetch(Stretch& w, const scalar* const (&source)[T][2], int k) {
#pragma unroll
  for (int t = 0; t < T; ++t)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int j = 0; j < 2; ++j) w.at[t][half][j] = stream16(source[t][half] + k + 32 * j);
}

extern "C" __global__ void __launch_bounds__(WARPS * 32)
    skinny(scalar* y, const scalar* x, const scalar* weight, const scalar* bias, int outputs, int rows) {
  constexpr int TEAMS = WARPS / KW;
  constexpr int TURNS = IN / 64;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = warp % KW, team = warp / KW;
  const int g = lane / 4, c = lane % 4;
  const int first = (blockIdx.x * TEAMS + team) * 16 * T;
  const scalar* source[T][2];
#pragma unroll
  for (int t = 0; t < T; ++t)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      source[t][half] = weight + i64(min(first + t * 16 + half * 8 + g, outputs - 1)) * IN + 8 * c;
  const scalar* operand[TILES];  // a row beyond the last repeats it: its results are not stored
#pragma unroll
  for (int n = 0; n < TILES; ++n) operand[n] = x + i64(min(n * 8 + g, rows - 1)) * IN + 8 * c;

  float sum[T][TILES][4] = {};
  Stretch w, next;
  if (part < TURNS) fetch(w, source, part * 64);
  follow();
  for (int turn = part; turn < TURNS; turn += KW) {
    if (turn + KW < TURNS) fetch(next, source, (turn + KW) * 64);
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int n = 0; n < TILES; ++n) {
        const uint4 b = *reinterpret_cast<const uint4*>(operand[n] + turn * 64 + 32 * j);
#pragma unroll
        for (int t = 0; t < T; ++t) {
          float(&d)[4] = sum[t][n];
          const uint4 low = w.at[t][0][j], high = w.at[t][1][j];
          mma(d[0], d[1], d[2], d[3], low.x, high.x, low.y, high.y, b.x, b.y);
          mma(d[0], d[1], d[2], d[3], low.z, high.z, low.w, high.w, b.z, b.w);
        }
      }
    w = next;
  }

  // Lane 4g + c holds outputs g and g + 8 of rows 8 n + 2 c and 2 c + 1.
  constexpr int PITCH = 16 * T + 1;
  __shared__ float parts[WARPS][8 * PITCH];
#pragma unroll
  for (int n = 0; n < TILES; ++n) {
    if (n) __syncthreads();
#pragma unroll
    for (int t = 0; t < T; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i) parts[warp][(2 * c + i % 2) * PITCH + t * 16 + i / 2 * 8 + g] = sum[t][n][i];
    __syncthreads();
    for (int item = threadIdx.x; item < TEAMS * 8 * 16 * T; item += WARPS * 32) {
      const int column = item % (TEAMS * 16 * T), row = item / (TEAMS * 16 * T);
      const int their_team = column / (16 * T), value = column % (16 * T);
      const int output = blockIdx.x * TEAMS * 16 * T + column;
      if (n * 8 + row >= rows || output >= outputs) continue;
      float total = bias ? to_float(bias[output]) : 0.0f;
#pragma unroll
      for (int i = 0; i < KW; ++i) total += parts[their_team * KW + i][row * PITCH + value];
      y[i64(n * 8 + row) * outputs + output] = from_float(total);
    }
  }
}

#endif
