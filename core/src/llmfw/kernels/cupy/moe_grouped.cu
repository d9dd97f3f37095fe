// Products of each expert's rows with its weight on tensor cores; an expert that no row chose is not read.
//
// Shapes: tiles as moe_order.cu makes them, order int32 [pairs]. UP: x [tokens, IN], of which the row at place p is
//   order[p] / top_k, y [pairs, outputs] by place; with GATED y = act(gate, up), weight [experts, 2 * outputs, IN] =
//   gate | up, else weight [experts, outputs, IN]; bias [experts, rows of the weight] or null. Not UP: x [pairs, IN] by
//   place, y [pairs, outputs] by pair. Contiguous, 16-byte aligned, IN a multiple of 64, 16-bit types.
// Launch: block 128, grid (most tiles, ceil(outputs / outputs of a block)), shared memory STAGES * (WIDE + ROWS) * 128;
//   blocks without a tile leave at once. A block multiplies WIDE rows of the weight (first operand of mma) with up to
//   ROWS rows of x (second, 8 a tile), 64 values of the summed dimension at a time, STAGES - 1 of them on their way.
//   GATED: 8 rows of gate and the same 8 of up are one operand, so that a lane holds both results.
// Numbers: float32 sums on tensor cores; a row's result does not depend on the other rows.
#include "common.cuh"

#ifndef IN
#define IN 2048
#endif
#ifndef UP
#define UP 1
#endif
#ifndef GATED
#define GATED 1
#endif
#ifndef WIDE
#define WIDE 64
#endif
#ifndef ROWS
#define ROWS 16
#endif
#ifndef STAGES
#define STAGES 4
#endif
#ifndef ACTIVATION
#define ACTIVATION silu(gate) * up
#endif

#if DTYPE != F32

constexpr int WARPS = 4, THREADS = WARPS * 32;
constexpr int T = WIDE / (16 * WARPS);  // mma tiles of a warp over the rows of the weight
constexpr int N = ROWS / 8;             // and over the rows of x
constexpr int SLICE = 64;               // values of the summed dimension in one stage
constexpr int LINE = SLICE * 2;         // bytes of a row in it
constexpr int STAGE = (WIDE + ROWS) * LINE;
constexpr int SLICES = IN / SLICE;
constexpr int MADE = GATED ? WIDE / 2 : WIDE;  // outputs of the block
static_assert(IN % SLICE == 0 && WIDE % (16 * WARPS) == 0 && ROWS % 8 == 0, "whole tiles");

struct alignas(16) Tile {
  int expert, first, rows, unused;
};

__device__ __forceinline__ float activate(float gate, float up) { return ACTIVATION; }

// Rows of 128 bytes whose halves change places in every second row: 8 lanes read 4 chunks of two rows from all banks.
__device__ __forceinline__ int offset_of(int row, int chunk) { return row * LINE + (chunk ^ (row & 1) << 2) * 16; }

extern "C" __global__ void __launch_bounds__(THREADS)
    moe_grouped(scalar* y, const scalar* x, const scalar* weight, const scalar* bias, const Tile* tiles,
                const int* order, int outputs, int top_k) {
  constexpr int OWN = WIDE * 8 / THREADS;                     // chunks of the weight that a thread copies a stage
  constexpr int THEIRS = (ROWS * 8 + THREADS - 1) / THREADS;  // and of x
  DYNAMIC_SHARED(memory);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, c = lane % 4;
  if (UP) follow();
  else follow_older();
  if (int(blockIdx.x) >= tiles[0].expert) return;
  const Tile tile = tiles[1 + blockIdx.x];
  const int first = blockIdx.y * MADE;
  const i64 before = i64(tile.expert) * (GATED ? 2 : 1) * outputs;

  const int chunk = threadIdx.x % 8, line = threadIdx.x / 8;  // of the first copy; the next is 16 rows further
  const scalar* source[OWN];
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    const int row = line + i * 16;
    const int output = GATED ? first + row / 16 * 8 + row % 8 : first + row;
    source[i] = weight + (before + min(output, outputs - 1) + (GATED && row % 16 / 8 ? outputs : 0)) * IN + chunk * 8;
  }
  const scalar* operand[THEIRS];
#pragma unroll
  for (int i = 0; i < THEIRS; ++i) {
    const int place = tile.first + min(line + i * 16, tile.rows - 1);
    operand[i] = x + i64(UP ? order[place] / top_k : place) * IN + chunk * 8;
  }
  const auto copy_weight = [&](int slice) {
    unsigned char* stage = memory + slice % STAGES * STAGE;
#pragma unroll
    for (int i = 0; i < OWN; ++i) copy16_async(stage + offset_of(line + i * 16, chunk), source[i] + slice * SLICE, 16);
  };
  const auto copy_rows = [&](int slice) {
    unsigned char* stage = memory + slice % STAGES * STAGE + WIDE * LINE;
#pragma unroll
    for (int i = 0; i < THEIRS; ++i)
      if (line + i * 16 < tile.rows) copy16_async(stage + offset_of(line + i * 16, chunk), operand[i] + slice * SLICE, 16);
  };
#pragma unroll
  for (int s = 0; s < STAGES - 1; ++s)
    if (!UP && s < SLICES) copy_weight(s);
  if (!UP) follow();
#pragma unroll
  for (int s = 0; s < STAGES - 1; ++s) {
    if (UP && s < SLICES) copy_weight(s);
    if (s < SLICES) copy_rows(s);
    close_copies();
  }

  float sum[T][N][4] = {};
#pragma unroll 1
  for (int slice = 0; slice < SLICES; ++slice) {
    wait_for_copies<STAGES - 2>();
    __syncthreads();
    if (slice + STAGES - 1 < SLICES) {
      copy_weight(slice + STAGES - 1);
      copy_rows(slice + STAGES - 1);
    }
    close_copies();
    const unsigned char* stage = memory + slice % STAGES * STAGE;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      uint4 a[T][2];
#pragma unroll
      for (int t = 0; t < T; ++t)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          a[t][half] =
              *reinterpret_cast<const uint4*>(stage + offset_of((warp * T + t) * 16 + half * 8 + g, c + 4 * j));
#pragma unroll
      for (int n = 0; n < N; ++n) {
        if (n * 8 >= tile.rows) break;
        const uint4 b = *reinterpret_cast<const uint4*>(stage + offset_of(WIDE + n * 8 + g, c + 4 * j));
#pragma unroll
        for (int t = 0; t < T; ++t) {
          float(&d)[4] = sum[t][n];
          mma(d[0], d[1], d[2], d[3], a[t][0].x, a[t][1].x, a[t][0].y, a[t][1].y, b.x, b.y);
          mma(d[0], d[1], d[2], d[3], a[t][0].z, a[t][1].z, a[t][0].w, a[t][1].w, b.z, b.w);
        }
      }
    }
  }

  // Lane 4g + c holds weight rows g and g + 8 of rows 8 n + 2 c and 2 c + 1 of x.
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = n * 8 + 2 * c + i;
      if (row >= tile.rows) continue;
      const int place = tile.first + row;
      scalar* target = y + i64(UP ? place : order[place]) * outputs;
#pragma unroll
      for (int t = 0; t < T; ++t) {
        const float low = sum[t][n][i], high = sum[t][n][2 + i];
        const int output = first + (warp * T + t) * (GATED ? 8 : 16) + g;
        const auto shift = [&](int at) { return bias ? to_float(bias[before + at]) : 0.0f; };
        if (GATED) {
          if (output < outputs)
            target[output] = from_float(
                activate(rounded(low + shift(output)), rounded(high + shift(outputs + output))));
        } else {
          if (output < outputs) target[output] = from_float(low + shift(output));
          if (output + 8 < outputs) target[output + 8] = from_float(high + shift(output + 8));
        }
      }
    }
}

#endif
