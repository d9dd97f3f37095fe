// embedding: rows of a table by id, times a factor; zeros for an id that is none of the table's rows.
//
// Shapes: ids int64 [tokens], table [rows, HIDDEN] whose first row is that of id `first`, out [tokens, HIDDEN];
//   contiguous, 16-byte aligned, HIDDEN a multiple of a 16-byte pack.
// Launch: block (THREADS, ROWS), grid (ceil(tokens / ROWS), ceil(packs of a row / (THREADS * EACH))). THREADS lanes copy
//   EACH packs of one row each.
// Numbers: the product with scale is in float32 and rounded once, as the reference does; with a scale of 1 none is made.
#include "common.cuh"

#ifndef HIDDEN
#define HIDDEN 4096
#endif
#ifndef THREADS
#define THREADS 128
#endif
#ifndef ROWS
#define ROWS 1
#endif
#ifndef EACH
#define EACH 2
#endif

constexpr int PACKS = HIDDEN / VEC;
static_assert(HIDDEN % VEC == 0, "a row is whole packs");

extern "C" __global__ void __launch_bounds__(THREADS* ROWS)
    embedding(scalar* out, const i64* ids, const scalar* table, i64 first, i64 rows, int tokens, float scale) {
  follow_briefly();
  const i64 token = i64(blockIdx.x) * ROWS + threadIdx.y;
  if (token >= tokens) return;
  const i64 row = ids[token] - first;
  const bool known = row >= 0 && row < rows;
  const int begin = blockIdx.y * (THREADS * EACH) + threadIdx.x;
  uint4 packs[EACH];
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int pack = begin + i * THREADS;
    packs[i] = known && pack < PACKS ? stream16(table + row * HIDDEN + pack * VEC) : make_uint4(0, 0, 0, 0);
  }
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int pack = begin + i * THREADS;
    if (pack >= PACKS) return;
    Pack<VEC> y = *reinterpret_cast<const Pack<VEC>*>(packs + i);
    if (scale != 1.0f)
#pragma unroll
      for (int j = 0; j < VEC; ++j) y.at[j] = from_float(to_float(y.at[j]) * scale);
    store<VEC>(out + token * HIDDEN + pack * VEC, y);
  }
}
