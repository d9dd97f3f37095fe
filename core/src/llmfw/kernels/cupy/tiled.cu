// linear and gated_linear for 65 to 256 rows: y = x weight^T + bias, by tiles that the multiprocessors share evenly.
//
// Shapes: x [rows, in], weight [outputs, in], bias [outputs] or null, y [rows, outputs]; contiguous, 16-byte aligned,
//   in a multiple of 8, rows at most ROWS * PARTS. GATED: weight [2 * outputs, in] = gate | up, bias alike, y = silu(gate) * up.
// Launch: block GROUPS * 128, 32 more if BRINGER; clusters of SHARE * SPLIT blocks. A block multiplies ROWS rows of x with
//   TILE rows of the weight (GATED: half of them gates, half their ups); for more rows of x there are PARTS blocks with
//   the same tile next to each other, so that L2 has it for all but one. SHARE blocks with neighbouring tiles share x: each
//   fetches a part and has it written to all. SPLIT blocks share the summed dimension; each stores a part of the outputs.
//   One thread asks for tiles, chunks of 64 values of every row, STAGES of the weight and X_STAGES of x ahead: memory takes
//   longer to answer than L2. Each of GROUPS warpgroups has a part of the rows of x. Without a split a cluster walks over
//   tiles, and those of the next are on their way while results are stored. BIAS: there may be one. PACKED: outputs are a
//   multiple of 8.
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
#ifndef PARTS
#define PARTS 1
#endif
#ifndef STAGES
#define STAGES 4
#endif
#ifndef X_STAGES
#define X_STAGES STAGES
#endif
#ifndef BIAS
#define BIAS 1
#endif
#ifndef PACKED
#define PACKED 0
#endif

#if DTYPE != F32 && HAS_TILE_COPIES

constexpr int CHUNK = 64, BOX_ROW = 128;  // values and bytes of a row of a box: the span of the swizzle
constexpr int EACH = ROWS / 64 / GROUPS;  // 64s of rows of x of a warpgroup
constexpr bool BRINGER = EACH == 1;       // a warp of its own asks for tiles, where registers are left for it
constexpr int WEIGHT_BYTES = TILE * BOX_ROW, X_BYTES = ROWS * BOX_ROW;
constexpr int WARPS = GROUPS * 4, BLOCKS = SHARE * SPLIT;
constexpr int COLUMNS = TILE / 8, RESULTS = COLUMNS / (1 + GATED);  // sums and results of a row, in eights
constexpr int READY = (RESULTS + SPLIT - 1) / SPLIT;                // most results of a row that a block stores
constexpr int SENT = SPLIT > 1 ? EACH * READY * (1 + GATED) : 1;    // fours of sums that a thread gives to each block
static_assert(EACH * 64 * GROUPS == ROWS && RESULTS * (1 + GATED) * 8 == TILE, "whole parts");
static_assert(ROWS % (8 * SHARE) == 0 && BLOCKS <= 8, "boxes of whole groups of 8 rows; what a cluster may have");
static_assert(STAGES >= X_STAGES, "who gives back a chunk of x gives back one of the weight");
static_assert(X_STAGES >= 2, "a chunk is given back while the next one is multiplied");

// The first of the results, in eights, that a block of a split stores.
__device__ constexpr int first_of(int split) { return RESULTS * split / SPLIT; }
__device__ constexpr int stored_by(int split) { return first_of(split + 1) - first_of(split); }

// All of the block's shared memory.
struct Shared {
  union {
    struct {
      u8 weight[STAGES][WEIGHT_BYTES], x[X_STAGES][X_BYTES];
    };
    float4 sums[SPLIT][SENT][WARPS * 32];  // by the block that sent them, once all stages are done with
  };
  Barrier full[STAGES], x_full[X_STAGES], empty[X_STAGES], drained, sums_full;
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
template <int COUNT>
struct Ring {
  int stage, parity;
  __device__ __forceinline__ void next() {
    if (++stage < COUNT) return;
    stage = 0;
    parity ^= 1;
  }
};

typedef float Sums[EACH][COLUMNS][4];

// A chunk's places in shared memory.
struct Chunk {
  Ring<STAGES> weight;
  Ring<X_STAGES> x;
  __device__ __forceinline__ void next() {
    weight.next();
    x.next();
  }
};

__device__ __forceinline__ void wait_for_chunk(Shared& s, const Chunk& at) {
  wait_here(&s.full[at.weight.stage], at.weight.parity);
  wait_here(&s.x_full[at.x.stage], at.x.parity);
}

// A warpgroup's rows of x with the tile's rows of the weight.
__device__ __forceinline__ void multiply(Sums& sum, const Shared& s, const Chunk& at, int group) {
  const Tile weight = tile_at(s.weight[at.weight.stage]), x = tile_at(s.x[at.x.stage] + group * EACH * 64 * BOX_ROW);
  open_products();
#pragma unroll
  for (int k = 0; k < CHUNK * 2; k += 32)
#pragma unroll
    for (int m = 0; m < EACH; ++m) multiply_tile(sum[m], further(x, m * 64 * BOX_ROW + k), further(weight, k));
  close_products();
}

// What a block asks for next.
struct Feed {
  const TensorMap &weight_map, &x_map;
  const Work& work;
  const Place& place;
  int outputs, first_row;  // of x
  Cursor weight, x;
  int weight_stage, weights_left;  // chunks of the weight that are not asked for yet

  __device__ __forceinline__ void bring_weight(Shared& s) {
    if (weights_left == 0) return;
    const u64 policy = read_once_policy();
    const int row = weight.tile * (TILE / (1 + GATED)), column = weight.chunk * CHUNK;
    u8* const to = s.weight[weight_stage];
    Barrier* const full = &s.full[weight_stage];
    arrive_expecting(full, WEIGHT_BYTES);
    copy_box(to, weight_map, row, column, full, policy);
    if (GATED) copy_box(to + WEIGHT_BYTES / 2, weight_map, outputs + row, column, full, policy);
    weight.next(work);
    weight_stage = weight_stage + 1 == STAGES ? 0 : weight_stage + 1;
    --weights_left;
  }

  __device__ __forceinline__ void bring_x(Shared& s, int stage) {
    const u64 policy = read_often_policy();
    const int offset = place.share * (ROWS / SHARE), row = first_row + offset, column = x.chunk * CHUNK;
    u8* const to = s.x[stage] + offset * BOX_ROW;
    Barrier* const full = &s.x_full[stage];
    arrive_expecting(full, X_BYTES);
    if (SHARE == 1)
      copy_box(to, x_map, row, column, full, policy);
    else
      copy_box_to(((1u << SHARE) - 1) << place.first_sharer(), to, x_map, row, column, full, policy);
    x.next(work);
  }

  // Once all that share x have given back a chunk: fills its stages anew.
  __device__ __forceinline__ void refill(Shared& s, const Ring<X_STAGES>& given) {
    wait_here(&s.empty[given.stage], given.parity);
    bring_weight(s);
    bring_x(s, given.stage);
  }
};

// Gives back a chunk to all that write to this block's shared memory.
__device__ __forceinline__ void give_back(Shared& s, const Ring<X_STAGES>& chunk, const Place& place, int lane) {
  __syncwarp();
  if (SHARE == 1) {
    if (lane == 0) arrive(&s.empty[chunk.stage]);
  } else if (lane < SHARE) {
    pass_at(&s.empty[chunk.stage], place.first_sharer() + lane);
  }
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
        const int of = first_of(to) + j % READY;
        if (of >= first_of(to + 1)) continue;
        const float(&d)[4] = sum[m][of + j / READY * RESULTS];
        float4* const at = &s.sums[place.split][m * READY * (1 + GATED) + j][threadIdx.x];
        if (to == place.split)
          *at = make_float4(d[0], d[1], d[2], d[3]);
        else
          send_to(at, place.rank_of(to), d, &s.sums_full);
      }
  wait_for(&s.sums_full, 0);
  const int stored = stored_by(place.split);
#pragma unroll
  for (int m = 0; m < EACH; ++m)
#pragma unroll
    for (int j = 0; j < READY * (1 + GATED); ++j) {
      if (RESULTS % SPLIT && j % READY >= stored) continue;
      float4 total = s.sums[0][m * READY * (1 + GATED) + j][threadIdx.x];
#pragma unroll
      for (int from = 1; from < SPLIT; ++from) {
        const float4 more = s.sums[from][m * READY * (1 + GATED) + j][threadIdx.x];
        total.x += more.x, total.y += more.y, total.z += more.z, total.w += more.w;
      }
      float(&d)[4] = sum[m][j % READY + j / READY * RESULTS];
      d[0] = total.x, d[1] = total.y, d[2] = total.z, d[3] = total.w;
    }
}

#include "tile_results.cuh"

extern "C" __global__ void __launch_bounds__((WARPS + BRINGER) * 32, 1)
    tiled(scalar* y, TENSOR_MAP x, TENSOR_MAP weight, const scalar* bias, int in, int outputs, int rows) {
  DYNAMIC_SHARED(memory);
  Shared& s = *reinterpret_cast<Shared*>(memory);
  const int lane = threadIdx.x % 32, warp = __shfl_sync(ALL, int(threadIdx.x) / 32, 0);  // known to be the warp's
  const int rank = BLOCKS > 1 ? rank_in_cluster() : 0;
  const Place place = {rank % SHARE, rank / SHARE};
  const bool brings = threadIdx.x == (BRINGER ? WARPS * 32 : 0);
  if (brings) {
    prefetch_map(weight);
    prefetch_map(x);
    for (int i = 0; i < STAGES; ++i) barrier_init(&s.full[i], 1);
    for (int i = 0; i < X_STAGES; ++i) {
      barrier_init(&s.x_full[i], 1);
      barrier_init(&s.empty[i], WARPS * SHARE);
    }
    barrier_init(&s.drained, WARPS * SPLIT);
    barrier_init(&s.sums_full, 1);
    barriers_ready();
    if (SPLIT > 1) arrive_expecting(&s.sums_full, (SPLIT - 1) * stored_by(place.split) * SENT / READY * WARPS * 32 * 16);
  }
  __syncthreads();
  if (BLOCKS > 1) {
    cluster_arrive();
    cluster_wait();  // the others' barriers are there
  }

  const int chunks = (in + CHUNK - 1) / CHUNK, tiles = (outputs * (1 + GATED) + TILE - 1) / TILE;
  const int clusters = int(gridDim.x) / BLOCKS / PARTS, cluster = int(blockIdx.x) / BLOCKS / PARTS;
  const int first_row = int(blockIdx.x) / BLOCKS % PARTS * ROWS;
  const Work work = {chunks * place.split / SPLIT, chunks * (place.split + 1) / SPLIT, cluster * SHARE + place.share,
                     clusters * SHARE, (tiles + SHARE - 1) / SHARE * SHARE};
  const int count = work.count();
  const Cursor begin = {work.tile, work.first};
  Feed feed = {weight, x, work, place, outputs, first_row, begin, begin, 0, count};
  if (brings)
    for (int i = 0; i < STAGES; ++i) feed.bring_weight(s);
  follow();
  if (brings)
    for (int i = 0; i < min(count, X_STAGES); ++i) feed.bring_x(s, i);
  Ring<X_STAGES> given = {};      // chunk that is given back next
  int wanted = count - X_STAGES;  // chunks that are given back: for the last ones nobody waits, and others may be gone
  if (BRINGER && warp == WARPS) {
    if (brings)
      for (; wanted > 0; --wanted, given.next()) feed.refill(s, given);
    return;
  }

  const int group = warp / 4, row = first_row + group * EACH * 64 + warp % 4 * 16 + lane / 4;
  Chunk at = {};  // that is taken next
  const auto turn_over = [&] {
    if (wanted-- <= 0) return;
    give_back(s, given, place, lane);
    if (!BRINGER) {
      if (brings) feed.refill(s, given);
      __syncwarp();
    }
    given.next();
  };
  for (int tile = work.tile; tile < work.tiles; tile += work.stride) {
    Sums sum = {};
    for (int n = 0; n < work.each(); ++n, at.next()) {
      wait_for_chunk(s, at);
      multiply(sum, s, at, group);
      await_products<1>();
      if (n > 0) turn_over();
    }
    await_products<0>();
    turn_over();
#pragma unroll
    for (int m = 0; m < EACH; ++m) settle(sum[m]);
    if (SPLIT > 1) exchange(sum, s, place, lane);
    const int output = (tile * RESULTS + first_of(place.split)) * 8;
    const int end = min(outputs, (tile * RESULTS + first_of(place.split + 1)) * 8);
#pragma unroll
    for (int m = 0; m < EACH; ++m) finish(sum[m], y, bias, outputs, rows, row + m * 64, output, end, lane % 4);
  }
}

#endif
