// paged_attention for few query tokens a request: split-KV flash decoding on tensor cores, 16-bit types, for head sizes
// up to 128, whose tiles fit in registers. Shapes, launch and numbers: paged.cuh.
#include "common.cuh"

#if DTYPE != F32
#include "paged_tiles.cuh"

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
  Pages pages[2] = {};
  if (guessed) guess_pages(pages, table, table_width, lane.warp);
  Share mine;
  if (!take_share(mine, cu_query_lens, kv_lens, request, kv_heads, window, least_share)) return;
  const Cache cache = {k_cache + mine.kv_head * HEAD_DIM, v_cache + mine.kv_head * V_DIM, table, k_block_stride,
                       k_slot_stride, v_block_stride, v_slot_stride, mine.last};

  // Keys of earlier steps need not wait for the kernel that writes this step's; `fresh` keys before the request's new
  // ones may be this step's too, of a request that it shares blocks with.
  Walk walk(cache, lane, mine, pages, guessed);
  const bool old = PDL && (walk.tile + 1) * 16 <= mine.past - fresh;
  if (old) walk.load();
  walk.fetch_first();
  follow();
  if (!old) walk.load();

  Queries a;
  load_queries(a, q, q_stride, mine, window, lane);
  Sums sums;
  clear(sums);
  walk.go(sums, a, scale, softcap);

  alignas(16) __shared__ float slabs[WARPS][ROWS * PITCH];
  const Rows rows = {out, sinks, partial, partial_stats, counters, mine.row0, min(ROWS, mine.rows - mine.row0),
                     mine.q_start, mine.kv_head, kv_heads, mine.active};
  meet(rows, sums, [&](int warp) { return slabs[warp]; }, lane);
}

#endif
