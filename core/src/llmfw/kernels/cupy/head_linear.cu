// head_linear for few tokens: each head's rows times its own weight on tensor cores, 16-bit types.
//
// Shapes: x [tokens, heads, IN], tokens x_token and heads x_head apart; weight [heads, OUT, IN], heads w_head apart;
//   y [tokens, heads, OUT], tokens y_token and heads y_head apart. IN a multiple of 32 * SHARERS, OUT of 16.
// Launch: block WARPS * 32, grid (ceil(OUT / (16 * WARPS / SHARERS)), heads, any number that shares the tokens). A warp
//   holds its part of 16 rows of the weight (the first operand of mma) in registers and walks the tokens, 8 at a time
//   (the second); SHARERS warps divide the summed dimension and meet in shared memory.
// Numbers: float32 sums on tensor cores.
#include "common.cuh"

#ifndef IN
#define IN 128
#endif
#ifndef OUT
#define OUT 512
#endif
#ifndef SHARERS
#define SHARERS 1
#endif
#define WARPS 4

#if DTYPE != F32

constexpr int TEAMS = WARPS / SHARERS;
constexpr int EACH = IN / SHARERS;  // of the summed dimension, for a warp
constexpr int LOADS = EACH / 32;    // of 16 bytes in a row, two mma steps each
constexpr int PITCH = 8 + 1;
static_assert(IN % (32 * SHARERS) == 0 && OUT % 16 == 0 && WARPS % SHARERS == 0, "whole loads and tiles");

extern "C" __global__ void __launch_bounds__(WARPS * 32)
    head_linear(scalar* y, const scalar* x, const scalar* weight, i64 x_token, i64 x_head, i64 w_head, i64 y_token,
                i64 y_head, int tokens) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, c = lane % 4;
  const int part = warp % SHARERS, first = (blockIdx.x * TEAMS + warp / SHARERS) * 16;
  const scalar* source = weight + blockIdx.y * w_head + i64(min(first + g, OUT - 1)) * IN + part * EACH + 8 * c;
  const scalar* other = weight + blockIdx.y * w_head + i64(min(first + g + 8, OUT - 1)) * IN + part * EACH + 8 * c;
  uint4 low[LOADS], high[LOADS];  // rows g and g + 8
#pragma unroll
  for (int j = 0; j < LOADS; ++j) {
    low[j] = stream16(source + 32 * j);
    high[j] = stream16(other + 32 * j);
  }
  follow();

  __shared__ float slab[WARPS][16 * PITCH];
  const scalar* operand = x + blockIdx.y * x_head + part * EACH + 8 * c;
  for (int token0 = blockIdx.z * 8; token0 < tokens; token0 += gridDim.z * 8) {
    const scalar* row = operand + min(token0 + g, tokens - 1) * x_token;
    float d[4] = {};
#pragma unroll
    for (int j = 0; j < LOADS; ++j) {
      const uint4 b = *reinterpret_cast<const uint4*>(row + 32 * j);
      mma(d[0], d[1], d[2], d[3], low[j].x, high[j].x, low[j].y, high[j].y, b.x, b.y);
      mma(d[0], d[1], d[2], d[3], low[j].z, high[j].z, low[j].w, high[j].w, b.z, b.w);
    }
    // Lane 4g + c holds outputs g and g + 8 of tokens 2c and 2c + 1.
    slab[warp][g * PITCH + 2 * c] = d[0];
    slab[warp][g * PITCH + 2 * c + 1] = d[1];
    slab[warp][(g + 8) * PITCH + 2 * c] = d[2];
    slab[warp][(g + 8) * PITCH + 2 * c + 1] = d[3];
    __syncthreads();
    for (int item = threadIdx.x; item < TEAMS * 16 * 8; item += WARPS * 32) {
      const int output = item % (TEAMS * 16), token = item / (TEAMS * 16);
      float total = 0;
#pragma unroll
      for (int i = 0; i < SHARERS; ++i)
        total += slab[output / 16 * SHARERS + i][output % 16 * PITCH + token];
      const int place = blockIdx.x * TEAMS * 16 + output;
      if (token0 + token < tokens && place < OUT)
        y[(token0 + token) * y_token + blockIdx.y * y_head + place] = from_float(total);
    }
    __syncthreads();
  }
}

#endif
