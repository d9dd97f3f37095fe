// Combines the splits of latent attention. Shapes and numbers: latent_attention.cu.
//
// Launch: block V_DIM / 4 rounded up to whole warps, grid (rows of a request, requests).
#include "common.cuh"
#include "latent.cuh"

#if DTYPE != F32

extern "C" __global__ void __launch_bounds__((V_DIM / 4 + 31) / 32 * 32)
    merge_latent(scalar* out, const int* cu_query_lens, const int* kv_lens, const float4* partial,
                 const float2* partial_stats, int first_request, int row_tiles, int splits, int least_share) {
  constexpr int AT_ONCE = 8;  // splits that a thread reads at once
  constexpr int QUADS = V_DIM / 4;
  const int row = blockIdx.x % ROWS, row_tile = blockIdx.x / ROWS, quad = threadIdx.x;
  follow_older();
  const Share mine =
      share_of(cu_query_lens, kv_lens, first_request + blockIdx.y, row_tile * ROWS, 0, splits, least_share);
  follow();
  if (int(blockIdx.x) >= mine.rows || mine.active == 1 || quad >= QUADS) return;
  const i64 place = (i64(blockIdx.y) * row_tiles + row_tile) * splits;
  float high = NEG_INF, total = 0;
  float4 y = make_float4(0, 0, 0, 0);
  for (int other = 0; other < mine.active; other += AT_ONCE) {
    float4 x[AT_ONCE];
    float2 its[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const i64 index = (place + min(other + i, mine.active - 1)) * ROWS + row;
      x[i] = load_l2(partial + index * QUADS + quad);
      its[i] = load_l2(partial_stats + index);
    }
    float peak = high;
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) peak = fmaxf(peak, its[i].x);
    const float fade = high == NEG_INF ? 0.0f : exp2_fast(high - peak);
    high = peak;
    total *= fade;
    y = make_float4(y.x * fade, y.y * fade, y.z * fade, y.w * fade);
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const float part = other + i < mine.active && its[i].x != NEG_INF ? exp2_fast(its[i].x - high) : 0.0f;
      total += its[i].y * part;
      y.x += x[i].x * part;
      y.y += x[i].y * part;
      y.z += x[i].z * part;
      y.w += x[i].w * part;
    }
  }
  const float factor = 1.0f / total;
  Pack<4> result;
  result.at[0] = from_float(y.x * factor);
  result.at[1] = from_float(y.y * factor);
  result.at[2] = from_float(y.z * factor);
  result.at[3] = from_float(y.w * factor);
  store<4>(out + (i64(mine.q_start) * HEADS + blockIdx.x) * V_DIM + quad * 4, result);
}

#endif
