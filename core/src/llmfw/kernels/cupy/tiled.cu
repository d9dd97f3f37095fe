// linear and gated_linear for 65 to 256 rows: y = x weight^T + bias, by tiles that the multiprocessors share evenly.
//
// Shapes: x [rows, in], weight [outputs, in], bias [outputs] or null, y [rows, outputs]; contiguous, 16-byte aligned,
//   in a multiple of 8, rows at most ROWS. GATED: weight [2 * outputs, in] = gate | up, bias alike, y = silu(gate) * up.
// Launch: block GROUPS * 128, clusters of SHARE * SPLIT blocks. A block multiplies all rows of x with TILE rows of the
//   weight (GATED: half of them gates, half their ups). SHARE blocks with neighbouring tiles share x: each fetches a part
//   and has it written to all. SPLIT blocks share the summed dimension; each stores a part of the outputs. One thread
//   asks for tiles, 64 values of every row at a time, STAGES ahead; each of GROUPS warpgroups has a part of the rows of
//   x. Without a split a cluster walks over tiles, and those of the next are on their way while results are stored.
// Numbers: float32 sums on tensor cores; GATED rounds where the references of linear and silu_and_mul round.
//
// The weight's first chunks are asked for before the kernel before is done (follow in common.cuh).
#include "common.cuh"
#include "hopper.cuh"

#ifndef ROWS
#define ROWS 128
#endif
#ifndef GATED
#define GATED 0
#endif
#ifndef GROUPS
#define GROUPS 2
#endif
#ifndef TILE
#define TILE 128
#endif
#ifndef SHARE
#define SHARE 1
#endif
#ifndef SPLIT
#define SPLIT 1
#endif
#ifndef STAGES
#define STAGES 4
#endif

#if DTYPE != F32 && HAS_TILE_COPIES

constexpr int CHUNK = 64, BOX_ROW = 128;  // values and bytes of a row of a box: the span of the swizzle
constexpr int EACH = ROWS / 64 / GROUPS;  // 64s of rows of x of a warpgroup
constexpr int WEIGHT_BYTES = TILE * BOX_ROW, STAGE_BYTES = WEIGHT_BYTES + ROWS * BOX_ROW;
constexpr int WARPS = GROUPS * 4, BLOCKS = SHARE * SPLIT;
constexpr int COLUMNS = TILE / 8;                             // sums of a row, in eights
constexpr int READY = COLUMNS / (1 + GATED) / SPLIT;          // results of a row that a block stores, in eights
constexpr int SENT = SPLIT > 1 ? EACH * COLUMNS / SPLIT : 1;  // fours of sums that a thread gives to each block
static_assert(EACH * 64 * GROUPS == ROWS && READY * (1 + GATED) * SPLIT * 8 == TILE, "whole parts");
static_assert(ROWS % (8 * SHARE) == 0 && BLOCKS <= 8, "boxes of whole groups of 8 rows; what a cluster may have");

// All of the block's shared memory.
struct Shared {
  union {
    u8 stages[STAGES][STAGE_BYTES];
    float4 sums[SPLIT][SENT][WARPS * 32];  // by the block that sent them, once all stages are done with
  };
  Barrier full[STAGES], empty[STAGES], drained, sums_full;
};

// The place of a block in its cluster.
struct Place {
  int share, split;
  __device__ __forceinline__ int first_sharer() const { return split * SHARE; }
  __device__ __forceinline__ int rank_of(int of_split) const { return of_split * SHARE + share; }
};

// The work of one block: chunks [first, last) of the summed dimension, of every so-many-th tile.
struct Work {
  int first, last, tile, stride, tiles;
  __device__ __forceinline__ int each() const { return last - first; }
  __device__ __forceinline__ int count() const { return (tiles - tile + stride - 1) / stride * each(); }
};

// A chunk of the work, and the one after it.
struct Cursor {
  int tile, chunk;
  __device__ __forceinline__ void next(const Work& work) {
    if (++chunk < work.last) return;
    chunk = work.first;
    tile += work.stride;
  }
};

// A stage of shared memory, and the one after it; the parity of its barriers changes with every round.
struct Ring {
  int stage, parity;
  __device__ __forceinline__ void next() {
    if (++stage < STAGES) return;
    stage = 0;
    parity ^= 1;
  }
  __device__ __forceinline__ int before() const { return (stage ? stage : STAGES) - 1; }
  __device__ __forceinline__ int parity_before() const { return stage ? parity : parity ^ 1; }
};

__device__ __forceinline__ void bring_weight(Shared& s, const TensorMap& weight, int outputs, const Cursor& from,
                                             int stage) {
  const u64 policy = read_once_policy();
  const int row = from.tile * (TILE / (1 + GATED)), column = from.chunk * CHUNK;
  arrive_expecting(&s.full[stage], STAGE_BYTES);
  copy_box(s.stages[stage], weight, row, column, &s.full[stage], policy);
  if (GATED) copy_box(s.stages[stage] + WEIGHT_BYTES / 2, weight, outputs + row, column, &s.full[stage], policy);
}

__device__ __forceinline__ void bring_x(Shared& s, const TensorMap& x, const Place& place, const Cursor& from, int stage) {
  constexpr int SLICE = ROWS / SHARE;
  const int row = place.share * SLICE, column = from.chunk * CHUNK;
  u8* to = s.stages[stage] + WEIGHT_BYTES + row * BOX_ROW;
  if (SHARE == 1)
    copy_box(to, x, row, column, &s.full[stage], read_often_policy());
  else
    copy_box_to(((1u << SHARE) - 1) << place.first_sharer(), to, x, row, column, &s.full[stage], read_often_policy());
}

typedef float Sums[EACH][COLUMNS][4];

// A warpgroup's rows of x with the tile's rows of the weight.
__device__ __forceinline__ void multiply(Sums& sum, const u8* stage, int group) {
  const Tile weight = tile_at(stage), x = tile_at(stage + WEIGHT_BYTES + group * EACH * 64 * BOX_ROW);
  open_products();
#pragma unroll
  for (int k = 0; k < CHUNK * 2; k += 32)
#pragma unroll
    for (int m = 0; m < EACH; ++m) multiply_tile(sum[m], further(x, m * 64 * BOX_ROW + k), further(weight, k));
  close_products();
}

// The chunks that a block has asked for and taken, and what it asks for next.
struct Feed {
  Cursor next;
  Ring ring;  // the chunk that is taken next
  int left;   // chunks that are not taken yet
};

// Gives back the stage of the chunk before, and has it filled anew where there is one more chunk for it: else nobody
// waits, and the others' blocks may be gone. Any block that writes to this one's shared memory waits for it.
__device__ __forceinline__ void turn_over(Shared& s, Feed& feed, const TensorMap& weight, const TensorMap& x,
                                          const Work& work, const Place& place, int outputs, int lane) {
  if (feed.left < STAGES) return;
  const int stage = feed.ring.before();
  __syncwarp();
  if (SHARE == 1) {
    if (lane == 0) arrive(&s.empty[stage]);
  } else if (lane < SHARE) {
    pass_at(&s.empty[stage], place.first_sharer() + lane);
  }
  if (threadIdx.x == 0) {
    wait_here(&s.empty[stage], feed.ring.parity_before());
    bring_weight(s, weight, outputs, feed.next, stage);
    bring_x(s, x, place, feed.next, stage);
  }
  __syncwarp();
  feed.next.next(work);
}

// Each block of a split gets everybody's sums of the outputs that it stores; they lie first among a thread's after this.
__device__ __forceinline__ void exchange(Sums& sum, Shared& s, const Place& place, int lane) {
  __syncwarp();
  if (lane < SPLIT) pass_at(&s.drained, place.rank_of(lane));
  wait_here(&s.drained, 0);
#pragma unroll
  for (int to = 0; to < SPLIT; ++to)
#pragma unroll
    for (int m = 0; m < EACH; ++m)
#pragma unroll
      for (int j = 0; j < READY * (1 + GATED); ++j) {
        const float(&d)[4] = sum[m][j % READY + to * READY + j / READY * READY * SPLIT];
        store_at(&s.sums[place.split][m * READY * (1 + GATED) + j][threadIdx.x], place.rank_of(to), d[0], d[1], d[2],
                 d[3]);
      }
  __syncwarp();
  if (lane < SPLIT) arrive_at(&s.sums_full, place.rank_of(lane));
  wait_for(&s.sums_full, 0);
#pragma unroll
  for (int m = 0; m < EACH; ++m)
#pragma unroll
    for (int j = 0; j < READY * (1 + GATED); ++j) {
      float4 total = s.sums[0][m * READY * (1 + GATED) + j][threadIdx.x];
#pragma unroll
      for (int from = 1; from < SPLIT; ++from) {
        const float4 more = s.sums[from][m * READY * (1 + GATED) + j][threadIdx.x];
        total.x += more.x, total.y += more.y, total.z += more.z, total.w += more.w;
      }
      sum[m][j][0] = total.x, sum[m][j][1] = total.y, sum[m][j][2] = total.z, sum[m][j][3] = total.w;
    }
}

#include "tile_results.cuh"

extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
    tiled(scalar* y, TENSOR_MAP x, TENSOR_MAP weight, const scalar* bias, int in, int outputs, int rows) {
  DYNAMIC_SHARED(memory);
  Shared& s = *reinterpret_cast<Shared*>(memory);
  const int lane = threadIdx.x % 32, warp = __shfl_sync(ALL, int(threadIdx.x) / 32, 0);  // known to be the warp's
  const int rank = BLOCKS > 1 ? rank_in_cluster() : 0;
  const Place place = {rank % SHARE, rank / SHARE};
  if (threadIdx.x == 0) {
    prefetch_map(weight);
    prefetch_map(x);
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(&s.full[i], 1);
      barrier_init(&s.empty[i], WARPS * SHARE);
    }
    barrier_init(&s.drained, WARPS * SPLIT);
    barrier_init(&s.sums_full, WARPS * SPLIT);
    barriers_ready();
  }
  __syncthreads();
  if (BLOCKS > 1) {
    cluster_arrive();
    cluster_wait();  // the others' barriers are there
  }

  const int chunks = (in + CHUNK - 1) / CHUNK, tiles = (outputs * (1 + GATED) + TILE - 1) / TILE;
  const int clusters = int(gridDim.x) / BLOCKS, cluster = int(blockIdx.x) / BLOCKS;
  const Work work = {chunks * place.split / SPLIT, chunks * (place.split + 1) / SPLIT, cluster * SHARE + place.share,
                     clusters * SHARE, (tiles + SHARE - 1) / SHARE * SHARE};
  Feed feed = {{work.tile, work.first}, {0, 0}, work.count()};
  Cursor early = feed.next;
  if (threadIdx.x == 0)
    for (int i = 0; i < min(feed.left, STAGES); ++i, early.next(work))
      bring_weight(s, weight, outputs, early, i);
  follow();
  for (int i = 0; i < min(feed.left, STAGES); ++i, feed.next.next(work))
    if (threadIdx.x == 0) bring_x(s, x, place, feed.next, i);

  const int row = warp / 4 * EACH * 64 + warp % 4 * 16 + lane / 4;
  for (int tile = work.tile; tile < work.tiles; tile += work.stride) {
    Sums sum = {};
    for (int n = 0; n < work.each(); ++n) {
      wait_here(&s.full[feed.ring.stage], feed.ring.parity);
      multiply(sum, s.stages[feed.ring.stage], warp / 4);
      await_products<1>();
      if (n > 0) turn_over(s, feed, weight, x, work, place, outputs, lane);
      feed.ring.next();
      --feed.left;
    }
    await_products<0>();
    turn_over(s, feed, weight, x, work, place, outputs, lane);
#pragma unroll
    for (int m = 0; m < EACH; ++m) settle(sum[m]);
    if (SPLIT > 1) exchange(sum, s, place, lane);
    finish(sum, y, bias, outputs, rows, row, tile * (TILE / (1 + GATED)) + place.split * READY * 8, lane % 4);
  }
}

#endif
