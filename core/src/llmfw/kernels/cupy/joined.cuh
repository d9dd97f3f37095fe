// Rows of attention whose keys are divided, between the warps of a block and between the blocks of a request: how what
// each of them summed becomes one output. For sources that define GROUP, ROWS, V_DIM and THREADS. Sums are float4, a
// quad of a row's dims; a greatest score and a sum of weights, in base 2 and relative to it, go with each row.
#pragma once
#include "common.cuh"

constexpr int QUADS = V_DIM / 4;  // of a row
constexpr int READ_AT_ONCE = 8;   // parts that a thread reads at once when it joins those of blocks

struct Rows {  // of a block
  scalar* out;
  const float* sinks;  // of every head, or null
  float4* partial;     // [requests, columns, splits, ROWS, QUADS]
  float2* stats;       // [requests, columns, splits, ROWS]
  int* counters;       // [requests, columns], zero between launches
  int first, count;    // of the rows of its KV head: GROUP heads times the request's tokens
  int q_start, kv_head, kv_heads;
  int active;  // blocks that the keys are divided between
};

// e^(x - y) for exponents of base 2, where both may be minus infinity.
__device__ __forceinline__ float weight_of(float x, float y) { return x == NEG_INF ? 0.0f : exp2_fast(x - y); }

__device__ __forceinline__ void add(float4& sum, float4 x, float factor) {
  sum.x += x.x * factor;
  sum.y += x.y * factor;
  sum.z += x.z * factor;
  sum.w += x.w * factor;
}

__device__ __forceinline__ float4 scaled(float4 x, float factor) {
  return make_float4(x.x * factor, x.y * factor, x.z * factor, x.w * factor);
}

__device__ __forceinline__ float sink_of(const Rows& rows, int row) {
  return rows.sinks[rows.kv_head * GROUP + (rows.first + row) % GROUP] * LOG2E;
}

// A quad of the output, from its sum and the sum of the weights.
__device__ __forceinline__ void store_result(const Rows& rows, int row, int quad, float4 y, float total) {
  const float inverse = total > 0 ? 1.0f / total : 0.0f;
  Pack<4> result;
  result.at[0] = from_float(y.x * inverse);
  result.at[1] = from_float(y.y * inverse);
  result.at[2] = from_float(y.z * inverse);
  result.at[3] = from_float(y.w * inverse);
  const int place = rows.first + row;
  const i64 head = i64(rows.q_start + place / GROUP) * rows.kv_heads * GROUP + rows.kv_head * GROUP + place % GROUP;
  store<4>(rows.out + head * V_DIM + quad * 4, result);
}

// The same, where no sink has been counted yet.
__device__ __forceinline__ void finish(const Rows& rows, int row, int quad, float4 y, float high, float total) {
  if (rows.sinks) {
    const float sink = sink_of(rows, row), peak = fmaxf(high, sink), fade = weight_of(high, peak);
    total = total * fade + exp2_fast(sink - peak);
    y = scaled(y, fade);
  }
  store_result(rows, row, quad, y, total);
}

// Where this column of blocks counts, and where a block of it leaves a row's part.
__device__ __forceinline__ i64 column_place() { return i64(blockIdx.z) * gridDim.x + blockIdx.x; }

__device__ __forceinline__ i64 part_place(int split, int row) {
  return (column_place() * int(gridDim.y) + split) * ROWS + row;
}

// Joins what SHARERS warps left: their statistics, and sums(warp, row, quad).
template <int SHARERS, class Sums>
__device__ __forceinline__ void join_warps(const Rows& rows, const float2 (&stats)[SHARERS][ROWS], const Sums& sums) {
  for (int item = threadIdx.x; item < rows.count * QUADS; item += THREADS) {
    const int row = item / QUADS, quad = item % QUADS;
    float high = NEG_INF;
#pragma unroll
    for (int w = 0; w < SHARERS; ++w) high = fmaxf(high, stats[w][row].x);
    float total = 0;
    float4 y = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int w = 0; w < SHARERS; ++w) {
      const float weight = weight_of(stats[w][row].x, high);
      total += stats[w][row].y * weight;
      add(y, sums(w, row, quad), weight);
    }
    if (rows.active > 1) {
      const i64 place = part_place(blockIdx.y, row);
      rows.partial[place * QUADS + quad] = y;
      if (quad == 0) rows.stats[place] = make_float2(high, total);
    } else {
      finish(rows, row, quad, y, high, total);
    }
  }
}

// Whether all other blocks have left their parts.
__device__ __forceinline__ bool is_last_block(const Rows& rows) {
  __shared__ bool is_last;
  int* const counter = rows.counters + column_place();
  __syncthreads();
  if (threadIdx.x == 0) {
    is_last = add_release_acquire(counter, 1) == rows.active - 1;
    if (is_last) *counter = 0;
  }
  __syncthreads();
  return is_last;
}

__device__ __forceinline__ void join_blocks(const Rows& rows) {
  for (int item = threadIdx.x; item < rows.count * QUADS; item += THREADS) {
    const int row = item / QUADS, quad = item % QUADS;
    float high = rows.sinks ? sink_of(rows, row) : NEG_INF, total = rows.sinks ? 1.0f : 0.0f;
    float4 y = make_float4(0, 0, 0, 0);
    for (int other = 0; other < rows.active; other += READ_AT_ONCE) {
      float4 x[READ_AT_ONCE];
      float2 its[READ_AT_ONCE];
#pragma unroll
      for (int i = 0; i < READ_AT_ONCE; ++i) {
        const i64 place = part_place(min(other + i, rows.active - 1), row);
        x[i] = load_l2(rows.partial + place * QUADS + quad);
        its[i] = load_l2(rows.stats + place);
      }
      float peak = high;
#pragma unroll
      for (int i = 0; i < READ_AT_ONCE; ++i) peak = fmaxf(peak, its[i].x);
      const float fade = weight_of(high, peak);
      high = peak;
      total *= fade;
      y = scaled(y, fade);
#pragma unroll
      for (int i = 0; i < READ_AT_ONCE; ++i) {
        const float weight = other + i < rows.active ? weight_of(its[i].x, high) : 0.0f;
        total += its[i].y * weight;
        add(y, x[i], weight);
      }
    }
    store_result(rows, row, quad, y, total);
  }
}

// From what the warps of this block left to the output, which the last block of the column stores.
template <int SHARERS, class Sums>
__device__ __forceinline__ void join(const Rows& rows, const float2 (&stats)[SHARERS][ROWS], const Sums& sums) {
  join_warps(rows, stats, sums);
  if (rows.active > 1 && is_last_block(rows)) join_blocks(rows);
}
