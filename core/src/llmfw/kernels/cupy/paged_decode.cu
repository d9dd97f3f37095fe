// paged_attention for few query tokens a request: split-KV flash decoding on tensor cores, 16-bit types.
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
// K and V go from memory straight to mma operands. The order of the summed dimension is free, so a lane's 16 bytes
// of one K row (8 dims) serve two mma steps when q is read in the same order; for V a lane takes 8 dims of the four
// keys that it needs and pairs them by byte permutes. K of the next tile is requested as soon as this tile's
// scores are done, V as soon as its product is: loads are always in flight, without shared memory.
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

#if DTYPE != F32

constexpr int STEPS = HEAD_DIM / 16;  // mma steps over a key
constexpr int FULL = HEAD_DIM / 32;   // 16-byte loads of a lane in a key
constexpr bool HALF = HEAD_DIM % 32;  // and one of 8 bytes
constexpr int V8 = V_DIM / 64;        // 16-byte loads of a lane in a value row,
constexpr bool V4 = V_DIM % 64 / 32;  // one of 8 bytes,
constexpr bool V2 = V_DIM % 32 / 16;  // one of 4 bytes
constexpr int V_REGS = V_DIM / 16;
constexpr int OUT_TILES = V_DIM / 8;
constexpr int PARTS = ROWS / 8;  // rows g, and g + 8 if ROWS is 16
constexpr int PITCH = V_DIM + 4;
constexpr int AT_ONCE = 8;  // splits that a thread reads at once when it combines them
constexpr int THREADS = WARPS * 32;
constexpr int UNSPLIT_ROUNDS = 3;  // a request of so few rounds of a block's warps is not worth a meeting
static_assert(HEAD_DIM % 16 == 0 && V_DIM % 16 == 0 && BLOCK_SIZE % 8 == 0, "what the tiles can hold");
static_assert(ROWS == 8 || ROWS == 16, "rows of an mma tile");

struct Offsets {
  i64 k[2], v[2];  // of the first key of both halves of a tile, in scalars
  int limit[2];    // greatest key of the half that may be read, relative to its first
};

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

__device__ __forceinline__ void find_pages(int (&pages)[2], const Cache& cache, int tile) {
  pages[0] = __ldg(cache.table + half_start(cache, tile, 0) / BLOCK_SIZE);
  pages[1] = BLOCK_SIZE % 16 == 0 ? pages[0] : __ldg(cache.table + half_start(cache, tile, 1) / BLOCK_SIZE);
}

__device__ __forceinline__ Offsets locate(const int (&pages)[2], const Cache& cache, int tile) {
  Offsets at;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int start = half_start(cache, tile, half);
    const int slot = start % BLOCK_SIZE;
    at.k[half] = pages[half] * cache.k_block + slot * cache.k_slot;
    at.v[half] = pages[half] * cache.v_block + slot * cache.v_slot;
    at.limit[half] = cache.last - start;
  }
  return at;
}

// Lane 4g + c: of key g of each half, dims 32 j + 8 c .. + 7 (steps 2j, 2j + 1), then 32 FULL + 4 c .. + 3.
__device__ __forceinline__ void load_keys(u32 (&k)[2][STEPS][2], const Cache& cache, const Offsets& at, int g, int c) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const scalar* row = cache.k + at.k[half] + min(g, at.limit[half]) * cache.k_slot;
#pragma unroll
    for (int j = 0; j < FULL; ++j) {
      const uint4 x = stream16(row + 32 * j + 8 * c);
      k[half][2 * j][0] = x.x;
      k[half][2 * j][1] = x.y;
      k[half][2 * j + 1][0] = x.z;
      k[half][2 * j + 1][1] = x.w;
    }
    if constexpr (HALF) {
      const uint2 x = stream8(row + 32 * FULL + 4 * c);
      k[half][STEPS - 1][0] = x.x;
      k[half][STEPS - 1][1] = x.y;
    }
  }
}

// Lane 4g + c: of keys 2c, 2c + 1 of each half, dims 64 i + 8 g .. + 7, then 4 and 2 dims of the rest.
__device__ __forceinline__ void load_values(u32 (&v)[2][2][V_REGS], const Cache& cache, const Offsets& at, int g,
                                            int c) {
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int key = 0; key < 2; ++key) {
      const scalar* row = cache.v + at.v[half] + min(2 * c + key, at.limit[half]) * cache.v_slot;
#pragma unroll
      for (int i = 0; i < V8; ++i) {
        const uint4 x = stream16(row + 64 * i + 8 * g);
        v[half][key][4 * i] = x.x;
        v[half][key][4 * i + 1] = x.y;
        v[half][key][4 * i + 2] = x.z;
        v[half][key][4 * i + 3] = x.w;
      }
      if constexpr (V4) {
        const uint2 x = stream8(row + 64 * V8 + 4 * g);
        v[half][key][4 * V8] = x.x;
        v[half][key][4 * V8 + 1] = x.y;
      }
      if constexpr (V2) v[half][key][V_REGS - 1] = stream4(row + 64 * V8 + 32 * V4 + 2 * g);
    }
}

// The output dim of accumulator tile n at column `column` of 8: the order that load_values made.
__device__ __forceinline__ constexpr int out_dim(int n, int column) {
  return n < 8 * V8            ? n / 8 * 64 + column * 8 + n % 8
         : V4 && n < 8 * V8 + 4 ? 64 * V8 + column * 4 + (n - 8 * V8)
                                : 64 * V8 + 32 * V4 + column * 2 + (n - 8 * V8 - 4 * V4);
}

// The block of this warp's first tile where that is known without the request's length, else -1. May be rubbish where
// the request has no such tile.
__device__ __forceinline__ int first_page(const int* table, int table_width, int window, int split) {
  if (window > 0 || split > 0 || BLOCK_SIZE % 16) return -1;
  return table[min(int(threadIdx.x) / 32 * 16 / BLOCK_SIZE, table_width - 1)];
}

// e^(x - y) for exponents of base 2, where both may be minus infinity.
__device__ __forceinline__ float weight_of(float x, float y) { return x == NEG_INF ? 0.0f : exp2_fast(x - y); }

// Four dims of a row's output, from their sum and the sum of the weights.
__device__ __forceinline__ void store_result(scalar* out, float4 y, float total, int q_start, int row, int kv_heads,
                                             int kv_head, int quad) {
  const float inverse = total > 0 ? 1.0f / total : 0.0f;
  Pack<4> result;
  result.at[0] = from_float(y.x * inverse);
  result.at[1] = from_float(y.y * inverse);
  result.at[2] = from_float(y.z * inverse);
  result.at[3] = from_float(y.w * inverse);
  const i64 head = i64(q_start + row / GROUP) * kv_heads * GROUP + kv_head * GROUP + row % GROUP;
  store<4>(out + head * V_DIM + quad * 4, result);
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    paged_decode(scalar* out, const scalar* q, const scalar* k_cache, const scalar* v_cache, const int* block_tables,
                 const int* cu_query_lens, const int* kv_lens, const float* sinks, float4* partial,
                 float2* partial_stats, int* counters, i64 q_stride, i64 table_stride, i64 k_block_stride,
                 i64 k_slot_stride, i64 v_block_stride, i64 v_slot_stride, int kv_heads, int first_request,
                 int table_width, int window, int least_share, int fresh, float scale, float softcap) {
  const int request = first_request + blockIdx.z;
  const int kv_head = blockIdx.x % kv_heads;
  const int row0 = blockIdx.x / kv_heads * ROWS;
  const int split = blockIdx.y;
  const int* table = block_tables + request * table_stride;
  follow_older();
  const int guess = first_page(table, table_width, window, split);
  const int q_start = cu_query_lens[request];
  const int q_len = cu_query_lens[request + 1] - q_start;
  const int rows = q_len * GROUP;
  if (row0 >= rows) return;

  // Keys that some row of the tile sees, and this block's share of them: whole rounds of its warps.
  const int kv_len = max(kv_lens[request], q_len);
  const int first_position = kv_len - q_len + row0 / GROUP;
  const int last_position = kv_len - q_len + (min(row0 + ROWS, rows) - 1) / GROUP;
  const int begin = window > 0 ? max(0, first_position - window + 1) / 16 : 0;
  const int end = last_position / 16 + 1;
  const int splits = gridDim.y;
  const int tiles = end - begin;
  int share = max((tiles + splits - 1) / splits, tiles <= UNSPLIT_ROUNDS * WARPS ? tiles : least_share);
  share = (share + WARPS - 1) / WARPS * WARPS;
  const int active = (tiles + share - 1) / share;
  if (split >= active) return;
  const int stop = min(begin + (split + 1) * share, end);

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, c = lane % 4;
  Cache cache;
  cache.k = k_cache + kv_head * HEAD_DIM;
  cache.v = v_cache + kv_head * V_DIM;
  cache.table = table;
  cache.k_block = k_block_stride;
  cache.k_slot = k_slot_stride;
  cache.v_block = v_block_stride;
  cache.v_slot = v_slot_stride;
  cache.last = last_position;

  u32 k[2][STEPS][2], v[2][2][V_REGS];
  int tile = begin + split * share + warp;
  int pages[2];
  Offsets at;
  if (tile < stop) {
    if (guess < 0)
      find_pages(pages, cache, tile);
    else
      pages[0] = pages[1] = guess;
    at = locate(pages, cache, tile);
    if (tile + WARPS < stop) find_pages(pages, cache, tile + WARPS);
  }
  // Keys of earlier steps need not wait for the kernel that writes this step's; `fresh` keys before the request's new
  // ones may be this step's too, of a request that it shares blocks with.
  const bool old = (tile + 1) * 16 <= kv_len - q_len - fresh;
  if (PDL && old && tile < stop) {
    load_keys(k, cache, at, g, c);
    load_values(v, cache, at, g, c);
  }
  follow();
  if (!(PDL && old) && tile < stop) {
    load_keys(k, cache, at, g, c);
    load_values(v, cache, at, g, c);
  }

  // Rows g and g + 8 of the tile: q in the order of load_keys, and the range of keys each sees.
  u32 a[PARTS][STEPS][2];
  int from[PARTS], to[PARTS];
#pragma unroll
  for (int part = 0; part < PARTS; ++part) {
    const int row = min(row0 + part * 8 + g, rows - 1);
    const int position = kv_len - q_len + row / GROUP;
    to[part] = position;
    from[part] = window > 0 ? position - window + 1 : 0;
    const scalar* source = q + (q_start + row / GROUP) * q_stride + (kv_head * GROUP + row % GROUP) * HEAD_DIM;
#pragma unroll
    for (int j = 0; j < FULL; ++j) {
      const uint4 x = *reinterpret_cast<const uint4*>(source + 32 * j + 8 * c);
      a[part][2 * j][0] = x.x;
      a[part][2 * j][1] = x.y;
      a[part][2 * j + 1][0] = x.z;
      a[part][2 * j + 1][1] = x.w;
    }
    if constexpr (HALF) {
      const uint2 x = *reinterpret_cast<const uint2*>(source + 32 * FULL + 4 * c);
      a[part][STEPS - 1][0] = x.x;
      a[part][STEPS - 1][1] = x.y;
    }
  }

  float o[OUT_TILES][2 * PARTS] = {};
  float top[PARTS], sum[PARTS];  // running maximum in base 2, and this lane's part of the sum
#pragma unroll
  for (int part = 0; part < PARTS; ++part) {
    top[part] = NEG_INF;
    sum[part] = 0;
  }

  for (; tile < stop; tile += WARPS) {
    const bool more = tile + WARPS < stop;

    float s[2][4] = {};  // [half][row g: keys 2c, 2c + 1, row g + 8: the same]
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int step = 0; step < STEPS; ++step)
        mma(s[half][0], s[half][1], s[half][2], s[half][3], a[0][step][0], PARTS == 2 ? a[PARTS - 1][step][0] : 0,
            a[0][step][1], PARTS == 2 ? a[PARTS - 1][step][1] : 0, k[half][step][0], k[half][step][1]);
    if (more) {
      at = locate(pages, cache, tile + WARPS);
      load_keys(k, cache, at, g, c);
    }

    u32 p[2][PARTS];  // probabilities as mma operands
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      float high = top[part];
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
          if (key > to[part] || key < from[part]) x = NEG_INF;
          high = fmaxf(high, x);
        }
      high = fmaxf(high, __shfl_xor_sync(ALL, high, 1));
      high = fmaxf(high, __shfl_xor_sync(ALL, high, 2));
      const float base = high == NEG_INF ? 0.0f : high;
      if (__any_sync(ALL, high > top[part])) {
        const float fade = exp2_fast(top[part] - base);
        sum[part] *= fade;
#pragma unroll
        for (int n = 0; n < OUT_TILES; ++n) {
          o[n][2 * part] *= fade;
          o[n][2 * part + 1] *= fade;
        }
        top[part] = high;
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float x = exp2_fast(s[half][2 * part] - base), y = exp2_fast(s[half][2 * part + 1] - base);
        sum[part] += x + y;
        p[half][part] = pack2(x, y);
      }
    }

#pragma unroll
    for (int n = 0; n < OUT_TILES; ++n) {
      const u32 order = n % 2 ? 0x7632 : 0x5410;  // the high or low halves of both keys
      const u32 b0 = __byte_perm(v[0][0][n / 2], v[0][1][n / 2], order);
      const u32 b1 = __byte_perm(v[1][0][n / 2], v[1][1][n / 2], order);
      float unused0 = 0, unused1 = 0;
      mma(o[n][0], o[n][1], PARTS == 2 ? o[n][2 * PARTS - 2] : unused0, PARTS == 2 ? o[n][2 * PARTS - 1] : unused1,
          p[0][0], PARTS == 2 ? p[0][PARTS - 1] : 0, p[1][0], PARTS == 2 ? p[1][PARTS - 1] : 0, b0, b1);
    }
    if (more) {
      load_values(v, cache, at, g, c);
      if (tile + 2 * WARPS < stop) find_pages(pages, cache, tile + 2 * WARPS);
    }
  }

  // The block's warps meet: each leaves its maximum, sum and unscaled output.
  alignas(16) __shared__ float slab[WARPS][ROWS * PITCH];
  __shared__ float2 stats[WARPS][ROWS];
#pragma unroll
  for (int part = 0; part < PARTS; ++part) {
    const int row = part * 8 + g;
    const float all = group_sum<4>(sum[part]);
    if (c == 0) stats[warp][row] = make_float2(top[part], all);
#pragma unroll
    for (int column = 0; column < 2; ++column)
#pragma unroll
      for (int n = 0; n < OUT_TILES; ++n)
        slab[warp][row * PITCH + out_dim(n, 2 * c + column)] = o[n][2 * part + column];
  }
  __syncthreads();

  constexpr int QUADS = V_DIM / 4;  // float4 of a row
  const int rows_here = min(ROWS, rows - row0);
  const i64 place = i64(blockIdx.z) * gridDim.x + blockIdx.x;
  for (int item = threadIdx.x; item < rows_here * QUADS; item += THREADS) {
    const int row = item / QUADS, quad = item % QUADS;
    float high = NEG_INF;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) high = fmaxf(high, stats[w][row].x);
    float total = 0;
    float4 y = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      const float share_of_warp = weight_of(stats[w][row].x, high);
      const float4 x = *reinterpret_cast<const float4*>(&slab[w][row * PITCH + quad * 4]);
      total += stats[w][row].y * share_of_warp;
      y.x += x.x * share_of_warp;
      y.y += x.y * share_of_warp;
      y.z += x.z * share_of_warp;
      y.w += x.w * share_of_warp;
    }
    const int head = kv_head * GROUP + (row0 + row) % GROUP;
    if (active > 1) {
      const i64 index = (place * splits + split) * ROWS + row;
      partial[index * QUADS + quad] = y;
      if (quad == 0) partial_stats[index] = make_float2(high, total);
      continue;
    }
    if (sinks) {
      const float sink = sinks[head] * LOG2E, peak = fmaxf(high, sink), fade = weight_of(high, peak);
      total = total * fade + exp2_fast(sink - peak);
      y = make_float4(y.x * fade, y.y * fade, y.z * fade, y.w * fade);
    }
    store_result(out, y, total, q_start, row0 + row, kv_heads, kv_head, quad);
  }
  if (active == 1) return;

  // The last of the request's blocks for these rows combines what all left.
  __shared__ bool is_last;
  __syncthreads();
  if (threadIdx.x == 0) {
    is_last = add_release_acquire(counters + place, 1) == active - 1;
    if (is_last) counters[place] = 0;
  }
  __syncthreads();
  if (!is_last) return;
  for (int item = threadIdx.x; item < rows_here * QUADS; item += THREADS) {
    const int row = item / QUADS, quad = item % QUADS;
    const int head = kv_head * GROUP + (row0 + row) % GROUP;
    float high = sinks ? sinks[head] * LOG2E : NEG_INF, total = sinks ? 1.0f : 0.0f;
    float4 y = make_float4(0, 0, 0, 0);
    for (int other = 0; other < active; other += AT_ONCE) {
      float4 x[AT_ONCE];
      float2 its[AT_ONCE];
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        const i64 index = (place * splits + min(other + i, active - 1)) * ROWS + row;
        x[i] = load_l2(partial + index * QUADS + quad);
        its[i] = load_l2(partial_stats + index);
      }
      float peak = high;
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) peak = fmaxf(peak, its[i].x);
      const float fade = weight_of(high, peak);
      high = peak;
      total *= fade;
      y = make_float4(y.x * fade, y.y * fade, y.z * fade, y.w * fade);
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        const float part = other + i < active ? weight_of(its[i].x, high) : 0.0f;
        total += its[i].y * part;
        y.x += x[i].x * part;
        y.y += x[i].y * part;
        y.z += x[i].z * part;
        y.w += x[i].w * part;
      }
    }
    store_result(out, y, total, q_start, row0 + row, kv_heads, kv_head, quad);
  }
}

#endif
