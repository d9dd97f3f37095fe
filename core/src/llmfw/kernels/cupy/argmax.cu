// argmax: the first greatest value of each row, -1 where it is not finite; NaN counts as the greatest.
//
// Shapes: logits [rows, VOCAB], rows `stride` apart, each aligned to WIDTH scalars; tokens int64 [rows]. With `store`
//   (int32) and places int64 [rows], store[places[row]] becomes max(token, 0). best and counters: a zero for each row.
// Launch: block THREADS, grid (parts, rows). The blocks of a row meet at best[row]; the last one writes the token and
//   leaves the zeros as they were.
#include "common.cuh"

#ifndef VOCAB
#define VOCAB 128256
#endif
#ifndef WIDTH
#define WIDTH 8
#endif
#ifndef THREADS
#define THREADS 512
#endif

constexpr int PACKS = VOCAB / WIDTH;
static_assert(VOCAB % WIDTH == 0 && THREADS % 32 == 0, "a row is whole packs");

// Keys are ordered as values are, equal values by the lower index; 0 is below all of them.
__device__ __forceinline__ u64 key_of(float value, bool nan, int index) {
  const u32 bits = __float_as_uint(value + 0.0f);  // of both zeros the same
  const u32 ordered = nan ? ~0u : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return u64(ordered) << 32 | u32(~index);
}

__device__ __forceinline__ i64 token_of(u64 key) {
  const u32 ordered = u32(key >> 32);
  const u32 bits = ordered & 0x80000000u ? ordered ^ 0x80000000u : ~ordered;
  return (bits & 0x7f800000u) == 0x7f800000u ? -1 : i64(u32(~u32(key)));
}

__device__ __forceinline__ u64 warp_greatest(u64 key) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const u32 high = u32(__shfl_xor_sync(ALL, int(key >> 32), step)), low = u32(__shfl_xor_sync(ALL, int(key), step));
    const u64 other = u64(high) << 32 | low;
    key = other > key ? other : key;
  }
  return key;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    argmax(i64* tokens, const scalar* logits, u64* best, int* counters, int* store, const i64* places, i64 stride) {
  follow();
  const int row = blockIdx.y, parts = gridDim.x;
  const int share = (PACKS + parts - 1) / parts;
  const int stop = min((int(blockIdx.x) + 1) * share, PACKS);
  const int start = blockIdx.x * share + threadIdx.x;
  const scalar* source = logits + row * stride;
  float top = NEG_INF;
  int at = start * WIDTH;
  bool nan = false;
#pragma unroll 2
  for (int pack = start; pack < stop; pack += THREADS) {
    const Pack<WIDTH> x = load<WIDTH>(source + pack * WIDTH);
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) {
      const float value = to_float(x.at[j]);
      nan |= value != value;
      if (value > top) {
        top = value;
        at = pack * WIDTH + j;
      }
    }
  }

  __shared__ u64 keys[THREADS / 32];
  const u64 mine = warp_greatest(start < stop ? key_of(top, nan, at) : 0);
  if (threadIdx.x % 32 == 0) keys[threadIdx.x / 32] = mine;
  __syncthreads();
  if (threadIdx.x > 0) return;
  u64 key = mine;
#pragma unroll
  for (int i = 1; i < THREADS / 32; ++i) key = keys[i] > key ? keys[i] : key;
  if (parts > 1) {
    atomicMax(best + row, key);
    __threadfence();
    if (atomicAdd(counters + row, 1) < parts - 1) return;
    __threadfence();
    key = atomicExch(best + row, u64(0));
    counters[row] = 0;
  }
  const i64 token = token_of(key);
  tokens[row] = token;
  if (store) store[places[row]] = token < 0 ? 0 : int(token);
}
