// rope_and_attend where every request generates one token: q/k norm, rotary embedding, paged K/V write and split-KV
// flash decoding in one kernel, 16-bit types, for head sizes up to 128, whose tiles fit in registers. Shapes: rope_heads.cuh;
// launch and numbers: paged.cuh and rotary.cuh.
#include "common.cuh"

#if DTYPE != F32
#include "rope_heads.cuh"
#include "paged_tiles.cuh"

// Keys from the newest on are not in the cache: they become the newest, whose scores count once.
struct Newest {
  const Fresh& fresh;
  const Lane& lane;
  int key;

  __device__ __forceinline__ void keys(Keys& k, int tile) const {
    if (tile * 16 + 15 < key) return;
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (tile * 16 + half * 8 + lane.g >= key) take_key(k[half], fresh.k, lane, Plain());
  }
  __device__ __forceinline__ void values(Values& v, int tile) const {
    if (tile * 16 + 15 < key) return;
#pragma unroll
    for (int four = 0; four < 4; ++four)
      if (tile * 16 + four / 2 * 8 + 2 * lane.c + four % 2 >= key)
        take_value(v[four / 2][four % 2], fresh.v, lane, Plain());
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    rope_decode(scalar* out, const scalar* qkv, const i64* positions, const float* cos_sin, const scalar* q_norm,
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
  Pages pages[2] = {};
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
  Walk walk(cache, lane, mine, pages, guessed);
  walk.load();
  if (EARLY) walk.fetch_first();

  __shared__ Fresh fresh;
  follow();
  if (!EARLY) walk.fetch_first();
  turn_all(fresh, source, ready, unit);
  Queries a;
  take_queries(a, fresh, mine, window, lane);
  Sums sums;
  clear(sums);
  walk.go(sums, a, scale, softcap, Newest{fresh, lane, mine.past});

  alignas(16) __shared__ float slabs[WARPS][USED_ROWS * PITCH];
  const Rows rows = {out, sinks, partial, partial_stats, counters, mine.row0, source.rows,
                     mine.q_start, mine.kv_head, kv_heads, mine.active};
  meet(rows, sums, [&](int warp) { return slabs[warp]; }, lane);
}

#endif
