// linear and gated_linear for up to 64 rows: y = x weight^T + bias, the weight streamed through shared memory.
//
// Shapes: x [rows, in], weight [outputs, in], bias [outputs] or null, y [rows, outputs]; contiguous, 16-byte aligned,
//   in a multiple of 8, rows at most ROWS. GATED: weight [2 * outputs, in] = gate | up, bias alike, y = silu(gate) * up.
//   An RMS norm may be divided between two products. ADDS (add_linear): residual [rows, outputs] += x weight^T, y =
//   residual * (number + norm_weight [outputs]), squares [rows, parts] (float32) the sums of residual^2 over READY outputs
//   each. NORMED (normed_linear): x is that y, squares its parts, a multiple of 4 of them, and each row's sums are divided
//   by sqrt(mean(residual^2) + number) before the bias is added.
// Launch: block WARPS * 32 + 32 (NORMED: and SCALERS * 32), clusters of SPLIT blocks, grid (tiles or fewer) * SPLIT. A tile is 16 WARPS
//   rows of the weight (GATED: half of them gates, half their ups). One thread brings tiles, CHUNK values of every row at
//   a time, STAGES ahead; four warps together multiply 64 rows with all rows of x. The blocks of a cluster share the
//   summed dimension and send their sums to the one that stores them. Without a split a block walks several tiles.
// Numbers: float32 sums on tensor cores; roundings where the references round.
//
// The weight's first chunks are asked for before the kernel before is done (follow in common.cuh).
#include "common.cuh"
#include "hopper.cuh"

#ifndef ROWS
#define ROWS 32
#endif
#ifndef GATED
#define GATED 0
#endif
#ifndef ADDS
#define ADDS 0
#endif
#ifndef NORMED
#define NORMED 0
#endif
#ifndef WARPS
#define WARPS 4
#endif
#ifndef CHUNK
#define CHUNK 128
#endif
#ifndef STAGES
#define STAGES 4
#endif
#ifndef SPLIT
#define SPLIT 1
#endif

#if DTYPE != F32 && HAS_TILE_COPIES

constexpr int TILE = 16 * WARPS, COLUMNS = ROWS / 8;
constexpr int SCALERS = ROWS > 32 ? 2 : 1;  // NORMED: warps that find the rows' scales
constexpr int SPAN = 64;         // values of a row of a box: 128 bytes, the span of the swizzle
constexpr int BOX_ROW = 128;     // bytes
constexpr int WEIGHT_BYTES = TILE * CHUNK * 2, STAGE_BYTES = WEIGHT_BYTES + ROWS * CHUNK * 2;
constexpr int SHARE = TILE / SPLIT;               // rows of a tile whose sums one block stores
constexpr int PITCH = SHARE + 4;                  // floats from the sums of one row of x to the next
constexpr int READY = GATED ? SHARE / 2 : SHARE;  // results of a row of x that a block stores
static_assert(ROWS % 8 == 0 && WARPS % 4 == 0 && CHUNK % SPAN == 0 && SHARE % (GATED ? 16 : 8) == 0, "whole parts");

// All of the block's shared memory.
struct Shared {
  u8 stages[STAGES][STAGE_BYTES];
  float sums[SPLIT][ROWS * PITCH];  // by the block that sent them
  float scales[NORMED ? ROWS : 2];  // 1 / sqrt(mean of squares), by row
  Barrier full[STAGES], empty[STAGES], sums_full, sums_empty, scales_full;
};

// The work of one block: chunks [first, last) of the summed dimension, of every so-many-th tile.
struct Work {
  int first, last, tile, stride, tiles;
  __device__ __forceinline__ int each() const { return last - first; }
  __device__ __forceinline__ int tile_of(int i) const { return tile + i / each() * stride; }
  __device__ __forceinline__ int chunk_of(int i) const { return first + i % each(); }
  __device__ __forceinline__ int count() const { return tile < tiles ? (tiles - tile + stride - 1) / stride * each() : 0; }
};

__device__ __forceinline__ void bring_weight(Shared& s, const TensorMap& weight, const Work& work, int outputs, int i,
                                             u64 policy) {
  const int tile = work.tile_of(i), chunk = work.chunk_of(i);
  u8* to = s.stages[i % STAGES];
  Barrier* full = &s.full[i % STAGES];
  arrive_expecting(full, STAGE_BYTES);
#pragma unroll
  for (int box = 0; box < CHUNK / SPAN; ++box, to += TILE * BOX_ROW) {
    const int column = chunk * CHUNK + box * SPAN;
    if (GATED) {
      copy_box(to, weight, tile * (TILE / 2), column, full, policy);
      copy_box(to + TILE / 2 * BOX_ROW, weight, outputs + tile * (TILE / 2), column, full, policy);
    } else {
      copy_box(to, weight, tile * TILE, column, full, policy);
    }
  }
}

__device__ __forceinline__ void bring_x(Shared& s, const TensorMap& x, const Work& work, int i, u64 policy) {
  const int chunk = work.chunk_of(i);
#pragma unroll
  for (int box = 0; box < CHUNK / SPAN; ++box)
    copy_box(s.stages[i % STAGES] + WEIGHT_BYTES + box * ROWS * BOX_ROW, x, 0, chunk * CHUNK + box * SPAN,
             &s.full[i % STAGES], policy);
}

__device__ __forceinline__ void produce(Shared& s, const TensorMap& weight, const TensorMap& x, const Work& work,
                                        int outputs) {
  const u64 once = read_once_policy(), often = read_often_policy();
  const int count = work.count(), early = min(count, STAGES);
  prefetch_map(weight);
  prefetch_map(x);
  for (int i = 0; i < early; ++i) bring_weight(s, weight, work, outputs, i, once);
  follow();
  for (int i = 0; i < early; ++i) bring_x(s, x, work, i, often);
  for (int i = STAGES; i < count; ++i) {
    wait_here(&s.empty[i % STAGES], (i / STAGES + 1) % 2);
    bring_weight(s, weight, work, outputs, i, once);
    bring_x(s, x, work, i, often);
  }
}

typedef float Sums[COLUMNS][4];

// Four warps multiply 64 rows of the weight with all rows of x.
__device__ __forceinline__ void multiply(Sums& sum, const u8* stage, int warp) {
  open_products();
#pragma unroll
  for (int k = 0; k < CHUNK; k += 16) {
    const u8* weight = stage + (k / SPAN * TILE + warp / 4 * 64) * BOX_ROW + k % SPAN * 2;
    const u8* x = stage + WEIGHT_BYTES + k / SPAN * ROWS * BOX_ROW + k % SPAN * 2;
    multiply_tile(sum, tile_at(weight), tile_at(x));
  }
  finish_products();
}

// Where the sums of a group of 8 rows lie: in order; GATED the gates' beside those of their ups.
__device__ __forceinline__ int place(int group) {
  if (!GATED) return group * 8;
  return group < TILE / 16 ? group * 16 : (group - TILE / 16) * 16 + 8;
}

// Lane 4g + c holds, of rows 16 warp + g and g + 8, columns 2c and 2c + 1 of every 8.
__device__ __forceinline__ void send(Shared& s, const Sums& sum, int rank, int warp, int lane) {
  const int g = lane / 4, c = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int first = place(warp * 2 + half);
    float* to = s.sums[rank] + first % SHARE + g;
#pragma unroll
    for (int n = 0; n < COLUMNS; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float* at = to + (n * 8 + 2 * c + i) * PITCH;
        if (SPLIT > 1)
          send_to(at, first / SHARE, sum[n][2 * half + i], &s.sums_full);
        else
          *at = sum[n][2 * half + i];
      }
  }
  __syncwarp();
  if (SPLIT == 1 && lane == 0) arrive(&s.sums_full);
}

// The sums of 8 neighbouring results of a row.
__device__ __forceinline__ void add(float (&total)[8], const Shared& s, int at) {
#pragma unroll
  for (int from = 0; from < SPLIT; ++from)
#pragma unroll
    for (int j = 0; j < 8; j += 4) {
      const float4 x = *reinterpret_cast<const float4*>(s.sums[from] + at + j);
      total[j] += x.x, total[j + 1] += x.y, total[j + 2] += x.z, total[j + 3] += x.w;
    }
}

#include "streamed_norm.cuh"

__device__ __forceinline__ void finish(const Shared& s, scalar* y, const scalar* bias, int outputs, int rows,
                                       int first) {
  for (int item = threadIdx.x; item < READY / 8 * rows; item += WARPS * 32) {
    const int pack = item % (READY / 8), m = item / (READY / 8), output = first + pack * 8;
    float total[8] = {}, up[8] = {};
    add(total, s, m * PITCH + pack * (GATED ? 16 : 8));
    if (GATED) add(up, s, m * PITCH + pack * 16 + 8);
    const float scale = NORMED ? s.scales[m] : 1.0f;
    Pack<8> out;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (NORMED) total[j] *= scale, up[j] *= scale;
      if (bias && output + j < outputs) {
        total[j] += to_float(bias[output + j]);
        if (GATED) up[j] += to_float(bias[outputs + output + j]);
      }
      out.at[j] = from_float(GATED ? rounded(silu(rounded(total[j]))) * rounded(up[j]) : total[j]);
    }
    scalar* to = y + i64(m) * outputs + output;
    if (outputs % 8 == 0) {
      if (output < outputs) store<8>(to, out);
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j)
        if (output + j < outputs) to[j] = out.at[j];
    }
  }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32 + 32 + (NORMED ? SCALERS * 32 : 0))
    streamed(scalar* y, TENSOR_MAP x, TENSOR_MAP weight, const scalar* bias, int in, int outputs, int rows,
             scalar* residual, const scalar* norm_weight, float* squares, int parts, float number) {
  DYNAMIC_SHARED(memory);
  Shared& s = *reinterpret_cast<Shared*>(memory);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int rank = SPLIT > 1 ? rank_in_cluster() : 0;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(&s.full[i], 1);
      barrier_init(&s.empty[i], WARPS);
    }
    barrier_init(&s.sums_full, SPLIT > 1 ? 1 : WARPS);
    barrier_init(&s.sums_empty, WARPS);
    barrier_init(&s.scales_full, SCALERS);
    barriers_ready();
    if (SPLIT > 1) arrive_expecting(&s.sums_full, TILE * ROWS * 4);  // its share of every block's sums
  }
  __syncthreads();
  if (SPLIT > 1) cluster_arrive();

  const int chunks = (in + CHUNK - 1) / CHUNK;
  const Work work = {chunks * rank / SPLIT, chunks * (rank + 1) / SPLIT, int(blockIdx.x) / SPLIT,
                     int(gridDim.x) / SPLIT, (outputs * (GATED ? 2 : 1) + TILE - 1) / TILE};
  if (warp == WARPS) {
    if (lane == 0) produce(s, weight, x, work, outputs);
    return;
  }
  if (NORMED && warp > WARPS) {
    follow();
    find_scales(s, squares, parts, rows, in, number);
    return;
  }
  if (SPLIT > 1) cluster_wait();  // the others' barriers are there
  follow();
  int i = 0;
  for (int tile = work.tile, round = 0; tile < work.tiles; tile += work.stride, ++round) {
    const int first = tile * (GATED ? TILE / 2 : TILE) + rank * READY;
    Addition addition;
    if (ADDS) addition.read(residual, norm_weight, outputs, rows, first);
    Sums sum = {};
    for (int n = work.each(); n > 0; --n, ++i) {
      wait_here(&s.full[i % STAGES], i / STAGES % 2);
      multiply(sum, s.stages[i % STAGES], warp);
      __syncwarp();
      if (lane == 0) arrive(&s.empty[i % STAGES]);
    }
    if (round > 0) wait_here(&s.sums_empty, (round + 1) % 2);
    send(s, sum, rank, warp, lane);
    wait_for(&s.sums_full, round % 2);
    if (NORMED) wait_here(&s.scales_full, 0);
    if (ADDS)
      finish_adding(s, addition, y, residual, squares, outputs, rows, first, tile * SPLIT + rank, work.tiles * SPLIT, parts,
                    number);
    else
      finish(s, y, bias, outputs, rows, first);
    __syncwarp();
    if (lane == 0) arrive(&s.sums_empty);
  }
}

#endif
