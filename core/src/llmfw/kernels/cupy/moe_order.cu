// The pairs of a token and an expert in the experts' order, and the tiles of up to ROWS pairs that one block multiplies.
//
// Shapes: experts int64 [pairs]; order int32 [pairs], the pair at each place; place int32 [pairs], the reverse; ends
//   int32 [EXPERTS], where each expert's places end; tiles int32 [1 + most, 4]: the number of tiles, then each one's
//   expert, first place and rows. most = min(EXPERTS, pairs) + pairs / ROWS are never exceeded.
// Launch: one block of THREADS.
// Which of an expert's pairs stands first differs from run to run; no result depends on it.
#include "common.cuh"

#ifndef EXPERTS
#define EXPERTS 128
#endif
#ifndef ROWS
#define ROWS 16
#endif
#ifndef THREADS
#define THREADS 512
#endif

struct alignas(16) Tile {
  int expert, first, rows, unused;
};

constexpr int EACH = (EXPERTS + THREADS - 1) / THREADS;  // experts of a thread

// Pairs and tiles of the experts before each, from those of each: a running sum over the block.
__device__ __forceinline__ int2 sum_before(int2 own, int2* sums) {
  int2 total = own;
  sums[threadIdx.x] = own;
  __syncthreads();
#pragma unroll 1
  for (int step = 1; step < THREADS; step *= 2) {
    const int2 left = int(threadIdx.x) >= step ? sums[threadIdx.x - step] : make_int2(0, 0);
    __syncthreads();
    total.x += left.x;
    total.y += left.y;
    sums[threadIdx.x] = total;
    __syncthreads();
  }
  return make_int2(total.x - own.x, total.y - own.y);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    moe_order(int* order, int* place, int* ends, Tile* tiles, const i64* experts, int pairs) {
  __shared__ int next[EXPERTS];
  __shared__ int2 sums[THREADS];
  for (int e = threadIdx.x; e < EXPERTS; e += THREADS) next[e] = 0;
  __syncthreads();
  follow();
  for (int p = threadIdx.x; p < pairs; p += THREADS) atomicAdd(next + int(experts[p]), 1);
  __syncthreads();

  int2 own = make_int2(0, 0);
  int count[EACH];
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int e = threadIdx.x * EACH + i;
    count[i] = e < EXPERTS ? next[e] : 0;
    own.x += count[i];
    own.y += (count[i] + ROWS - 1) / ROWS;
  }
  int2 before = sum_before(own, sums);
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int e = threadIdx.x * EACH + i;
    if (e >= EXPERTS) break;
    next[e] = before.x;
    for (int done = 0; done < count[i]; done += ROWS)
      tiles[1 + before.y++] = Tile{e, before.x + done, min(ROWS, count[i] - done), 0};
    before.x += count[i];
    ends[e] = before.x;
  }
  if (threadIdx.x == THREADS - 1) tiles[0] = Tile{sums[THREADS - 1].y, 0, 0, 0};
  __syncthreads();
  for (int p = threadIdx.x; p < pairs; p += THREADS) {
    const int at = atomicAdd(next + int(experts[p]), 1);
    order[at] = p;
    place[p] = at;
  }
}
