// paged_attention over a latent cache for 9.0: tiles of keys by tensor copies, scores and values by products of tiles.
//
// Shapes: those of latent_attention.cu, the cache contiguous; dims multiples of 64. partial float32 [requests, row
//   tiles, groups, ROWS, V_DIM], and partial_stats of it [..., 2].
// Launch: block WARPGROUPS * 128 + BRINGERS, clusters of CLUSTER blocks, grid (groups * CLUSTER, row tiles, requests).
//   A block has ROWS rows, a request's tokens times heads. All blocks of a row tile take tiles of keys in turn; those
//   of a cluster join their sums through shared memory, and where there are more groups than one, merge_latent follows.
// Numbers: those of latent_attention.cu.
//
// One warp brings tiles of 64 keys, STAGES under way. Scores come as keys x rows: products of four warps have 64 rows,
// and keys are never short of that, as heads may be. Softmax goes over keys, so that a warpgroup's warps meet for the
// maximum alone; its weights go to shared memory, and values x rows are the product of the same tile's columns with
// them. With several warpgroups each has its rows of the scores, and its part of the values.
#ifndef KEYS
#define KEYS 64
#endif
#include "common.cuh"
#include "hopper.cuh"
#include "latent.cuh"
#include "turned.cuh"

#ifndef BLOCK_SIZE
#define BLOCK_SIZE 16
#endif
#ifndef WARPGROUPS
#define WARPGROUPS 1
#endif
#ifndef STAGES
#define STAGES 2
#endif
#ifndef CLUSTER
#define CLUSTER 1
#endif

#if DTYPE != F32 && HAS_TILE_COPIES

constexpr int SPAN = 64, BOX_ROW = 128;  // values of a row of a box, and their bytes: the span of the swizzle
constexpr int SPANS = HEAD_DIM / SPAN, VALUE_SPANS = V_DIM / SPAN;
constexpr int GROUP_BYTES = SPANS * 8 * BOX_ROW;  // of 8 keys, that one copy brings
constexpr int TILE_BYTES = KEYS / 8 * GROUP_BYTES, QUERY_BYTES = SPANS * ROWS * BOX_ROW;
constexpr int THREADS = WARPGROUPS * 128;  // that multiply
constexpr bool HANDOVER = ROWS * WARPGROUPS > 64;    // they want more registers than an even share
constexpr int BRINGERS = HANDOVER ? 128 : 32;        // one warp works; a warpgroup can give registers to the others
constexpr int COLUMNS = ROWS / WARPGROUPS / 8;      // a warpgroup's rows in the scores, by 8
constexpr int SPANS_EACH = VALUE_SPANS / WARPGROUPS;  // and its part of the values
constexpr int PITCH = V_DIM + 4;                    // floats from the sums of one row to the next
static_assert(HEAD_DIM % SPAN == 0 && V_DIM % (SPAN * WARPGROUPS) == 0 && V_DIM <= HEAD_DIM, "whole spans");
static_assert(KEYS == 64 && ROWS % (8 * WARPGROUPS) == 0 && BLOCK_SIZE % 8 == 0, "whole parts");
static_assert(ROWS * PITCH * 4 <= STAGES * TILE_BYTES, "the sums find room where the tiles were");

// All of the block's shared memory.
struct Shared {
  u8 tiles[STAGES][TILE_BYTES];  // in the end the sums: float [ROWS][PITCH]
  u8 queries[SPANS][ROWS * BOX_ROW];
  u8 weights[ROWS * BOX_ROW];  // of the values: 64 keys of each row, swizzled as boxes are
  float tops[4][ROWS];         // by warp of a warpgroup
  float fades[ROWS];
  float2 stats[ROWS];  // maximum in base 2 and sum of weights, of the block
  Barrier full[STAGES], empty[STAGES], queries_full;
};

// A block's tiles: the first is known before lengths are.
struct Work {
  int first, stride, count, row0;
  __device__ __forceinline__ int tile(int i) const { return first + i * stride; }
};

// A warp's: lane i < 8 brings keys 8i .. 8i + 7 of a tile.
struct Bringer {
  Shared& s;
  const TensorMap& cache;
  const int* table;
  int table_width, lane, page;  // where this lane's keys of the next tile lie
  u64 policy;

  __device__ __forceinline__ int key(int tile) const { return tile * KEYS + lane % 8 * 8; }

  __device__ __forceinline__ void find(int tile) { page = table[min(key(tile) / BLOCK_SIZE, table_width - 1)]; }

  __device__ __forceinline__ void bring(int i, int tile, int next, int last) {
    const int groups = min(KEYS, last + 1 - tile * KEYS + 7) / 8, row = page * BLOCK_SIZE + key(tile) % BLOCK_SIZE;
    Barrier* full = &s.full[i % STAGES];
    if (lane == 0) arrive_expecting(full, groups * GROUP_BYTES);
    __syncwarp();
    if (lane < groups) copy_spans(s.tiles[i % STAGES] + lane * GROUP_BYTES, cache, row, full, policy);
    find(next);
  }
};

// `settled` keys are older than the kernel before this one.
__device__ __forceinline__ void produce(Bringer& bringer, const TensorMap& q, const Share& mine, const Work& work,
                                        int settled) {
  Shared& s = bringer.s;
  int i = 0;
  for (; PDL && i < min(work.count, STAGES) && (work.tile(i) + 1) * KEYS <= settled; ++i)
    bringer.bring(i, work.tile(i), work.tile(i + 1), mine.last);
  follow();
  if (bringer.lane == 0 && work.count > 0) {
    arrive_expecting(&s.queries_full, QUERY_BYTES);
    const u64 often = read_often_policy();
    for (int span = 0; span < SPANS; ++span)
      copy_box(s.queries[span], q, mine.q_start * HEADS + work.row0, span * SPAN, &s.queries_full, often);
  }
  __syncwarp();
  for (; i < work.count; ++i) {
    if (i >= STAGES) wait_for(&s.empty[i % STAGES], (i / STAGES + 1) % 2);
    bringer.bring(i, work.tile(i), work.tile(i + 1), mine.last);
  }
}

// One of the threads that multiply: lane 4g + c of warp `warp` of warpgroup `team`. It has keys 16 warp + g and + 8 of
// a tile, and of every 8 of its warpgroup's rows 2c and 2c + 1.
struct Place {
  int team, warp, g, c;
  __device__ __forceinline__ int row(int n) const { return team * COLUMNS * 8 + n * 8 + 2 * c; }
};

typedef float Scores[COLUMNS][4];
typedef float Values[SPANS_EACH][ROWS / 8][4];

struct Running {
  float top[COLUMNS][2], sum[COLUMNS][2];  // maximum in base 2; this thread's part of the sum
};

// Values of keys that no row sees are zeros from here on: what lies there may be no number.
__device__ __forceinline__ void clear_beyond(u8* tile, int keys) {
  constexpr int PACKS = VALUE_SPANS * 8;
  for (int item = threadIdx.x; item < (KEYS - keys) * PACKS; item += THREADS) {
    const int key = keys + item / PACKS, pack = item % PACKS;
    *reinterpret_cast<uint4*>(tile + key / 8 * GROUP_BYTES + pack / 8 * 8 * BOX_ROW + key % 8 * BOX_ROW +
                              pack % 8 * 16) = make_uint4(0, 0, 0, 0);
  }
}

__device__ __forceinline__ void score(Scores& x, const Shared& s, const u8* tile, const Place& at) {
  const Groups keys = groups_at(tile, GROUP_BYTES);
  const Groups rows = groups_at(s.queries[0] + at.team * COLUMNS * 8 * BOX_ROW, 8 * BOX_ROW);
#pragma unroll
  for (int n = 0; n < COLUMNS; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) x[n][i] = 0;
  settle(x);
  open_products();
#pragma unroll
  for (int k = 0; k < HEAD_DIM; k += 16)
    multiply_groups<0>(x, keys.further(k / SPAN * 8 * BOX_ROW + k % SPAN * 2),
                       rows.further(k / SPAN * ROWS * BOX_ROW + k % SPAN * 2));
  finish_products();
  settle(x);
}

// Scores to base 2; those of keys after a row's own are -inf.
__device__ __forceinline__ void mask(Scores& x, const Share& mine, int row0, int tile, float factor, const Place& at) {
  const int key = tile * KEYS + at.warp * 16 + at.g;
  const bool all = tile * KEYS + KEYS - 1 <= mine.past + row0 / HEADS;
#pragma unroll
  for (int n = 0; n < COLUMNS; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int sees = all ? key + 8 : mine.past + (row0 + at.row(n) + i) / HEADS;
      x[n][i] = key <= sees ? x[n][i] * factor : NEG_INF;
      x[n][2 + i] = key + 8 <= sees ? x[n][2 + i] * factor : NEG_INF;
    }
}

// Scores to weights; `fade` is what earlier sums of the warpgroup's rows are multiplied with.
__device__ __forceinline__ void soften(Scores& x, Running& r, float (&fade)[COLUMNS][2], Shared& s, const Place& at) {
#pragma unroll
  for (int n = 0; n < COLUMNS; ++n) {
    float high[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      high[i] = fmaxf(x[n][i], x[n][2 + i]);
#pragma unroll
      for (int step = 16; step > 2; step /= 2) high[i] = fmaxf(high[i], __shfl_xor_sync(ALL, high[i], step));
    }
    if (at.g == 0) *reinterpret_cast<float2*>(&s.tops[at.warp][at.row(n)]) = make_float2(high[0], high[1]);
  }
  meet(1, THREADS);
#pragma unroll
  for (int n = 0; n < COLUMNS; ++n) {
    float high[2] = {r.top[n][0], r.top[n][1]};
#pragma unroll
    for (int warp = 0; warp < 4; ++warp) {
      const float2 its = *reinterpret_cast<const float2*>(&s.tops[warp][at.row(n)]);
      high[0] = fmaxf(high[0], its.x);
      high[1] = fmaxf(high[1], its.y);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float base = high[i] == NEG_INF ? 0.0f : high[i];
      fade[n][i] = exp2_fast(r.top[n][i] - base);
      r.top[n][i] = high[i];
      x[n][i] = exp2_fast(x[n][i] - base);
      x[n][2 + i] = exp2_fast(x[n][2 + i] - base);
      r.sum[n][i] = r.sum[n][i] * fade[n][i] + x[n][i] + x[n][2 + i];
    }
  }
}

// Weights to shared memory, where the products of all warpgroups find them.
__device__ __forceinline__ void share(const Scores& x, const float (&fade)[COLUMNS][2], Shared& s, const Place& at) {
#pragma unroll
  for (int n = 0; n < COLUMNS; ++n) {
    const int lane = at.g * 4 + at.c, row = at.team * COLUMNS * 8 + n * 8 + lane % 8;
    const int pack = (at.warp * 2 + lane / 8 % 2) ^ row % 8;
    store_columns(reinterpret_cast<scalar*>(s.weights + row * BOX_ROW + pack * 16), pack2(x[n][0], x[n][1]),
                  pack2(x[n][2], x[n][3]));
    if (WARPGROUPS > 1 && at.warp == 0 && at.g == 0)
      *reinterpret_cast<float2*>(&s.fades[at.row(n)]) = make_float2(fade[n][0], fade[n][1]);
  }
  publish_writes();
  meet(1, THREADS);
}

__device__ __forceinline__ void fade_values(Values& o, const float (&own)[COLUMNS][2], const Shared& s,
                                            const Place& at) {
#pragma unroll
  for (int n = 0; n < ROWS / 8; ++n) {
    float2 fade;
    if constexpr (WARPGROUPS == 1)
      fade = make_float2(own[n][0], own[n][1]);
    else
      fade = *reinterpret_cast<const float2*>(&s.fades[n * 8 + 2 * at.c]);
#pragma unroll
    for (int span = 0; span < SPANS_EACH; ++span) {
      o[span][n][0] *= fade.x;
      o[span][n][1] *= fade.y;
      o[span][n][2] *= fade.x;
      o[span][n][3] *= fade.y;
    }
  }
}

__device__ __forceinline__ void settle(Values& o) {
#pragma unroll
  for (int span = 0; span < SPANS_EACH; ++span) settle(o[span]);
}

__device__ __forceinline__ void weigh(Values& o, const Shared& s, const u8* tile, const Place& at) {
  const Groups values = groups_at(tile + at.team * SPANS_EACH * 8 * BOX_ROW, GROUP_BYTES);
  const Groups rows = groups_at(s.weights, 8 * BOX_ROW);
  settle(o);
  open_products();
#pragma unroll
  for (int k = 0; k < KEYS; k += 16)
#pragma unroll
    for (int span = 0; span < SPANS_EACH; ++span)
      multiply_groups<1>(o[span], values.further(k / 8 * GROUP_BYTES + span * 8 * BOX_ROW), rows.further(k * 2));
  finish_products();
  settle(o);
}

// The block's sums to shared memory, where the cluster's blocks find them.
__device__ __forceinline__ void leave(const Values& o, const Running& r, Shared& s, const Place& at) {
#pragma unroll
  for (int n = 0; n < COLUMNS; ++n) {
    float all[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      all[i] = r.sum[n][i];
#pragma unroll
      for (int step = 16; step > 2; step /= 2) all[i] += __shfl_xor_sync(ALL, all[i], step);
      if (at.warp == 0 && at.g == 0) s.stats[at.row(n) + i].x = r.top[n][i];
    }
    if (at.g == 0) *reinterpret_cast<float2*>(&s.tops[at.warp][at.row(n)]) = make_float2(all[0], all[1]);
  }
  meet(1, THREADS);  // and no product reads a tile any more
  const int row = threadIdx.x;
  if (row < ROWS) s.stats[row].y = s.tops[0][row] + s.tops[1][row] + s.tops[2][row] + s.tops[3][row];
  float* sums = reinterpret_cast<float*>(s.tiles);
#pragma unroll
  for (int span = 0; span < SPANS_EACH; ++span)
#pragma unroll
    for (int n = 0; n < ROWS / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sums[(n * 8 + 2 * at.c + i % 2) * PITCH + (at.team * SPANS_EACH + span) * SPAN + at.warp * 16 + i / 2 * 8 +
             at.g] = o[span][n][i];
}

template <class T>
__device__ __forceinline__ T sums_of(const T* own, int rank) {
  if (CLUSTER > 1) return load_at(own, rank);
  return *own;
}

// Adds up this block's slice of the cluster's sums.
__device__ __forceinline__ void join(scalar* out, float* partial, float2* partial_stats, const Shared& s, int rows,
                                     int rank) {
  constexpr int PACKS = V_DIM / 8;
  const float* sums = reinterpret_cast<const float*>(s.tiles);
  const int all = rows * PACKS, last = all * (rank + 1) / CLUSTER;
  for (int item = all * rank / CLUSTER + threadIdx.x; item < last; item += THREADS) {
    const int row = item / PACKS, first = item % PACKS * 8;
    float2 its[CLUSTER];
    float peak = NEG_INF, total = 0, y[8] = {};
#pragma unroll
    for (int i = 0; i < CLUSTER; ++i) {
      its[i] = sums_of(&s.stats[row], i);
      peak = fmaxf(peak, its[i].x);
    }
#pragma unroll
    for (int i = 0; i < CLUSTER; ++i) {
      const float4* at = reinterpret_cast<const float4*>(sums + row * PITCH + first);
      float x[8];
      *reinterpret_cast<float4*>(x) = sums_of(at, i);
      *reinterpret_cast<float4*>(x + 4) = sums_of(at + 1, i);
      if (its[i].x == NEG_INF) continue;
      const float part = exp2_fast(its[i].x - peak);
      total += its[i].y * part;
#pragma unroll
      for (int j = 0; j < 8; ++j) y[j] += x[j] * part;
    }
    if (partial) {
      float4* to = reinterpret_cast<float4*>(partial + i64(row) * V_DIM + first);
      to[0] = make_float4(y[0], y[1], y[2], y[3]);
      to[1] = make_float4(y[4], y[5], y[6], y[7]);
      if (first == 0) partial_stats[row] = make_float2(peak, total);
    } else {
      Pack<8> result;
#pragma unroll
      for (int j = 0; j < 8; ++j) result.at[j] = from_float(y[j] / total);
      store<8>(out + i64(row) * V_DIM + first, result);
    }
  }
}

// All threads of the cluster's blocks, or those of this block that multiply.
__device__ __forceinline__ void meet_others() {
  if (CLUSTER == 1) return meet(1, THREADS);
  __syncwarp();
  cluster_arrive();
  cluster_wait();
}

extern "C" __global__ void __launch_bounds__(THREADS + BRINGERS, 1)
    latent_tiles(scalar* out, TENSOR_MAP q, TENSOR_MAP cache, const int* block_tables, const int* cu_query_lens,
                 const int* kv_lens, float* partial, float2* partial_stats, i64 table_stride, int table_width,
                 int first_request, int least_share, int fresh, float scale) {
  DYNAMIC_SHARED(memory);
  Shared& s = *reinterpret_cast<Shared*>(memory);
  const int lane = threadIdx.x % 32, warp = __shfl_sync(ALL, int(threadIdx.x) / 32, 0);  // one number for the warp
  const int request = first_request + blockIdx.z;
  const int rank = CLUSTER > 1 ? rank_in_cluster() : 0, group = blockIdx.x / CLUSTER, groups = gridDim.x / CLUSTER;
  const int row0 = blockIdx.y * ROWS, first = blockIdx.x;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(&s.full[i], 1);
      barrier_init(&s.empty[i], WARPGROUPS * 4);
    }
    barrier_init(&s.queries_full, 1);
    barriers_ready();
  }
  follow_older();
  Bringer bringer = {s, cache, block_tables + request * table_stride, table_width, lane, 0, read_once_policy()};
  if (warp == THREADS / 32) {
    prefetch_map(cache);
    prefetch_map(q);
    bringer.find(first);
  }
  const Share mine = share_of(cu_query_lens, kv_lens, request, row0, group, groups, least_share);
  __syncthreads();
  if (row0 >= mine.rows || group >= mine.active) return;
  const int stride = mine.active * CLUSTER, tiles = mine.last / KEYS + 1;
  const Work work = {first, stride, first < tiles ? (tiles - first + stride - 1) / stride : 0, row0};

  if (warp >= THREADS / 32) {
    if (HANDOVER) give_registers<40>();
    if (warp == THREADS / 32) produce(bringer, q, mine, work, mine.past - fresh);
    if (CLUSTER > 1) meet_others(), meet_others();
  } else {
    if (HANDOVER) take_registers<232>();
    follow();
    const Place at = {warp / 4, warp % 4, lane / 4, lane % 4};
    Values o = {};
    Running r;
#pragma unroll
    for (int n = 0; n < COLUMNS; ++n) {
      r.top[n][0] = r.top[n][1] = NEG_INF;
      r.sum[n][0] = r.sum[n][1] = 0;
    }
    if (work.count > 0) wait_for(&s.queries_full, 0);
    for (int i = 0; i < work.count; ++i) {
      u8* here = s.tiles[i % STAGES];
      const int keys = mine.last + 1 - work.tile(i) * KEYS;
      Scores x;
      float fade[COLUMNS][2];
      wait_for(&s.full[i % STAGES], i / STAGES % 2);
      if (keys < KEYS) clear_beyond(here, keys);
      score(x, s, here, at);
      mask(x, mine, row0, work.tile(i), scale * LOG2E, at);
      soften(x, r, fade, s, at);
      share(x, fade, s, at);
      fade_values(o, fade, s, at);
      weigh(o, s, here, at);
      __syncwarp();
      if (lane == 0) arrive(&s.empty[i % STAGES]);
    }
    leave(o, r, s, at);
    meet_others();
    const i64 place = ((i64(blockIdx.z) * gridDim.y + blockIdx.y) * groups + group) * ROWS;
    const bool whole = mine.active == 1;
    join(out + (i64(mine.q_start) * HEADS + row0) * V_DIM, whole ? nullptr : partial + place * V_DIM,
         whole ? nullptr : partial_stats + place, s, min(ROWS, mine.rows - row0), rank);
    if (CLUSTER > 1) meet_others();  // they have read this block's sums
  }
}

#endif
