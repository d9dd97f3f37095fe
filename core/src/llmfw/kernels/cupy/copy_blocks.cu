// copy_blocks: blocks of many caches, each copied from one place to another of the same cache; all in one launch.
//
// Shapes: caches int64 [tensors, 2], where each cache begins and the bytes of its blocks, which are whole packs of 16;
//   sources, targets int64 [pairs]. No target is named twice, or is a source.
// Launch: block THREADS, grid (ceil(largest block / (THREADS * IN_FLIGHT * 16)), pairs, tensors).
#include "common.cuh"

#ifndef THREADS
#define THREADS 512
#endif
#ifndef IN_FLIGHT
#define IN_FLIGHT 4
#endif

extern "C" __global__ void __launch_bounds__(THREADS)
    copy_blocks(const i64* caches, const i64* sources, const i64* targets) {
  follow();
  const i64 packs = caches[2 * blockIdx.z + 1] / 16;
  uint4* cache = reinterpret_cast<uint4*>(caches[2 * blockIdx.z]);
  const uint4* from = cache + sources[blockIdx.y] * packs;
  uint4* to = cache + targets[blockIdx.y] * packs;
  const i64 first = i64(blockIdx.x) * THREADS * IN_FLIGHT + threadIdx.x;
  uint4 x[IN_FLIGHT];
#pragma unroll
  for (int i = 0; i < IN_FLIGHT; ++i)
    if (first + i * THREADS < packs) x[i] = from[first + i * THREADS];
#pragma unroll
  for (int i = 0; i < IN_FLIGHT; ++i)
    if (first + i * THREADS < packs) to[first + i * THREADS] = x[i];
}
