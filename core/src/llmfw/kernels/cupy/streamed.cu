// linear and gated_linear for 5 to 64 rows: y = x weight^T + bias, the weight streamed through shared memory.
//
// Shapes: x [rows, in], weight [outputs, in], bias [outputs] or null, y [rows, outputs]; contiguous, 16-byte aligned,
//   in a multiple of 8, rows at most ROWS. GATED: weight [2 * outputs, in] = gate | up, bias alike, y = silu(gate) * up.
// Launch: block WARPS * 32 + 32, clusters of SPLIT blocks, grid (tiles or fewer) * SPLIT. A tile is TILE rows of the
//   weight (GATED: half of them gates, half their ups). One thread brings tiles, CHUNK values of every row at a time,
//   STAGES ahead; each of the WARPS multiplies 16 T rows with all rows of x. The blocks of a cluster share the summed
//   dimension and send their sums to the one that stores them. Without a split a block walks several tiles.
// Numbers: float32 sums on tensor cores; GATED rounds where the references of linear and silu_and_mul round.
//
// The weight's first STAGES chunks are asked for before the kernel before is done (follow in common.cuh).
#include "common.cuh"
#include "hopper.cuh"

#ifndef ROWS
#define ROWS 32
#endif
#ifndef GATED
#define GATED 0
#endif
#ifndef WARPS
#define WARPS 8
#endif
#ifndef WEIGHT_TILES
#define WEIGHT_TILES 1
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

#ifndef POLICY
#define POLICY 0
#endif

#if DTYPE != F32 && HAS_TILE_COPIES

constexpr int T = WEIGHT_TILES, TILE = 16 * T * WARPS, COLUMNS = ROWS / 8;
constexpr int SPAN = 64;         // values of a row of a box: 128 bytes, the span of the swizzle
constexpr int BOX_ROW = 128;     // bytes
constexpr int WEIGHT_BYTES = TILE * CHUNK * 2, STAGE_BYTES = WEIGHT_BYTES + ROWS * CHUNK * 2;
constexpr int SHARE = TILE / SPLIT;  // rows of a tile whose sums one block stores
constexpr int PITCH = ROWS + 2;      // floats from one row's sums to the next
constexpr int READY = GATED ? SHARE / 2 : SHARE;  // results a row that a block stores
static_assert(ROWS % 8 == 0 && CHUNK % SPAN == 0 && SHARE % (GATED ? 16 : 8) == 0, "whole tiles, boxes and shares");

// All of the block's shared memory.
struct Shared {
  u8 stages[STAGES][STAGE_BYTES];
  float sums[SPLIT][SHARE * PITCH];  // by the block that sent them
  Barrier full[STAGES], empty[STAGES], sums_full, sums_empty;
};

// The work of one block: chunks [first, last) of the summed dimension, of every so-many-th tile.
struct Work {
  int first, last, tile, stride, tiles;
  __device__ __forceinline__ int each() const { return last - first; }
  __device__ __forceinline__ int count() const { return tile < tiles ? (tiles - tile + stride - 1) / stride * each() : 0; }
};

__device__ __forceinline__ void bring_weight(Shared& s, const TensorMap& weight, const Work& work, int outputs, int i,
                                             u64 policy) {
  const int tile = work.tile + i / work.each() * work.stride, chunk = work.first + i % work.each();
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
  const int chunk = work.first + i % work.each();
#pragma unroll
  for (int box = 0; box < CHUNK / SPAN; ++box)
    copy_box(s.stages[i % STAGES] + WEIGHT_BYTES + box * ROWS * BOX_ROW, x, 0, chunk * CHUNK + box * SPAN,
             &s.full[i % STAGES], policy);
}

__device__ __forceinline__ void produce(Shared& s, const TensorMap& weight, const TensorMap& x, const Work& work,
                                        int outputs) {
  u64 normal;
  asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(normal));
  const u64 once = POLICY & 1 ? normal : read_once_policy(), often = POLICY & 2 ? normal : read_often_policy();
  const int count = work.count(), early = min(count, STAGES);
  for (int i = 0; i < early; ++i) bring_weight(s, weight, work, outputs, i, once);
  follow();
  for (int i = 0; i < early; ++i) bring_x(s, x, work, i, often);
  for (int i = STAGES; i < count; ++i) {
    wait_for(&s.empty[i % STAGES], (i / STAGES + 1) % 2);
    bring_weight(s, weight, work, outputs, i, once);
    bring_x(s, x, work, i, often);
  }
}

// Of each group of 8 rows the fragments' row g is row turn(g), so that the 8 lanes which read shared memory together
// (2 rows, 4 packs) meet 8 different banks of the swizzle, which moves pack p of row r to p ^ r.
__device__ __forceinline__ int turn(int g) { return g / 2 + g % 2 * 4; }
__device__ __forceinline__ int turned_from(int row) { return row % 4 * 2 + row / 4; }

typedef float Sums[T][COLUMNS][4];

__device__ __forceinline__ void multiply(Sums& sum, const u8* stage, int warp, int g, int c) {
  const int row = turn(g);
#pragma unroll
  for (int k = 0; k < CHUNK / 32; ++k) {
    const int at = row * BOX_ROW + ((k % 2 * 4 + c) ^ row) * 16;
    const u8* w = stage + k / 2 * TILE * BOX_ROW + at;
    const u8* v = stage + WEIGHT_BYTES + k / 2 * ROWS * BOX_ROW + at;
    uint4 a[T][2];
#pragma unroll
    for (int t = 0; t < T; ++t)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int first = GATED ? half * (TILE / 2) + (warp * T + t) * 8 : (warp * T + t) * 16 + half * 8;
        a[t][half] = *reinterpret_cast<const uint4*>(w + first * BOX_ROW);
      }
#pragma unroll
    for (int n = 0; n < COLUMNS; ++n) {
      const uint4 b = *reinterpret_cast<const uint4*>(v + n * 8 * BOX_ROW);
#pragma unroll
      for (int t = 0; t < T; ++t) {
        float(&d)[4] = sum[t][n];
        mma(d[0], d[1], d[2], d[3], a[t][0].x, a[t][1].x, a[t][0].y, a[t][1].y, b.x, b.y);
        mma(d[0], d[1], d[2], d[3], a[t][0].z, a[t][1].z, a[t][0].w, a[t][1].w, b.z, b.w);
      }
    }
  }
}

// Lane 4g + c holds, of fragment rows g and g + 8, columns 2c and 2c + 1 of every 8.
__device__ __forceinline__ void send(Shared& s, const Sums& sum, int rank, int warp, int g, int c) {
#pragma unroll
  for (int t = 0; t < T; ++t)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int first = (warp * T + t) * 16 + half * 8;
      float* row = s.sums[rank] + (first % SHARE + turn(g)) * PITCH + 2 * c;
#pragma unroll
      for (int n = 0; n < COLUMNS; ++n) {
        float2* to = reinterpret_cast<float2*>(row + n * 8);
        const float2 value = make_float2(sum[t][n][2 * half], sum[t][n][2 * half + 1]);
        if (SPLIT > 1)
          store_at(to, first / SHARE, value);
        else
          *to = value;
      }
    }
  __syncwarp();
  const int lane = 4 * g + c;
  if (SPLIT > 1) {
    if (lane < SPLIT) arrive_at(&s.sums_full, lane);
  } else if (lane == 0) {
    arrive(&s.sums_full);
  }
}

__device__ __forceinline__ void finish(const Shared& s, scalar* y, const scalar* bias, int outputs, int rows,
                                       int first) {
  for (int item = threadIdx.x; item < READY * rows; item += WARPS * 32) {
    const int value = item % READY, m = item / READY, output = first + value;
    if (output >= outputs) continue;
    const int at = (GATED ? value / 8 * 16 + value % 8 : value) * PITCH + m / 8 * 8 + turned_from(m % 8);
    float total = bias ? to_float(bias[output]) : 0.0f, up = GATED && bias ? to_float(bias[outputs + output]) : 0.0f;
#pragma unroll
    for (int from = 0; from < SPLIT; ++from) {
      total += s.sums[from][at];
      if (GATED) up += s.sums[from][at + 8 * PITCH];
    }
    y[i64(m) * outputs + output] = from_float(GATED ? rounded(silu(rounded(total))) * rounded(up) : total);
  }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32 + 32)
    streamed(scalar* y, TENSOR_MAP x, TENSOR_MAP weight, const scalar* bias, int in, int outputs, int rows) {
  DYNAMIC_SHARED(memory);
  Shared& s = *reinterpret_cast<Shared*>(memory);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, c = lane % 4;
  const int rank = SPLIT > 1 ? rank_in_cluster() : 0;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(&s.full[i], 1);
      barrier_init(&s.empty[i], WARPS);
    }
    barrier_init(&s.sums_full, SPLIT * WARPS);
    barrier_init(&s.sums_empty, WARPS);
    barriers_ready();
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
  follow();
  if (SPLIT > 1) cluster_wait();  // the others' barriers are there
  int i = 0;
  for (int tile = work.tile, round = 0; tile < work.tiles; tile += work.stride, ++round) {
    Sums sum = {};
    for (int n = work.each(); n > 0; --n, ++i) {
      wait_for(&s.full[i % STAGES], i / STAGES % 2);
      multiply(sum, s.stages[i % STAGES], warp, g, c);
      __syncwarp();
      if (lane == 0) arrive(&s.empty[i % STAGES]);
    }
    if (round > 0) wait_for(&s.sums_empty, (round + 1) % 2);
    send(s, sum, rank, warp, g, c);
    wait_for(&s.sums_full, round % 2);
    finish(s, y, bias, outputs, rows, tile * (GATED ? TILE / 2 : TILE) + rank * READY);
    __syncwarp();
    if (lane == 0) arrive(&s.sums_empty);
  }
}

#endif
