// rope_and_attend as rope_decode.cu does it, for head sizes above 128, whose tiles lie in shared memory. Shapes:
// rope_heads.cuh; launch and numbers: paged.cuh and rotary.cuh.
#include "common.cuh"

#if DTYPE != F32
#ifndef HEAD_DIM
#define HEAD_DIM 256
#endif
#ifndef LANES
#define LANES 16
#endif
#include "rope_heads.cuh"
#include "paged_ring.cuh"

// Keys from the newest on are not in the cache: they become the newest, whose scores count once.
struct Newest {
  const Fresh& fresh;
  const Lane& lane;
  int key;

  __device__ __forceinline__ void tile(u8* here, int tile) const {
    if (tile * 16 + 15 < key) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (tile * 16 + half * 8 + lane.g < key) continue;
#pragma unroll
      for (int j = 0; j < FULL; ++j) set<uint4>(here, KEYS, half * FULL + j, fresh.k + 32 * j + 8 * lane.c);
      if constexpr (HALF) set<uint2>(here, KEY_HALVES, half, fresh.k + 32 * FULL + 4 * lane.c);
    }
#pragma unroll
    for (int four = 0; four < 4; ++four) {
      if (tile * 16 + four / 2 * 8 + 2 * lane.c + four % 2 < key) continue;
#pragma unroll
      for (int i = 0; i < V8; ++i) set<uint4>(here, VALUES, four * V8 + i, fresh.v + 64 * i + 8 * lane.g);
      if constexpr (V4) set<uint2>(here, VALUE_HALVES, four, fresh.v + 64 * V8 + 4 * lane.g);
      if constexpr (V2) set<u32>(here, VALUE_QUARTERS, four, fresh.v + 64 * V8 + 32 * V4 + 2 * lane.g);
    }
  }

 private:
  template <class T>
  __device__ __forceinline__ static void set(u8* here, int kind, int number, const scalar* from) {
    piece<T>(here, kind, number) = *reinterpret_cast<const T*>(from);
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    rope_staged(scalar* out, const scalar* qkv, const i64* positions, const float* cos_sin, const scalar* q_norm,
                const scalar* k_norm, scalar* k_cache, scalar* v_cache, const i64* slots, const int* block_tables,
                const int* cu_query_lens, const int* kv_lens, const float* sinks, float4* partial,
                float2* partial_stats, int* counters, i64 qkv_stride, i64 table_stride, i64 k_block_stride,
                i64 k_slot_stride, i64 v_block_stride, i64 v_slot_stride, int kv_heads, int table_width, int window,
                int least_share, float eps, float offset, float scale, float softcap) {
  const int request = blockIdx.z;
  const Lane lane = this_lane();
  const int* table = block_tables + request * table_stride;
  follow_older();
  const bool guessed = can_guess(window);
  Pages pages[STAGES] = {};
  if (guessed) guess_pages(pages, table, table_width, lane.warp);
  const i64 position = positions[request], slot = slots[request];
  Share mine;
  if (!take_share(mine, cu_query_lens, kv_lens, request, kv_heads, window, least_share)) return;
  const Source source = {qkv + request * qkv_stride,
                         q_norm,
                         k_norm,
                         cos_sin,
                         kept_at(k_cache, slot, mine, k_block_stride, k_slot_stride),
                         kept_at(v_cache, slot, mine, v_block_stride, v_slot_stride),
                         mine.kv_head,
                         kv_heads,
                         mine.row0,
                         min(ROWS, mine.rows - mine.row0),
                         mine.past / 16 < mine.stop,
                         eps,
                         offset};
  const Unit unit = this_unit();
  Ready ready = make_ready(source, position, unit);
  const Cache cache = {k_cache + mine.kv_head * HEAD_DIM, v_cache + mine.kv_head * V_DIM, table, k_block_stride,
                       k_slot_stride, v_block_stride, v_slot_stride, last_kept(mine)};
  DYNAMIC_SHARED(memory);
  Walk walk(cache, lane, mine, memory, pages, guessed);
  walk.start([](int) { return true; });
  walk.find_next();

  __shared__ Fresh fresh;
  follow();
  turn_all(fresh, source, ready, unit);
  Queries a;
  take_queries(a, fresh, mine, window, lane);
  Sums sums;
  clear(sums);
  walk.go(sums, a, scale, softcap, Newest{fresh, lane, mine.past});

  const Rows rows = {out, sinks, partial, partial_stats, counters, mine.row0, source.rows,
                     mine.q_start, mine.kv_head, kv_heads, mine.active};
  meet(rows, sums, [&](int warp) { return slab_of(memory, warp); }, lane);
}

#endif
