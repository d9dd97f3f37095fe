// paged_attention for few query tokens a request on 9.0: split-KV flash decoding whose tiles of keys come by tensor
// copies. Shapes, launch and numbers: paged.cuh; head sizes multiples of 64, blocks of whole tiles.
//
// Each warp has STAGES tiles of 16 keys under way: one lane asks for a tile as soon as the one in its place is done, so
// that no thread spends instructions or registers on loads, and the order in memory is the swizzle of the copies.
// Scores are keys x rows, and values dims x rows: keys and dims, of which there are always 16, are mma's rows, and
// queries its 8 columns. Weights are relative to a maximum that is renewed when a score exceeds it by SLACK, which
// seldom happens after the first tile, and turned between lanes from one product to the other.
#include "common.cuh"
#include "hopper.cuh"

#ifndef STAGES
#define STAGES 3
#endif

#if DTYPE != F32 && HAS_TILE_COPIES
#include "paged.cuh"

constexpr int SPAN = 64, BOX_ROW = 128;  // values of a row of a box, and their bytes: the span of the swizzle
constexpr int K_BYTES = 16 * HEAD_DIM * 2, TILE_BYTES = K_BYTES + 16 * V_DIM * 2;
constexpr int GROUPS = ROWS / 8;     // of rows, mma's columns
constexpr float SLACK = 8.0f;        // weights are at most 2^8
constexpr float LOWEST = -1e30f;     // of no key: below every score, and a number
static_assert(HEAD_DIM % SPAN == 0 && V_DIM % SPAN == 0 && BLOCK_SIZE % 16 == 0, "whole boxes");
static_assert(STAGES * TILE_BYTES >= ROWS * PITCH * 4, "a warp's sums find room where its tiles were");

// All of the block's dynamic shared memory.
struct Shared {
  u8 tiles[WARPS][STAGES][TILE_BYTES];  // in the end the warps' sums: float [ROWS][PITCH]
  Barrier full[WARPS][STAGES];
};

// A warp's tiles, every WARPS-th of the block's.
struct Tiles {
  const TensorMap &k_cache, &v_cache;
  u8* stages;
  Barrier* full;
  const int* table;
  int table_width, kv_head, first, count, lane;
  int pages;  // lane i: of this warp's tile i, i + 32, ...

  __device__ __forceinline__ int tile(int i) const { return first + i * WARPS; }

  __device__ __forceinline__ void find(int i) {
    pages = __ldg(table + min(tile(i + lane) * 16 / BLOCK_SIZE, table_width - 1));
  }

  __device__ __forceinline__ void bring(int i, int stage, u64 policy) {
    if (i > 0 && i % 32 == 0) find(i);
    const int page = __shfl_sync(ALL, pages, i % 32), row = tile(i) * 16 % BLOCK_SIZE;
    if (lane != 0) return;
    u8* to = stages + stage * TILE_BYTES;
    arrive_expecting(full + stage, TILE_BYTES);
    copy_page(to, k_cache, page, row, kv_head * (HEAD_DIM / SPAN), full + stage, policy);
    copy_page(to + K_BYTES, v_cache, page, row, kv_head * (V_DIM / SPAN), full + stage, policy);
  }
};

typedef u32 Columns[STEPS][GROUPS][2];   // queries as mma's columns, in the order of their dims
typedef float Products[GROUPS][4];       // lane 4g + c: keys g and g + 8 (the last two), rows 2c and 2c + 1

// What a lane knows of its rows, 8n + 2c + i.
struct Visible {
  int from[GROUPS][2], to[GROUPS][2];  // the range of keys that they see
};

struct Sum {
  float top[GROUPS][2], sum[GROUPS][2];  // in base 2: what weights are relative to; this lane's part of their sum
  float o[V_DIM / 16][GROUPS][4];        // dims g and g + 8 (the last two) of 16, rows 2c and 2c + 1
};

__device__ __forceinline__ void load_columns_of(Columns& q, const scalar* source, i64 q_stride, const Share& mine,
                                                const Lane& lane) {
#pragma unroll
  for (int n = 0; n < GROUPS; ++n) {
    const int row = min(mine.row0 + n * 8 + lane.g, mine.rows - 1);
    const scalar* from =
        source + (mine.q_start + row / GROUP) * q_stride + (mine.kv_head * GROUP + row % GROUP) * HEAD_DIM + 2 * lane.c;
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
#pragma unroll
      for (int i = 0; i < 2; ++i) q[step][n][i] = *reinterpret_cast<const u32*>(from + 16 * step + 8 * i);
  }
}

__device__ __forceinline__ Visible visible(const Share& mine, int window, const Lane& lane) {
  Visible all;
#pragma unroll
  for (int n = 0; n < GROUPS; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = min(mine.row0 + n * 8 + 2 * lane.c + i, mine.rows - 1);
      all.to[n][i] = mine.past + row / GROUP;
      all.from[n][i] = window > 0 ? all.to[n][i] - window + 1 : 0;
    }
  return all;
}

// Where in the first span of 16 rows a lane's row of four 8 x 8 matrices lies: `low` matrices 1 and 3 have the rows or
// (not low) the columns after those of 0 and 2; 16 columns further are 32 bytes, xor.
__device__ __forceinline__ int matrix_place(bool low) {
  const int lane = threadIdx.x % 32, matrix = lane / 8, r = lane % 8;
  const int rows = low ? matrix % 2 : matrix / 2, columns = low ? matrix / 2 : matrix % 2;
  return (rows * 8 + r) * BOX_ROW + ((columns ^ r) << 4);
}

__device__ __forceinline__ const scalar* place_of(const u8* box, int step, int place) {
  return reinterpret_cast<const scalar*>(box + step / 4 * 16 * BOX_ROW + (place ^ step % 4 << 5));
}

__device__ __forceinline__ void score(Products& s, const u8* keys, const Columns& q, int place) {
  Products odd = {};
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    u32 k[4];
    load_matrices(k, place_of(keys, step, place));
#pragma unroll
    for (int n = 0; n < GROUPS; ++n) {
      float(&d)[4] = step % 2 ? odd[n] : s[n];  // two chains of products
      mma(d[0], d[1], d[2], d[3], k[0], k[1], k[2], k[3], q[step][n][0], q[step][n][1]);
    }
  }
#pragma unroll
  for (int n = 0; n < GROUPS; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) s[n][i] += odd[n][i];
}

// In base 2; of keys that a row does not see, unless all see all, minus infinity.
__device__ __forceinline__ void finish_scores(Products& s, const Visible& rows, bool all, int tile, int g, float scale,
                                              float softcap) {
#pragma unroll
  for (int n = 0; n < GROUPS; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#if SOFTCAP
      s[n][i] = softcap * LOG2E * tanhf(s[n][i] * scale / softcap);
#else
      s[n][i] *= scale * LOG2E;
#endif
      const int key = tile * 16 + g + i / 2 * 8;
      if (!all && (key > rows.to[n][i % 2] || key < rows.from[n][i % 2])) s[n][i] = NEG_INF;
    }
}

// Over the lanes that have other keys of the same rows.
__device__ __forceinline__ float most_of_keys(float x) {
#pragma unroll
  for (int step = 4; step < 32; step *= 2) x = fmaxf(x, __shfl_xor_sync(ALL, x, step));
  return x;
}

// Weights become relative to the greatest scores so far where one exceeds the earlier ones by far.
__device__ __forceinline__ void renew_tops(Sum& sum, const Products& s) {
  bool exceeds = false;
#pragma unroll
  for (int n = 0; n < GROUPS; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i) exceeds |= fmaxf(s[n][i], s[n][2 + i]) > sum.top[n][i] + SLACK;
  if (!__any_sync(ALL, exceeds)) return;
#pragma unroll
  for (int n = 0; n < GROUPS; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float top = fmaxf(sum.top[n][i], most_of_keys(fmaxf(s[n][i], s[n][2 + i])));
      const float fade = exp2_fast(sum.top[n][i] - top);
      sum.top[n][i] = top;
      sum.sum[n][i] *= fade;
#pragma unroll
      for (int m = 0; m < V_DIM / 16; ++m) {
        sum.o[m][n][i] *= fade;
        sum.o[m][n][2 + i] *= fade;
      }
    }
}

typedef u32 Weights16[GROUPS][2];  // of 16 keys, as mma's columns

__device__ __forceinline__ void soften_keys(Weights16& p, Sum& sum, Products& s) {
#pragma unroll
  for (int n = 0; n < GROUPS; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      s[n][i] = exp2_fast(s[n][i] - sum.top[n][i % 2]);
      sum.sum[n][i % 2] += s[n][i];
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) p[n][half] = turned(pack2(s[n][2 * half], s[n][2 * half + 1]));
  }
}

__device__ __forceinline__ void weigh_values(Sum& sum, const u8* values, const Weights16& p, int place) {
#pragma unroll
  for (int m = 0; m < V_DIM / 16; ++m) {
    u32 v[4];
    load_columns(v, place_of(values, m, place));
#pragma unroll
    for (int n = 0; n < GROUPS; ++n) {
      float(&d)[4] = sum.o[m][n];
      mma(d[0], d[1], d[2], d[3], v[0], v[1], v[2], v[3], p[n][0], p[n][1]);
    }
  }
}

// Values after a tile's first `keys` become zeros: what lies there may be no number, and counts with weight zero.
__device__ __forceinline__ void clear_beyond(u8* values, int keys) {
  constexpr int PACKS = BOX_ROW / 16;
  const int each = (16 - keys) * PACKS;
  for (int item = threadIdx.x % 32; item < V_DIM / SPAN * each; item += 32)
    *reinterpret_cast<uint4*>(values + item / each * 16 * BOX_ROW + keys * BOX_ROW + item % each * 16) =
        make_uint4(0, 0, 0, 0);
  __syncwarp();
}

__device__ __forceinline__ void leave_sums(float* slab, float2 (&stats)[ROWS], const Sum& sum, const Lane& lane) {
#pragma unroll
  for (int n = 0; n < GROUPS; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = n * 8 + 2 * lane.c + i;
      float all = sum.sum[n][i];
#pragma unroll
      for (int step = 4; step < 32; step *= 2) all += __shfl_xor_sync(ALL, all, step);
      if (lane.g == 0) stats[row] = make_float2(sum.top[n][i], all);
#pragma unroll
      for (int m = 0; m < V_DIM / 16; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          slab[row * PITCH + m * 16 + half * 8 + lane.g] = sum.o[m][n][2 * half + i];
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    paged_streamed(scalar* out, const scalar* q, TENSOR_MAP k_cache, TENSOR_MAP v_cache, const int* block_tables,
                   const int* cu_query_lens, const int* kv_lens, const float* sinks, float4* partial,
                   float2* partial_stats, int* counters, i64 q_stride, i64 table_stride, int kv_heads,
                   int first_request, int table_width, int window, int least_share, int fresh, float scale,
                   float softcap) {
  DYNAMIC_SHARED(memory);
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const int request = first_request + blockIdx.z;
  const Lane lane = this_lane();
  const u64 policy = read_once_policy();
  follow_older();
  Tiles tiles = {k_cache, v_cache, shared.tiles[lane.warp][0], shared.full[lane.warp],
                 block_tables + request * table_stride, table_width, 0, lane.warp, 0, int(threadIdx.x) % 32};
  const bool guessed = can_guess(window);
  if (guessed) tiles.find(0);
  if (tiles.lane == 0) {
    for (int i = 0; i < STAGES; ++i) barrier_init(tiles.full + i, 1);
    barriers_ready();
    prefetch_map(k_cache);
    prefetch_map(v_cache);
  }
  __syncwarp();
  Share mine;
  if (!take_share(mine, cu_query_lens, kv_lens, request, kv_heads, window, least_share)) return;
  tiles.kv_head = mine.kv_head;
  tiles.first = mine.begin + lane.warp;
  tiles.count = max(0, mine.stop - tiles.first + WARPS - 1) / WARPS;
  if (!guessed) tiles.find(0);

  // Keys of earlier steps need not wait for the kernel that writes this step's; `fresh` keys before the request's new
  // ones may be this step's too, of a request that it shares blocks with.
  const int early = min(tiles.count, STAGES), settled = PDL ? mine.past - fresh : 0;
  int brought = 0;
  for (; brought < early && (tiles.tile(brought) + 1) * 16 <= settled; ++brought) tiles.bring(brought, brought, policy);
  follow();
  for (; brought < early; ++brought) tiles.bring(brought, brought, policy);

  Columns queries;
  load_columns_of(queries, q, q_stride, mine, lane);
  const Visible rows = visible(mine, window, lane);
  const int keys_place = matrix_place(true), values_place = matrix_place(false);
  const int seen_by_all = mine.past + mine.row0 / GROUP;  // the last key that every row sees
  const int unseen = window > 0 ? mine.last - window + 1 : 0;  // keys before it, not every row sees
  Sum sum = {};
#pragma unroll
  for (int n = 0; n < GROUPS; ++n) sum.top[n][0] = sum.top[n][1] = LOWEST;
  for (int i = 0, stage = 0, parity = 0; i < tiles.count; ++i) {
    const int tile = tiles.tile(i);
    u8* const here = tiles.stages + stage * TILE_BYTES;
    const bool all = tile * 16 + 15 <= seen_by_all && tile * 16 >= unseen;
    wait_here(tiles.full + stage, parity);
    if (tile * 16 + 15 > mine.last) clear_beyond(here + K_BYTES, mine.last + 1 - tile * 16);
    Products s = {};
    score(s, here, queries, keys_place);
    finish_scores(s, rows, all, tile, lane.g, scale, softcap);
    renew_tops(sum, s);
    Weights16 p;
    soften_keys(p, sum, s);
    weigh_values(sum, here + K_BYTES, p, values_place);
    __syncwarp();
    if (i + STAGES < tiles.count) tiles.bring(i + STAGES, stage, policy);
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }

  __shared__ float2 stats[WARPS][ROWS];
  const auto slab = [&](int warp) { return reinterpret_cast<float*>(shared.tiles[warp][0]); };
  leave_sums(slab(lane.warp), stats[lane.warp], sum, lane);
  __syncthreads();
  const Rows result = {out, sinks, partial, partial_stats, counters, mine.row0, min(ROWS, mine.rows - mine.row0),
                       mine.q_start, mine.kv_head, kv_heads, mine.active};
  join(result, stats, [&](int warp, int row, int quad) {
    return *reinterpret_cast<const float4*>(slab(warp) + row * PITCH + quad * 4);
  });
}

#endif
