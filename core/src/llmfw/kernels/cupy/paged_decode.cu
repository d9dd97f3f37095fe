// paged_attention for few query tokens a request: split-KV flash decoding on tensor cores, 16-bit types, for head sizes
// up to 128, whose tiles fit in registers. Shapes, launch and numbers: paged.cuh.
//
// K and V go from memory straight to mma operands. K of the next tile is requested as soon as this tile's scores are
// done, V as soon as its product is: loads are always in flight, without shared memory.
#include "common.cuh"

#if DTYPE != F32
#include "paged.cuh"

constexpr int V_REGS = V_DIM / 16;

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

// Lane 4g + c: of key g of each half, dims 32 j + 8 c .. + 7 (steps 2j, 2j + 1), then 32 FULL + 4 c .. + 3.
__device__ __forceinline__ void load_keys(u32 (&k)[2][STEPS][2], const Cache& cache, const Offsets& at,
                                          const Lane& lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const scalar* row = cache.k + at.k[half] + min(lane.g, at.limit[half]) * cache.k_slot;
#pragma unroll
    for (int j = 0; j < FULL; ++j) {
      const uint4 x = stream16(row + 32 * j + 8 * lane.c);
      k[half][2 * j][0] = x.x;
      k[half][2 * j][1] = x.y;
      k[half][2 * j + 1][0] = x.z;
      k[half][2 * j + 1][1] = x.w;
    }
    if constexpr (HALF) {
      const uint2 x = stream8(row + 32 * FULL + 4 * lane.c);
      k[half][STEPS - 1][0] = x.x;
      k[half][STEPS - 1][1] = x.y;
    }
  }
}

// Lane 4g + c: of keys 2c, 2c + 1 of each half, dims 64 i + 8 g .. + 7, then 4 and 2 dims of the rest.
__device__ __forceinline__ void load_values(u32 (&v)[2][2][V_REGS], const Cache& cache, const Offsets& at,
                                            const Lane& lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int key = 0; key < 2; ++key) {
      const scalar* row = cache.v + at.v[half] + min(2 * lane.c + key, at.limit[half]) * cache.v_slot;
#pragma unroll
      for (int i = 0; i < V8; ++i) {
        const uint4 x = stream16(row + 64 * i + 8 * lane.g);
        v[half][key][4 * i] = x.x;
        v[half][key][4 * i + 1] = x.y;
        v[half][key][4 * i + 2] = x.z;
        v[half][key][4 * i + 3] = x.w;
      }
      if constexpr (V4) {
        const uint2 x = stream8(row + 64 * V8 + 4 * lane.g);
        v[half][key][4 * V8] = x.x;
        v[half][key][4 * V8 + 1] = x.y;
      }
      if constexpr (V2) v[half][key][V_REGS - 1] = stream4(row + 64 * V8 + 32 * V4 + 2 * lane.g);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    paged_decode(scalar* out, const scalar* q, const scalar* k_cache, const scalar* v_cache, const int* block_tables,
                 const int* cu_query_lens, const int* kv_lens, const float* sinks, float4* partial,
                 float2* partial_stats, int* counters, i64 q_stride, i64 table_stride, i64 k_block_stride,
                 i64 k_slot_stride, i64 v_block_stride, i64 v_slot_stride, int kv_heads, int first_request,
                 int table_width, int window, int least_share, int fresh, float scale, float softcap) {
  const int request = first_request + blockIdx.z;
  const Lane lane = this_lane();
  const int* table = block_tables + request * table_stride;
  follow_older();
  const bool guessed = can_guess(window);
  Pages pages;
  if (guessed) pages.of[0] = pages.of[1] = guess_page(table, table_width, lane.warp);
  Share mine;
  if (!take_share(mine, cu_query_lens, kv_lens, request, kv_heads, window, least_share)) return;
  const Cache cache = {k_cache + mine.kv_head * HEAD_DIM, v_cache + mine.kv_head * V_DIM, table, k_block_stride,
                       k_slot_stride, v_block_stride, v_slot_stride, mine.last};

  u32 k[2][STEPS][2], v[2][2][V_REGS];
  int tile = mine.begin + lane.warp;
  Offsets at;
  if (tile < mine.stop) {
    if (!guessed) pages = find_pages(cache, tile);
    at = locate(pages, cache, tile);
    if (tile + WARPS < mine.stop) pages = find_pages(cache, tile + WARPS);
  }
  // Keys of earlier steps need not wait for the kernel that writes this step's; `fresh` keys before the request's new
  // ones may be this step's too, of a request that it shares blocks with.
  const bool old = (tile + 1) * 16 <= mine.past - fresh;
  if (PDL && old && tile < mine.stop) {
    load_keys(k, cache, at, lane);
    load_values(v, cache, at, lane);
  }
  follow();
  if (!(PDL && old) && tile < mine.stop) {
    load_keys(k, cache, at, lane);
    load_values(v, cache, at, lane);
  }

  Queries a;
  load_queries(a, q, q_stride, mine, window, lane);
  Sums sums;
  clear(sums);
  for (; tile < mine.stop; tile += WARPS) {
    const bool more = tile + WARPS < mine.stop;
    Scores s[2] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int step = 0; step < STEPS; ++step) score(s[half], a, step, k[half][step][0], k[half][step][1]);
    if (more) {
      at = locate(pages, cache, tile + WARPS);
      load_keys(k, cache, at, lane);
    }

    Weights p;
    soften(p, sums, s, a, tile, lane.c, scale, softcap);
#pragma unroll
    for (int i = 0; i < V_REGS; ++i) weigh(sums, 2 * i, p, v[0][0][i], v[0][1][i], v[1][0][i], v[1][1][i]);
    if (more) {
      load_values(v, cache, at, lane);
      if (tile + 2 * WARPS < mine.stop) pages = find_pages(cache, tile + 2 * WARPS);
    }
  }

  alignas(16) __shared__ float slabs[WARPS][ROWS * PITCH];
  const Rows rows = {out, sinks, partial, partial_stats, counters, mine.row0, min(ROWS, mine.rows - mine.row0),
                     mine.q_start, mine.kv_head, kv_heads, mine.active};
  meet(rows, sums, [&](int warp) { return slabs[warp]; }, lane);
}

#endif
