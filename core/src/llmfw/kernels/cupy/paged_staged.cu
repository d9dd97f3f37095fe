// paged_attention as paged_decode.cu does it, for head sizes above 128, whose tiles of K and V do not fit in registers
// beside the sums. Shapes, launch and numbers: paged.cuh.
//
// K and V go to shared memory by asynchronous copies, STAGES tiles of every warp under way. Each lane copies just what
// it will read itself, so that lanes wait for their own copies alone.
#include "common.cuh"

#if DTYPE != F32
#ifndef HEAD_DIM
#define HEAD_DIM 256
#endif
#ifndef MIN_BLOCKS
#define MIN_BLOCKS 1
#endif
#ifndef STAGES
#define STAGES 3
#endif
#include "paged.cuh"

// Where the pieces of a tile lie: those of a kind one after another, 32 lanes each.
constexpr int KEYS = 0, KEY_HALVES = KEYS + 2 * FULL * 512, VALUES = KEY_HALVES + 2 * HALF * 256;
constexpr int VALUE_HALVES = VALUES + 4 * V8 * 512, VALUE_QUARTERS = VALUE_HALVES + 4 * V4 * 256;
constexpr int TILE_BYTES = VALUE_QUARTERS + 4 * V2 * 128;
constexpr int RING_BYTES = STAGES * TILE_BYTES;  // of a warp
static_assert(TILE_BYTES == 16 * (HEAD_DIM + V_DIM) * 2, "K and V of a tile, nothing else");
static_assert(ROWS * PITCH * 4 <= RING_BYTES, "sums take the ring's place");

// This lane's part of a piece.
template <class T>
__device__ __forceinline__ T& piece(u8* tile, int kind, int number) {
  return reinterpret_cast<T*>(tile + kind)[number * 32 + threadIdx.x % 32];
}

// Lane 4g + c brings of key g of each half what `load_queries` has of q, and of the values of keys 2c, 2c + 1 of each
// half the dims that `out_dim` tells.
__device__ __forceinline__ void bring(u8* to, const Cache& cache, const Pages& pages, int tile, const Lane& lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int start = half_start(cache, tile, half), slot = start % BLOCK_SIZE, limit = cache.last - start;
    const scalar* k = cache.k + pages.of[half] * cache.k_block + (slot + min(lane.g, limit)) * cache.k_slot;
#pragma unroll
    for (int j = 0; j < FULL; ++j) copy_async<16>(&piece<uint4>(to, KEYS, half * FULL + j), k + 32 * j + 8 * lane.c);
    if constexpr (HALF) copy_async<8>(&piece<uint2>(to, KEY_HALVES, half), k + 32 * FULL + 4 * lane.c);
  }
#pragma unroll
  for (int four = 0; four < 4; ++four) {
    const int half = four / 2, start = half_start(cache, tile, half), slot = start % BLOCK_SIZE;
    const int key = min(2 * lane.c + four % 2, cache.last - start);
    const scalar* v = cache.v + pages.of[half] * cache.v_block + (slot + key) * cache.v_slot;
#pragma unroll
    for (int i = 0; i < V8; ++i) copy_async<16>(&piece<uint4>(to, VALUES, four * V8 + i), v + 64 * i + 8 * lane.g);
    if constexpr (V4) copy_async<8>(&piece<uint2>(to, VALUE_HALVES, four), v + 64 * V8 + 4 * lane.g);
    if constexpr (V2) copy_async<4>(&piece<u32>(to, VALUE_QUARTERS, four), v + 64 * V8 + 32 * V4 + 2 * lane.g);
  }
}

__device__ __forceinline__ void score_tile(Scores (&s)[2], const Queries& a, u8* tile) {
#pragma unroll
  for (int j = 0; j < FULL; ++j)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 k = piece<uint4>(tile, KEYS, half * FULL + j);
      score(s[half], a, 2 * j, k.x, k.y);
      score(s[half], a, 2 * j + 1, k.z, k.w);
    }
  if constexpr (HALF)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint2 k = piece<uint2>(tile, KEY_HALVES, half);
      score(s[half], a, STEPS - 1, k.x, k.y);
    }
}

__device__ __forceinline__ void weigh_tile(Sums& sums, const Weights& p, u8* tile) {
#pragma unroll
  for (int i = 0; i < V8; ++i) {
    uint4 v[4];
#pragma unroll
    for (int four = 0; four < 4; ++four) v[four] = piece<uint4>(tile, VALUES, four * V8 + i);
    weigh(sums, 8 * i, p, v[0].x, v[1].x, v[2].x, v[3].x);
    weigh(sums, 8 * i + 2, p, v[0].y, v[1].y, v[2].y, v[3].y);
    weigh(sums, 8 * i + 4, p, v[0].z, v[1].z, v[2].z, v[3].z);
    weigh(sums, 8 * i + 6, p, v[0].w, v[1].w, v[2].w, v[3].w);
  }
  if constexpr (V4) {
    uint2 v[4];
#pragma unroll
    for (int four = 0; four < 4; ++four) v[four] = piece<uint2>(tile, VALUE_HALVES, four);
    weigh(sums, 8 * V8, p, v[0].x, v[1].x, v[2].x, v[3].x);
    weigh(sums, 8 * V8 + 2, p, v[0].y, v[1].y, v[2].y, v[3].y);
  }
  if constexpr (V2) {
    u32 v[4];
#pragma unroll
    for (int four = 0; four < 4; ++four) v[four] = piece<u32>(tile, VALUE_QUARTERS, four);
    weigh(sums, 8 * V8 + 4 * V4, p, v[0], v[1], v[2], v[3]);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    paged_staged(scalar* out, const scalar* q, const scalar* k_cache, const scalar* v_cache, const int* block_tables,
                 const int* cu_query_lens, const int* kv_lens, const float* sinks, float4* partial,
                 float2* partial_stats, int* counters, i64 q_stride, i64 table_stride, i64 k_block_stride,
                 i64 k_slot_stride, i64 v_block_stride, i64 v_slot_stride, int kv_heads, int first_request,
                 int table_width, int window, int least_share, int fresh, float scale, float softcap) {
  const int request = first_request + blockIdx.z;
  const Lane lane = this_lane();
  const int* table = block_tables + request * table_stride;
  follow_older();
  const bool guessed = can_guess(window);
  Pages pages[STAGES];
  if (guessed) guess_pages(pages, table, table_width, lane.warp);
  Share mine;
  if (!take_share(mine, cu_query_lens, kv_lens, request, kv_heads, window, least_share)) return;
  const Cache cache = {k_cache + mine.kv_head * HEAD_DIM, v_cache + mine.kv_head * V_DIM, table, k_block_stride,
                       k_slot_stride, v_block_stride, v_slot_stride, mine.last};

  DYNAMIC_SHARED(memory);
  u8* const ring = memory + lane.warp * RING_BYTES;
  int tile = mine.begin + lane.warp;
#pragma unroll
  for (int i = 0; i < STAGES; ++i)
    if (!guessed && tile + i * WARPS < mine.stop) pages[i] = find_pages(cache, tile + i * WARPS);
  const auto start = [&](int i) {
    if (tile + i * WARPS < mine.stop) bring(ring + i * TILE_BYTES, cache, pages[i], tile + i * WARPS, lane);
    close_copies();
  };
  // Keys of earlier steps need not wait for the kernel that writes this step's; `fresh` keys before the request's new
  // ones may be this step's too, of a request that it shares blocks with.
  const int settled = PDL ? (mine.past - fresh) / 16 : 0;
#pragma unroll
  for (int i = 0; i < STAGES; ++i)
    if (tile + i * WARPS < settled) start(i);
  follow();
#pragma unroll
  for (int i = 0; i < STAGES; ++i)
    if (tile + i * WARPS >= settled) start(i);
  Pages next;
  if (tile + STAGES * WARPS < mine.stop) next = find_pages(cache, tile + STAGES * WARPS);

  Queries a;
  load_queries(a, q, q_stride, mine, window, lane);
  Sums sums;
  clear(sums);
  for (int stage = 0; tile < mine.stop; tile += WARPS, stage = stage + 1 == STAGES ? 0 : stage + 1) {
    u8* const here = ring + stage * TILE_BYTES;
    wait_for_copies<STAGES - 1>();
    Scores s[2] = {};
    score_tile(s, a, here);
    Weights p;
    soften(p, sums, s, a, tile, lane.c, scale, softcap);
    weigh_tile(sums, p, here);

    const int ahead = tile + STAGES * WARPS;
    if (ahead < mine.stop) {
      bring(here, cache, next, ahead, lane);
      if (ahead + WARPS < mine.stop) next = find_pages(cache, ahead + WARPS);
    }
    close_copies();
  }

  wait_for_copies<0>();
  __syncwarp();  // all lanes are done with the ring, whose place the sums take
  const Rows rows = {out, sinks, partial, partial_stats, counters, mine.row0, min(ROWS, mine.rows - mine.row0),
                     mine.q_start, mine.kv_head, kv_heads, mine.active};
  meet(rows, sums, [&](int warp) { return reinterpret_cast<float*>(memory + warp * RING_BYTES); }, lane);
}

#endif
