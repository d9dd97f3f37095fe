// Tiles of keys in registers, for paged_decode.cu.
//
// K and V go from memory straight to mma operands. K of the next tile is requested as soon as this tile's scores are
// done, V as soon as its product is: loads are always in flight, without shared memory. Tiles beyond are asked for into
// L2, AHEAD tiles of every warp, so that memory works also while a kernel before this one waits for something else.
#pragma once
#include "paged.cuh"

#ifndef AHEAD
#define AHEAD 0
#endif

constexpr int V_REGS = V_DIM / 16;
constexpr int LINE = 128 / sizeof(scalar);  // scalars that one request into L2 brings
constexpr int K_LINES = (HEAD_DIM + LINE - 1) / LINE, V_LINES = (V_DIM + LINE - 1) / LINE;  // of a key

struct Offsets {
  i64 k[2], v[2];  // of the first key of both halves of a tile, in scalars
  int limit[2];    // greatest key of the half that may be read, relative to its first
};

__device__ __forceinline__ Offsets locate(const Pages& pages, const Cache& cache, int tile) {
  Offsets at;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int start = half_start(cache, tile, half);
    const int slot = start % BLOCK_SIZE;
    at.k[half] = pages.of[half] * cache.k_block + slot * cache.k_slot;
    at.v[half] = pages.of[half] * cache.v_block + slot * cache.v_slot;
    at.limit[half] = cache.last - start;
  }
  return at;
}

typedef u32 Keys[2][STEPS][2];     // of both halves of a tile, in the order of `Queries`
typedef u32 Values[2][2][V_REGS];  // of keys 2c and 2c + 1 of both halves

// Lane 4g + c: dims 32 j + 8 c .. + 7 (steps 2j, 2j + 1), then 32 FULL + 4 c .. + 3.
__device__ __forceinline__ void take_key(u32 (&k)[STEPS][2], const scalar* row, const Lane& lane) {
#pragma unroll
  for (int j = 0; j < FULL; ++j) {
    const uint4 x = stream16(row + 32 * j + 8 * lane.c);
    k[2 * j][0] = x.x;
    k[2 * j][1] = x.y;
    k[2 * j + 1][0] = x.z;
    k[2 * j + 1][1] = x.w;
  }
  if constexpr (HALF) {
    const uint2 x = stream8(row + 32 * FULL + 4 * lane.c);
    k[STEPS - 1][0] = x.x;
    k[STEPS - 1][1] = x.y;
  }
}

// Lane 4g + c: dims 64 i + 8 g .. + 7, then 4 and 2 dims of the rest.
__device__ __forceinline__ void take_value(u32 (&v)[V_REGS], const scalar* row, const Lane& lane) {
#pragma unroll
  for (int i = 0; i < V8; ++i) {
    const uint4 x = stream16(row + 64 * i + 8 * lane.g);
    v[4 * i] = x.x;
    v[4 * i + 1] = x.y;
    v[4 * i + 2] = x.z;
    v[4 * i + 3] = x.w;
  }
  if constexpr (V4) {
    const uint2 x = stream8(row + 64 * V8 + 4 * lane.g);
    v[4 * V8] = x.x;
    v[4 * V8 + 1] = x.y;
  }
  if constexpr (V2) v[V_REGS - 1] = stream4(row + 64 * V8 + 32 * V4 + 2 * lane.g);
}

__device__ __forceinline__ void load_keys(Keys& k, const Cache& cache, const Offsets& at, const Lane& lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half)
    take_key(k[half], cache.k + at.k[half] + min(lane.g, at.limit[half]) * cache.k_slot, lane);
}

__device__ __forceinline__ void load_values(Values& v, const Cache& cache, const Offsets& at, const Lane& lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int key = 0; key < 2; ++key) {
      const int own = min(2 * lane.c + key, at.limit[half]);
      take_value(v[half][key], cache.v + at.v[half] + own * cache.v_slot, lane);
    }
}

__device__ __forceinline__ void fetch_tile(const Cache& cache, const Pages& pages, int tile) {
  const Offsets at = locate(pages, cache, tile);
#pragma unroll
  for (int i = 0; i < 16 * K_LINES; i += 32) {
    const int item = i + threadIdx.x % 32, key = item / K_LINES;
    const i64 first = key < 8 ? at.k[0] : at.k[1];
    const int own = min(key % 8, key < 8 ? at.limit[0] : at.limit[1]);
    if (item < 16 * K_LINES) fetch_l2(cache.k + first + own * cache.k_slot + item % K_LINES * LINE);
  }
#pragma unroll
  for (int i = 0; i < 16 * V_LINES; i += 32) {
    const int item = i + threadIdx.x % 32, key = item / V_LINES;
    const i64 first = key < 8 ? at.v[0] : at.v[1];
    const int own = min(key % 8, key < 8 ? at.limit[0] : at.limit[1]);
    if (item < 16 * V_LINES) fetch_l2(cache.v + first + own * cache.v_slot + item % V_LINES * LINE);
  }
}

// A warp's way through its block's share, every WARPS-th tile.
struct Walk {
  const Cache& cache;
  const Lane& lane;
  int tile, stop;
  Offsets at;
  Pages next, far;  // of the next tile, and of the one to ask for into L2 after it
  Keys k;
  Values v;

  // `guess` are the pages of the first two tiles where `guessed`.
  __device__ __forceinline__ Walk(const Cache& cache, const Lane& lane, const Share& mine, const Pages (&guess)[2],
                                  bool guessed)
      : cache(cache), lane(lane), tile(mine.begin + lane.warp), stop(mine.stop) {
    if (tile >= stop) return;
    Pages first = guess[0];
    next = guess[1];
    if (!guessed) {
      first = find_pages(cache, tile);
      if (tile + WARPS < stop) next = find_pages(cache, tile + WARPS);
    }
    at = locate(first, cache, tile);
  }

  __device__ __forceinline__ void load() {
    if (tile >= stop) return;
    load_keys(k, cache, at, lane);
    load_values(v, cache, at, lane);
  }

  // Asks for the tiles after the first into L2.
  __device__ __forceinline__ void fetch_first() {
    if constexpr (AHEAD > 0) {
#pragma unroll
      for (int i = 1; i <= AHEAD; ++i) {
        const int one = tile + i * WARPS;
        if (one < stop) fetch_tile(cache, i == 1 ? next : find_pages(cache, one), one);
      }
      find_far(AHEAD + 1);
    }
  }

  __device__ __forceinline__ void find_far(int tiles) {
    if (tile + tiles * WARPS < stop) far = find_pages(cache, tile + tiles * WARPS);
  }

  __device__ __forceinline__ void go(Sums& sums, const Queries& a, float scale, float softcap) {
    for (; tile < stop; tile += WARPS) {
      const bool more = tile + WARPS < stop;
      Scores s[2] = {};
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int step = 0; step < STEPS; ++step) score(s[half], a, step, k[half][step][0], k[half][step][1]);
      if (more) {
        at = locate(next, cache, tile + WARPS);
        load_keys(k, cache, at, lane);
      }
      if constexpr (AHEAD > 0) {
        const int one = tile + (AHEAD + 1) * WARPS;
        if (one < stop) fetch_tile(cache, far, one);
        find_far(AHEAD + 2);
      }

      Weights p;
      soften(p, sums, s, a, tile, lane.c, scale, softcap);
#pragma unroll
      for (int i = 0; i < V_REGS; ++i) weigh(sums, 2 * i, p, v[0][0][i], v[0][1][i], v[1][0][i], v[1][1][i]);
      if (more) {
        load_values(v, cache, at, lane);
        if (tile + 2 * WARPS < stop) next = find_pages(cache, tile + 2 * WARPS);
      }
    }
  }
};
