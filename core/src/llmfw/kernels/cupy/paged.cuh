// What the kernels of paged_attention on tensor cores share: a block's part of the work, where keys lie, and what
// paged_decode.cu and paged_staged.cu do with a tile of 16 keys once it is there (paged_streamed.cu has its own way).
//
// Shapes: q [tokens, KV_HEADS * GROUP, HEAD_DIM], tokens q_stride apart; k_cache, v_cache [blocks, BLOCK_SIZE,
//   kv_heads, dim], heads contiguous; block_tables int32 [requests, table_stride]; cu_query_lens int32
//   [requests + 1]; kv_lens int32 [requests]; sinks float32 [heads] or null; out [tokens, heads * V_DIM].
//   All dims multiples of 16, BLOCK_SIZE a multiple of 8.
// Launch: block WARPS * 32, grid (kv_heads * row tiles, splits, requests). The queries of one KV head (GROUP heads
//   times the request's query tokens) are rows; a row tile holds ROWS of them. A block walks its split of the
//   visible keys; its warps take tiles of 16 keys in turn. Lengths are read here, so the grid fits any batch
//   of that many requests: a request takes as many splits as its length is worth (at least least_share tiles each),
//   blocks without work leave at once, and the last of its blocks to finish combines (counters return to zero).
// Numbers: float32 softmax and accumulation; probabilities are rounded to the 16-bit type for the product with V.
//
// The order of the summed dimension is free, so a lane's 16 bytes of one K row (8 dims) serve two mma steps when q is
// read in the same order; for V a lane takes 8 dims of the four keys that it needs and pairs them by byte permutes.
#pragma once
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
#define ROWS 8
#endif
#ifndef BLOCK_SIZE
#define BLOCK_SIZE 16
#endif
#ifndef SOFTCAP
#define SOFTCAP 0
#endif
#ifndef WARPS
#define WARPS 4
#endif
#ifndef MIN_BLOCKS  // resident blocks the registers must leave room for
#define MIN_BLOCKS 2
#endif

constexpr int STEPS = HEAD_DIM / 16;  // mma steps over a key
constexpr int FULL = HEAD_DIM / 32;   // 16-byte loads of a lane in a key
constexpr bool HALF = HEAD_DIM % 32;  // and one of 8 bytes
constexpr int V8 = V_DIM / 64;        // 16-byte loads of a lane in a value row,
constexpr bool V4 = V_DIM % 64 / 32;  // one of 8 bytes,
constexpr bool V2 = V_DIM % 32 / 16;  // one of 4 bytes
constexpr int OUT_TILES = V_DIM / 8;
constexpr int PARTS = ROWS / 8;  // rows g, and g + 8 if ROWS is 16
constexpr int PITCH = V_DIM + 4;
constexpr int THREADS = WARPS * 32;
constexpr int UNSPLIT_ROUNDS = 3;  // a request of so few rounds of a block's warps is not worth a meeting
static_assert(HEAD_DIM % 16 == 0 && V_DIM % 16 == 0 && BLOCK_SIZE % 8 == 0, "what the tiles can hold");
static_assert(ROWS == 8 || ROWS == 16, "rows of an mma tile");

#include "joined.cuh"

// Lane 4g + c, as mma counts them.
struct Lane {
  int warp, g, c;
};

__device__ __forceinline__ Lane this_lane() {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  return {warp, lane / 4, lane % 4};
}

struct Share {  // of a block
  int kv_head, q_start;
  int rows, row0;   // of the KV head in this request, and the block's first
  int past;         // keys before the request's new ones
  int last;         // greatest key that may be read
  int begin, stop;  // tiles
  int active;       // blocks that have a share of the same rows' keys
};

// Keys that some row of the tile sees, and this block's share of them: whole rounds of its warps. False without any.
__device__ __forceinline__ bool take_share(Share& mine, const int* cu_query_lens, const int* kv_lens, int request,
                                           int kv_heads, int window, int least_share) {
  mine.kv_head = blockIdx.x % kv_heads;
  mine.row0 = blockIdx.x / kv_heads * ROWS;
  mine.q_start = cu_query_lens[request];
  const int kv_len = kv_lens[request];  // asked for with the others, not after them
  const int q_len = cu_query_lens[request + 1] - mine.q_start;
  mine.rows = q_len * GROUP;
  if (mine.row0 >= mine.rows) return false;

  mine.past = max(kv_len, q_len) - q_len;
  mine.last = mine.past + (min(mine.row0 + ROWS, mine.rows) - 1) / GROUP;
  const int first = mine.past + mine.row0 / GROUP;
  const int begin = window > 0 ? max(0, first - window + 1) / 16 : 0;
  const int end = mine.last / 16 + 1;
  const int split = blockIdx.y, splits = gridDim.y, tiles = end - begin;
  int share = max((tiles + splits - 1) / splits, tiles <= UNSPLIT_ROUNDS * WARPS ? tiles : least_share);
  share = (share + WARPS - 1) / WARPS * WARPS;
  mine.active = (tiles + share - 1) / share;
  mine.begin = begin + split * share;
  mine.stop = min(mine.begin + share, end);
  return split < mine.active;
}

struct Cache {
  const scalar *k, *v;  // at this KV head
  const int* table;     // of this request
  i64 k_block, k_slot, v_block, v_slot;
  int last;  // greatest key that may be read
};

// Halves are 8 keys of one block; a half beyond the last key reads an earlier one, whose scores are masked.
__device__ __forceinline__ int half_start(const Cache& cache, int tile, int half) {
  return min(tile * 16 + half * 8, cache.last & ~7);
}

struct Pages {
  int of[2];  // blocks of both halves of a tile
};

__device__ __forceinline__ Pages find_pages(const Cache& cache, int tile) {
  Pages pages;
  pages.of[0] = __ldg(cache.table + half_start(cache, tile, 0) / BLOCK_SIZE);
  pages.of[1] = BLOCK_SIZE % 16 == 0 ? pages.of[0] : __ldg(cache.table + half_start(cache, tile, 1) / BLOCK_SIZE);
  return pages;
}

// Whether a block knows the pages of its first tiles without the request's length.
__device__ __forceinline__ bool can_guess(int window) {
  return window <= 0 && blockIdx.y == 0 && BLOCK_SIZE % 16 == 0;
}

// The pages of a warp's first N tiles then; rubbish where the request has no such tiles.
template <int N>
__device__ __forceinline__ void guess_pages(Pages (&pages)[N], const int* table, int table_width, int warp) {
#pragma unroll
  for (int i = 0; i < N; ++i)
    pages[i].of[0] = pages[i].of[1] = table[min((warp + i * WARPS) * 16 / BLOCK_SIZE, table_width - 1)];
}

// Rows g and g + 8 of the tile: lane 4g + c has of steps 2j and 2j + 1 dims 32 j + 8 c .. + 7, then 32 FULL + 4 c ..
// + 3, and the range of keys that each row sees.
struct Queries {
  u32 of[PARTS][STEPS][2];
  int from[PARTS], to[PARTS];
};

// One of them.
__device__ __forceinline__ void load_query(u32 (&row)[STEPS][2], const scalar* source, const Lane& lane) {
#pragma unroll
  for (int j = 0; j < FULL; ++j) {
    const uint4 x = *reinterpret_cast<const uint4*>(source + 32 * j + 8 * lane.c);
    row[2 * j][0] = x.x;
    row[2 * j][1] = x.y;
    row[2 * j + 1][0] = x.z;
    row[2 * j + 1][1] = x.w;
  }
  if constexpr (HALF) {
    const uint2 x = *reinterpret_cast<const uint2*>(source + 32 * FULL + 4 * lane.c);
    row[STEPS - 1][0] = x.x;
    row[STEPS - 1][1] = x.y;
  }
}

__device__ __forceinline__ void load_queries(Queries& a, const scalar* q, i64 q_stride, const Share& mine, int window,
                                             const Lane& lane) {
#pragma unroll
  for (int part = 0; part < PARTS; ++part) {
    const int row = min(mine.row0 + part * 8 + lane.g, mine.rows - 1);
    const int position = mine.past + row / GROUP;
    a.to[part] = position;
    a.from[part] = window > 0 ? position - window + 1 : 0;
    const int head = mine.kv_head * GROUP + row % GROUP;
    load_query(a.of[part], q + (mine.q_start + row / GROUP) * q_stride + head * HEAD_DIM, lane);
  }
}

typedef float Scores[4];  // of 8 keys: row g: keys 2c, 2c + 1, row g + 8: the same

// Adds q k of one step.
__device__ __forceinline__ void score(Scores& s, const Queries& a, int step, u32 k0, u32 k1) {
  mma(s[0], s[1], s[2], s[3], a.of[0][step][0], PARTS == 2 ? a.of[PARTS - 1][step][0] : 0, a.of[0][step][1],
      PARTS == 2 ? a.of[PARTS - 1][step][1] : 0, k0, k1);
}

// What a warp has summed of rows g and g + 8: running maximum in base 2, this lane's part of the sum of weights, and
// its dims of the sum of weighted values.
struct Sums {
  float top[PARTS], sum[PARTS], o[OUT_TILES][2 * PARTS];
};

__device__ __forceinline__ void clear(Sums& sums) {
#pragma unroll
  for (int part = 0; part < PARTS; ++part) {
    sums.top[part] = NEG_INF;
    sums.sum[part] = 0;
#pragma unroll
    for (int n = 0; n < OUT_TILES; ++n) sums.o[n][2 * part] = sums.o[n][2 * part + 1] = 0;
  }
}

typedef u32 Weights[2][PARTS];  // of a tile's halves, as mma operands

// Scores become weights; what was summed before fades where the maximum grows.
__device__ __forceinline__ void soften(Weights& p, Sums& sums, Scores (&s)[2], const Queries& a, int tile, int c,
                                       float scale, float softcap) {
#pragma unroll
  for (int part = 0; part < PARTS; ++part) {
    float high = sums.top[part];
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int key = tile * 16 + half * 8 + 2 * c + i;
        float& x = s[half][2 * part + i];
#if SOFTCAP
        x = softcap * LOG2E * tanhf(x * scale / softcap);
#else
        x *= scale * LOG2E;
#endif
        if (key > a.to[part] || key < a.from[part]) x = NEG_INF;
        high = fmaxf(high, x);
      }
    high = fmaxf(high, __shfl_xor_sync(ALL, high, 1));
    high = fmaxf(high, __shfl_xor_sync(ALL, high, 2));
    const float base = high == NEG_INF ? 0.0f : high;
    if (__any_sync(ALL, high > sums.top[part])) {
      const float fade = exp2_fast(sums.top[part] - base);
      sums.sum[part] *= fade;
#pragma unroll
      for (int n = 0; n < OUT_TILES; ++n) {
        sums.o[n][2 * part] *= fade;
        sums.o[n][2 * part + 1] *= fade;
      }
      sums.top[part] = high;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float x = exp2_fast(s[half][2 * part] - base), y = exp2_fast(s[half][2 * part + 1] - base);
      sums.sum[part] += x + y;
      p[half][part] = pack2(x, y);
    }
  }
}

// Adds weighted values to accumulator tiles n and n + 1, whose dims of each of a lane's four keys are one register.
__device__ __forceinline__ void weigh(Sums& sums, int n, const Weights& p, u32 v0, u32 v1, u32 v2, u32 v3) {
#pragma unroll
  for (int odd = 0; odd < 2; ++odd) {
    const u32 order = odd ? 0x7632 : 0x5410;  // the high or low halves of both keys
    auto& o = sums.o[n + odd];
    float unused0 = 0, unused1 = 0;
    mma(o[0], o[1], PARTS == 2 ? o[2 * PARTS - 2] : unused0, PARTS == 2 ? o[2 * PARTS - 1] : unused1, p[0][0],
        PARTS == 2 ? p[0][PARTS - 1] : 0, p[1][0], PARTS == 2 ? p[1][PARTS - 1] : 0, __byte_perm(v0, v1, order),
        __byte_perm(v2, v3, order));
  }
}

// The output dim of accumulator tile n at column `column` of 8: lane 4g + c brings of its keys' values dims
// 64 i + 8 g .. + 7, then 4 and 2 dims of the rest.
__device__ __forceinline__ constexpr int out_dim(int n, int column) {
  return n < 8 * V8             ? n / 8 * 64 + column * 8 + n % 8
         : V4 && n < 8 * V8 + 4 ? 64 * V8 + column * 4 + (n - 8 * V8)
                                : 64 * V8 + 32 * V4 + column * 2 + (n - 8 * V8 - 4 * V4);
}

// The block's warps meet: each leaves its maximum, sum and unscaled output, in slab(warp) of ROWS * PITCH floats.
template <class Slab>
__device__ __forceinline__ void meet(const Rows& rows, const Sums& sums, const Slab& slab, const Lane& lane) {
  __shared__ float2 stats[WARPS][ROWS];
#pragma unroll
  for (int part = 0; part < PARTS; ++part) {
    const int row = part * 8 + lane.g;
    const float all = group_sum<4>(sums.sum[part]);
    if (lane.c == 0) stats[lane.warp][row] = make_float2(sums.top[part], all);
#pragma unroll
    for (int column = 0; column < 2; ++column)
#pragma unroll
      for (int n = 0; n < OUT_TILES; ++n)
        slab(lane.warp)[row * PITCH + out_dim(n, 2 * lane.c + column)] = sums.o[n][2 * part + column];
  }
  __syncthreads();
  join(rows, stats, [&](int warp, int row, int quad) {
    return *reinterpret_cast<const float4*>(slab(warp) + row * PITCH + quad * 4);
  });
}
