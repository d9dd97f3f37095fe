// Shared by draw_cut.cu and draw_tokens.cu: a row's parameters, distance and mass of its tokens, sums of a block.
//
// A token counts by its distance z = (greatest - logit) * scale, in units of 64 octaves and at most 1, and by its mass,
// 2^(40 - 64 z) as a whole number. Sums of whole numbers have no order, so any division of the work gives the
// reference's token. Products and sums are rounded one by one, as torch does.
#pragma once

#include "common.cuh"

#ifndef VOCAB
#define VOCAB 128256
#endif
#ifndef WIDTH
#define WIDTH 8
#endif
#ifndef THREADS
#define THREADS 512
#endif
#ifndef MIN_BLOCKS  // resident blocks the registers must leave room for
#define MIN_BLOCKS 2
#endif
#ifndef EACH  // tokens of a lane in a tile
#define EACH 16
#endif

constexpr int WARPS = THREADS / 32;
constexpr int TILE = 32 * EACH;
constexpr int TILES = (VOCAB + TILE - 1) / TILE;
static_assert(THREADS % 32 == 0 && EACH % WIDTH == 0 && EACH <= 32, "whole shares, a bit a token");
static_assert(VOCAB <= 1 << 22, "sums of masses fit 63 bits");

// To these a small number is added so that the sum's last bit is 1/32 octave, 2^-20 and 2^-40.
constexpr float STEPS = 6144.0f, HIGH = 8.0f, LOW = 1.1444091796875e-05f;
constexpr u32 HIGH_BITS = 0x41000000u, LOW_BITS = 0x37400000u;

// Bits of 2^(-i / 32), plus i << 18: less n << 18 they are those of 2^(-n / 32), where i are the last five bits of n.
__constant__ u32 POWERS[32] = {
    0x3f800000u, 0x3f7e83b3u, 0x3f7d257du, 0x3f7be4bau, 0x3f7ac0c7u, 0x3f79b907u, 0x3f78ccdfu, 0x3f77fbb8u,
    0x3f7744fdu, 0x3f76a81eu, 0x3f76248cu, 0x3f75b9beu, 0x3f75672au, 0x3f752c4du, 0x3f7508a4u, 0x3f74fbafu,
    0x3f7504f3u, 0x3f7523f6u, 0x3f75583fu, 0x3f75a15bu, 0x3f75fed7u, 0x3f767043u, 0x3f76f532u, 0x3f778d3au,
    0x3f7837f0u, 0x3f78f4f0u, 0x3f79c3d3u, 0x3f7aa43au, 0x3f7b95c2u, 0x3f7c980fu, 0x3f7daac3u, 0x3f7ecd87u};

// A row and its parameters; distances are in units of 64 octaves.
struct Row {
  const scalar* logits;
  const double* parameters;  // the row's column; read when needed, for registers are few
  float greatest, scale;

  __device__ __forceinline__ Row(const scalar* all, i64 token, const double* columns, i64 stride) {
    logits = all + blockIdx.y * stride;
    parameters = columns + blockIdx.y;
    scale = float(parameters[0]) * 0.015625f;
    greatest = token < 0 ? 0.0f : __fadd_rn(to_float(logits[token]), 0.0f);  // of -0 a distance would be -0
  }
  // 0 where all are kept.
  __device__ __forceinline__ u32 top_k() const {
    const u32 count = u32(parameters[gridDim.y]);
    return count < VOCAB ? count : 0;
  }
  __device__ __forceinline__ double top_p() const { return parameters[2 * gridDim.y]; }
  __device__ __forceinline__ float farthest() const {
    return __fadd_rn(float(parameters[3 * gridDim.y]) * 0.015625f, 0.0f);  // min_p 1 gives -0
  }
  __device__ __forceinline__ double uniform() const { return parameters[4 * gridDim.y]; }
  __device__ __forceinline__ bool cut() const { return top_k() > 0 || top_p() < 1.0; }
  __device__ __forceinline__ float distance(scalar logit) const {
    return __saturatef(__fmul_rn(__fsub_rn(greatest, to_float(logit)), scale));
  }
};

// Between which distances the kept tokens end: from `first` on, and before `last`.
struct Cut {
  float first, last;
  u32 left;  // of those that top_k keeps, how many are from `first` on; 0 where it does not cut
  u32 unused;
};

// A mass as bits of two sums: high - HIGH_BITS in units of 2^20, low - LOW_BITS (signed) of 1.
struct Mass {
  u32 high, low;

  // By 2^(-n / 32) for the nearest n and a polynomial over the rest; `powers(n)` is POWERS[n % 32].
  template <class Powers>
  __device__ __forceinline__ Mass(float z, Powers&& powers) {
    const float shifted = __fadd_rn(z, STEPS);
    const float x = __fsub_rn(__fsub_rn(shifted, STEPS), z);
    float p = __fadd_rn(__fmul_rn(x, 983.9677734375f), 44.36206817626953f);
    p = __fadd_rn(__fmul_rn(x, p), 1.0f);
    const u32 n = __float_as_uint(shifted);
    const float mass = __fmul_rn(p, __uint_as_float(powers(n) - (n << 18)));
    const float sum = __fadd_rn(mass, HIGH);
    high = __float_as_uint(sum);
    low = __float_as_uint(__fadd_rn(__fsub_rn(mass, __fsub_rn(sum, HIGH)), LOW));
  }
};

// From sums of `high - HIGH_BITS` and `low - LOW_BITS`.
__device__ __forceinline__ u64 whole_mass(u32 high, u32 low) { return (u64(high) << 20) + u64(i64(int(low))); }

template <class Powers>
__device__ __forceinline__ u64 mass_of(float z, Powers&& powers) {
  const Mass mass(z, powers);
  return whole_mass(mass.high - HIGH_BITS, mass.low - LOW_BITS);
}

// POWERS where a whole warp asks for one each: lanes hold them.
struct WarpPowers {
  int own = int(POWERS[threadIdx.x % 32]);
  __device__ __forceinline__ u32 operator()(u32 n) const { return u32(__shfl_sync(ALL, own, int(n))); }
};

// A lane's tokens of a tile: in step i of a pack, tile * TILE + (i * 32 + lane) * WIDTH + j.
__device__ __forceinline__ int token_of(int tile, int e) {
  return tile * TILE + (e / WIDTH * 32 + int(threadIdx.x) % 32) * WIDTH + e % WIDTH;
}

struct Tile {
  Pack<WIDTH> packs[EACH / WIDTH];
  int number;

  __device__ __forceinline__ Tile(const Row& row, int which) : number(which) {
#pragma unroll
    for (int i = 0; i < EACH / WIDTH; ++i) {
      const int token = token_of(number, i * WIDTH);
      if (token < VOCAB) {
        packs[i] = load<WIDTH>(row.logits + token);
        continue;
      }
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) packs[i].at[j] = from_float(NEG_INF);
    }
  }
  __device__ __forceinline__ float distance(const Row& row, int e) const {
    return row.distance(packs[e / WIDTH].at[e % WIDTH]);
  }
};

// work(tile) for each of this warp's share of the row's tiles.
template <class Work>
__device__ __forceinline__ void each_tile(const Row& row, Work&& work) {
  const int first = blockIdx.x * WARPS + int(threadIdx.x) / 32;
  for (int at = first; at < TILES; at += gridDim.x * WARPS) work(Tile(row, at));
}

__device__ __forceinline__ u64 shifted_up(u64 x, int lanes) {
  return u64(u32(__shfl_up_sync(ALL, int(x >> 32), lanes))) << 32 | u32(__shfl_up_sync(ALL, int(x), lanes));
}

// Sum over the threads up to this one; `all` becomes that over the block.
__device__ __forceinline__ u64 sum_up_to(u64 x, u64 (&of_warps)[WARPS], u64& all) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const u64 other = shifted_up(x, step);
    if (lane >= step) x += other;
  }
  __syncthreads();
  if (lane == 31) of_warps[warp] = x;
  __syncthreads();
  u64 before = 0;
  all = 0;
#pragma unroll
  for (int i = 0; i < WARPS; ++i) {
    if (i == warp) before = all;
    all += of_warps[i];
  }
  return before + x;
}

// Whether this is the last of a row's blocks; it then sees what the others wrote.
__device__ __forceinline__ bool is_last(bool& last, int* counter) {
  __syncthreads();
  if (threadIdx.x == 0) {
    last = gridDim.x == 1 || add_release_acquire(counter, 1) == int(gridDim.x) - 1;
    if (last) *counter = 0;
  }
  __syncthreads();
  return last;
}
