// gather_cache: K and V of whole requests, from the blocks of a paged cache into packed rows.
//
// Shapes: k_cache, v_cache [blocks, BLOCK_SIZE, row of scalars], rows contiguous, K_PACKS and V_PACKS of 16 bytes;
//   k [keys, K_PACKS], v [keys, V_PACKS] of all requests one after another; starts int32 [requests + 1], the first
//   key of each; with V_PACKS 0 there is no V; block_tables int32 [requests, table_stride].
// Launch: block THREADS, grid (ceil(longest / KEYS), requests); a block copies KEYS keys of one request.
#include "common.cuh"

#ifndef BLOCK_SIZE
#define BLOCK_SIZE 16
#endif
#ifndef K_PACKS
#define K_PACKS 128
#endif
#ifndef V_PACKS
#define V_PACKS 128
#endif
#ifndef KEYS
#define KEYS 16
#endif
#ifndef THREADS
#define THREADS 256
#endif

template <int PACKS>
__device__ __forceinline__ void copy_keys(uint4* out, const scalar* cache, const int* table, i64 block_stride,
                                          i64 slot_stride, int first, int count) {
  if constexpr (PACKS > 0) {
#pragma unroll 4
    for (int item = threadIdx.x; item < count * PACKS; item += THREADS) {
      const int key = first + item / PACKS, pack = item % PACKS;
      const scalar* row = cache + table[key / BLOCK_SIZE] * block_stride + key % BLOCK_SIZE * slot_stride;
      out[i64(key) * PACKS + pack] = reinterpret_cast<const uint4*>(row)[pack];
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    gather_cache(uint4* k, uint4* v, const scalar* k_cache, const scalar* v_cache, const int* block_tables,
                 const int* starts, i64 table_stride, i64 k_block_stride, i64 k_slot_stride, i64 v_block_stride,
                 i64 v_slot_stride) {
  follow();
  const int request = blockIdx.y, start = starts[request];
  const int first = blockIdx.x * KEYS, count = min(KEYS, starts[request + 1] - start - first);
  const int* table = block_tables + request * table_stride;
  copy_keys<K_PACKS>(k + i64(start) * K_PACKS, k_cache, table, k_block_stride, k_slot_stride, first, count);
  copy_keys<V_PACKS>(v + i64(start) * V_PACKS, v_cache, table, v_block_stride, v_slot_stride, first, count);
}
