// paged_attention without tensor cores: split-KV flash attention in float32, for float32 models. Context and generation
// requests alike.
//
// Shapes: q [tokens, KV_HEADS * GROUP, HEAD_DIM], tokens q_stride apart; k_cache, v_cache [blocks, BLOCK_SIZE,
//   kv_heads, dim], heads contiguous; block_tables int32 [requests, table_stride]; cu_query_lens int32
//   [requests + 1]; kv_lens int32 [requests]; sinks float32 [heads] or null; out [tokens, heads * V_DIM]; partial
//   [requests, columns, splits, ROWS, V_DIM], partial_stats [requests, columns, splits, ROWS]. Dims are whole quads.
// Launch: block WARPS * 32, grid (kv_heads * row tiles, splits, requests), as paged.cuh has it: a block walks its split
//   of the keys that its ROWS rows see, its warps take tiles of 32 keys in turn, the last of a request's blocks
//   combines (counters return to zero). With BY_ROWS, for prompts, each warp has ROWS rows of its own and walks all
//   their keys, which the others of the block find in L1; splits is 1.
// Numbers: everything in float32.
//
// For the scores 8 lanes share a key, so that 4 keys are read at once, and the sum over the lanes is dealt out: each lane
// ends with the scores of one key of the tile. For the output each lane keeps V_LANES-th packs of all rows' sums; where
// a value row needs fewer than 32 lanes, several keys are added at once.
#include "common.cuh"

#ifndef HEAD_DIM
#define HEAD_DIM 128
#endif
#ifndef V_DIM
#define V_DIM HEAD_DIM
#endif
#ifndef GROUP
#define GROUP 4
#endif
#ifndef ROWS
#define ROWS 4
#endif
#ifndef BLOCK_SIZE
#define BLOCK_SIZE 16
#endif
#ifndef SOFTCAP
#define SOFTCAP 0
#endif
#ifndef WARPS
#define WARPS 8
#endif
#ifndef BY_ROWS  // 1: each warp has rows of its own; 0: the block's warps share rows, and the keys between them
#define BY_ROWS 0
#endif
#ifndef KEYS_AT_ONCE  // steps whose loads are in flight at once
#define KEYS_AT_ONCE (ROWS * HEAD_DIM > 256 ? 1 : 2)
#endif
#ifndef VALUES_AT_ONCE
#define VALUES_AT_ONCE (ROWS > 4 ? 2 : 4)
#endif
#ifndef MIN_BLOCKS  // resident blocks the registers must leave room for
#define MIN_BLOCKS 2
#endif

constexpr int THREADS = WARPS * 32;
static_assert(HEAD_DIM % 4 == 0 && V_DIM % 4 == 0, "whole quads");

#include "joined.cuh"

constexpr int KEYS = 32;    // of a tile
constexpr int K_LANES = 8;  // that share a key
constexpr int K_PACKS = HEAD_DIM / 4;
constexpr int K_EACH = (K_PACKS + K_LANES - 1) / K_LANES;
constexpr int V_LANES = QUADS > 16 ? 32 : QUADS > 8 ? 16 : 8;  // that share a value row
constexpr int V_KEYS = 32 / V_LANES;
constexpr int V_EACH = (QUADS + V_LANES - 1) / V_LANES;
constexpr int SHARERS = BY_ROWS ? 1 : WARPS;
constexpr int PARTIES = WARPS / SHARERS;
constexpr int AT_ONCE_K = KEYS_AT_ONCE, AT_ONCE_V = VALUES_AT_ONCE;  // as a pragma takes them

__device__ __forceinline__ float4 load4(const scalar* p) {
  const Pack<4> x = load<4>(p);
  return make_float4(to_float(x.at[0]), to_float(x.at[1]), to_float(x.at[2]), to_float(x.at[3]));
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(ALL, x, step));
  return x;
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    paged_simt(scalar* out, const scalar* q, const scalar* k_cache, const scalar* v_cache, const int* block_tables,
               const int* cu_query_lens, const int* kv_lens, const float* sinks, float4* partial, float2* partial_stats,
               int* counters, i64 q_stride, i64 table_stride, i64 k_block_stride, i64 k_slot_stride, i64 v_block_stride,
               i64 v_slot_stride, int kv_heads, int first_request, int window, int least_share, float scale,
               float softcap) {
  follow();
  const int request = first_request + blockIdx.z;
  const int kv_head = blockIdx.x % kv_heads;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, party = warp / SHARERS;
  const int row0 = (blockIdx.x / kv_heads * PARTIES + party) * ROWS;
  const int split = blockIdx.y, splits = gridDim.y;
  const int q_start = cu_query_lens[request];
  const int q_len = cu_query_lens[request + 1] - q_start;
  const int rows = q_len * GROUP;
  if (row0 >= rows) return;

  // Keys that some row of the tile sees, and this block's share of them, in tiles.
  const int kv_len = max(kv_lens[request], q_len);
  const int rows_here = min(ROWS, rows - row0);
  const int first_position = kv_len - q_len + row0 / GROUP;
  const int last_position = kv_len - q_len + (row0 + rows_here - 1) / GROUP;
  const int begin = window > 0 ? max(0, first_position - window + 1) / KEYS : 0;
  const int end = last_position / KEYS + 1;
  const int share = max((end - begin + splits - 1) / splits, least_share);
  const int active = (end - begin + share - 1) / share;
  if (split >= active) return;
  const int stop = min(begin + (split + 1) * share, end);

  const int* table = block_tables + request * table_stride;
  k_cache += kv_head * HEAD_DIM;
  v_cache += kv_head * V_DIM;

  alignas(16) __shared__ float all_queries[PARTIES][ROWS][HEAD_DIM];
  float(&queries)[ROWS][HEAD_DIM] = all_queries[party];
  for (int item = threadIdx.x % (SHARERS * 32); item < ROWS * HEAD_DIM; item += SHARERS * 32) {
    const int r = item / HEAD_DIM, row = row0 + min(r, rows_here - 1);
    const scalar* source = q + (q_start + row / GROUP) * q_stride + (kv_head * GROUP + row % GROUP) * HEAD_DIM;
    queries[r][item % HEAD_DIM] = to_float(source[item % HEAD_DIM]);
  }
  if (SHARERS == 1)
    __syncwarp();
  else
    __syncthreads();

  float top[ROWS], sum[ROWS];  // running maximum in base 2, and this lane's part of the sum
  float4 o[ROWS][V_EACH];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    top[r] = NEG_INF;
    sum[r] = 0;
#pragma unroll
    for (int i = 0; i < V_EACH; ++i) o[r][i] = make_float4(0, 0, 0, 0);
  }

  for (int tile = begin + split * share + warp % SHARERS; tile < stop; tile += SHARERS) {
    // This lane's key is tile * 32 + lane; keys beyond the last read it again, and their scores are masked.
    const int mine = min(tile * KEYS + lane, last_position);
    const int page = __ldg(table + mine / BLOCK_SIZE), slot = mine % BLOCK_SIZE;

    float p[ROWS] = {};  // scores of this lane's key, then probabilities
#pragma unroll AT_ONCE_K
    for (int step = 0; step < KEYS * K_LANES / 32; ++step) {
      const int key = step * (32 / K_LANES) + lane / K_LANES;  // of the tile
      const scalar* row = k_cache + __shfl_sync(ALL, page, key) * k_block_stride +
                          __shfl_sync(ALL, slot, key) * k_slot_stride;
      float dots[ROWS] = {};
#pragma unroll
      for (int i = 0; i < K_EACH; ++i) {
        const int pack = i * K_LANES + lane % K_LANES;
        if (K_PACKS % K_LANES && pack >= K_PACKS) break;
        const float4 k = load4(row + pack * 4);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          const float4 x = *reinterpret_cast<const float4*>(&queries[r][pack * 4]);
          dots[r] += x.x * k.x + x.y * k.y + x.z * k.z + x.w * k.w;
        }
      }
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const float whole = group_sum<K_LANES>(dots[r]);
        // Lane l of the tile wants key l: the sum of lanes l % 4 * 8 .. + 7 in step l / 4.
        const float given = __shfl_sync(ALL, whole, lane % (32 / K_LANES) * K_LANES);
        if (lane / (32 / K_LANES) == step) p[r] = given;
      }
    }

#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const int position = kv_len - q_len + (row0 + min(r, rows_here - 1)) / GROUP, key = tile * KEYS + lane;
#if SOFTCAP
      p[r] = softcap * LOG2E * tanhf(p[r] * scale / softcap);
#else
      p[r] *= scale * LOG2E;
#endif
      if (key > position || (window > 0 && key <= position - window)) p[r] = NEG_INF;
      const float high = fmaxf(top[r], warp_max(p[r]));
      const float base = high == NEG_INF ? 0.0f : high;
      if (high > top[r]) {
        const float fade = exp2_fast(top[r] - base);
        sum[r] *= fade;
#pragma unroll
        for (int i = 0; i < V_EACH; ++i) o[r][i] = scaled(o[r][i], fade);
        top[r] = high;
      }
      p[r] = exp2_fast(p[r] - base);
      sum[r] += p[r];
    }

#pragma unroll AT_ONCE_V
    for (int step = 0; step < KEYS / V_KEYS; ++step) {
      const int key = step * V_KEYS + lane / V_LANES;
      const scalar* row = v_cache + __shfl_sync(ALL, page, key) * v_block_stride +
                          __shfl_sync(ALL, slot, key) * v_slot_stride;
      float factors[ROWS];
#pragma unroll
      for (int r = 0; r < ROWS; ++r) factors[r] = __shfl_sync(ALL, p[r], key);
#pragma unroll
      for (int i = 0; i < V_EACH; ++i) {
        const int pack = i * V_LANES + lane % V_LANES;
        if (QUADS % V_LANES && pack >= QUADS) break;
        const float4 v = load4(row + pack * 4);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) add(o[r][i], v, factors[r]);
      }
    }
  }

  const Rows own = {out, sinks, partial, partial_stats, counters, row0, rows_here, q_start, kv_head, kv_heads, active};
  // Rows of a warp alone are done; the warps of a block that share rows leave maximum, sum and unscaled output.
  alignas(16) __shared__ float4 slabs[SHARERS][ROWS][QUADS];
  __shared__ float2 stats[SHARERS][ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const float all = warp_sum(sum[r]);
    if (SHARERS > 1 && lane == 0) stats[warp][r] = make_float2(top[r], all);
#pragma unroll
    for (int i = 0; i < V_EACH; ++i) {
      float4& x = o[r][i];
#pragma unroll
      for (int step = V_LANES; step < 32; step *= 2) {
        x.x += __shfl_xor_sync(ALL, x.x, step);
        x.y += __shfl_xor_sync(ALL, x.y, step);
        x.z += __shfl_xor_sync(ALL, x.z, step);
        x.w += __shfl_xor_sync(ALL, x.w, step);
      }
      const int pack = i * V_LANES + lane;
      if (lane >= V_LANES || pack >= QUADS) continue;
      if (SHARERS > 1)
        slabs[warp][r][pack] = x;
      else if (r < rows_here)
        finish(own, r, pack, x, top[r], all);
    }
  }
  if (SHARERS == 1) return;
  __syncthreads();
  join(own, stats, [&](int w, int r, int quad) { return slabs[w][r][quad]; });
}
