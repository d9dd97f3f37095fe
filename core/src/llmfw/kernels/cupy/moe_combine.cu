// out[token] = sum of weights[pair] * (x[place of pair] + bias[expert of pair]) over the token's top_k pairs, plus
//   added[token].
//
// Shapes: x [pairs, HIDDEN], weights float32 [pairs], experts int64 [pairs], bias [experts, HIDDEN] or null, place
//   int32 [pairs] or null (each pair at its own number), added [tokens, HIDDEN] or null, out the same; contiguous, 16-byte aligned, HIDDEN a
//   multiple of a 16-byte pack.
// Launch: block THREADS, grid (tokens, ceil(packs of a row / THREADS)); a pack of the result a thread.
// Numbers: float32, always in the order of the token's pairs.
#include "common.cuh"

#ifndef HIDDEN
#define HIDDEN 2048
#endif
#ifndef THREADS
#define THREADS 128
#endif

extern "C" __global__ void __launch_bounds__(THREADS)
    moe_combine(scalar* out, const scalar* x, const float* weights, const i64* experts, const scalar* bias,
                const int* place, const scalar* added, int top_k) {
  const int column = (blockIdx.y * THREADS + threadIdx.x) * VEC;
  const i64 token = blockIdx.x;
  follow();
  if (column >= HIDDEN) return;
  float sum[VEC] = {};
#pragma unroll 4
  for (int slot = 0; slot < top_k; ++slot) {
    const i64 pair = token * top_k + slot;
    const float weight = weights[pair];
    const Pack<VEC> row = load<VEC>(x + (place ? place[pair] : pair) * HIDDEN + column);
    Pack<VEC> shift = {};
    if (bias) shift = load<VEC>(bias + experts[pair] * HIDDEN + column);
#pragma unroll
    for (int j = 0; j < VEC; ++j) sum[j] += weight * (to_float(row.at[j]) + (bias ? to_float(shift.at[j]) : 0.0f));
  }
  const i64 at = token * HIDDEN + column;
  Pack<VEC> more = {}, y;
  if (added) more = load<VEC>(added + at);
#pragma unroll
  for (int j = 0; j < VEC; ++j) y.at[j] = from_float(added ? rounded(sum[j]) + to_float(more.at[j]) : sum[j]);
  store<VEC>(out + at, y);
}
