// latent_rope_and_cache: norm of the latent, rotary embedding of q and of the shared key, write to the latent cache.
//
// Shapes: q [tokens, HEADS, ROTARY_DIM], tokens q_token and heads q_head apart, q_out the same with out_token and
//   out_head; kv [tokens, LATENT_DIM + ROTARY_DIM], rows kv_stride apart; positions, slots int64 [tokens], a negative
//   slot writes nothing; cos_sin float32 [positions, ROTARY_DIM], cosines then sines, or null; cache [slots,
//   LATENT_DIM + ROTARY_DIM], slots cache_stride apart; norm [LATENT_DIM] or null.
// Launch: block THREADS, grid (tokens, 1 + ceil(HEADS * ROTARY_DIM / 2 / THREADS)). A token's first block makes the
//   cached row, the others rotate its queries, a pair of values a thread.
// Numbers: norm and rotation in float32, with the reference's rounding between them.
#include "common.cuh"

#ifndef HEADS
#define HEADS 16
#endif
#ifndef LATENT_DIM
#define LATENT_DIM 512
#endif
#ifndef ROTARY_DIM
#define ROTARY_DIM 64
#endif
#ifndef INTERLEAVED
#define INTERLEAVED 1
#endif
#ifndef WIDTH  // values of the latent that move in one access
#define WIDTH 4
#endif
#ifndef THREADS
#define THREADS 128
#endif

constexpr int PAIRS = ROTARY_DIM / 2;
constexpr int PACKS = LATENT_DIM / WIDTH;
constexpr int PACKS_EACH = (PACKS + THREADS - 1) / THREADS;
static_assert(LATENT_DIM % WIDTH == 0 && ROTARY_DIM % 2 == 0 && THREADS % 32 == 0, "whole packs and pairs");

// Rotates the pair `pair` of a head from `from` to `to` by the token's angles, or copies it where there are none.
__device__ __forceinline__ void rotate(scalar* to, const scalar* from, const float* angles, int pair) {
  const int first = INTERLEAVED ? 2 * pair : pair, second = INTERLEAVED ? first + 1 : first + PAIRS;
  const float a = to_float(from[first]), b = to_float(from[second]);
  const float cosine = angles ? __ldg(angles + pair) : 1.0f, sine = angles ? __ldg(angles + PAIRS + pair) : 0.0f;
  to[first] = from_float(a * cosine - b * sine);
  to[second] = from_float(b * cosine + a * sine);
}

// The sum of all threads' values, to all threads.
__device__ __forceinline__ float block_sum(float x) {
  __shared__ float parts[THREADS / 32];
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  float total = 0;
#pragma unroll
  for (int i = 0; i < THREADS / 32; ++i) total += parts[i];
  return total;
}

// The latent with its norm, by the whole block.
__device__ __forceinline__ void write_latent(scalar* to, const scalar* from, const scalar* norm, float eps) {
  Pack<WIDTH> x[PACKS_EACH];
  float squares = 0;
#pragma unroll
  for (int i = 0; i < PACKS_EACH; ++i) {
    const int pack = i * THREADS + threadIdx.x;
    if (pack >= PACKS) break;
    x[i] = load<WIDTH>(from + pack * WIDTH);
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) squares += to_float(x[i].at[j]) * to_float(x[i].at[j]);
  }
  const float scale = norm ? rsqrtf(block_sum(squares) * (1.0f / LATENT_DIM) + eps) : 1.0f;
  if (!to) return;
#pragma unroll
  for (int i = 0; i < PACKS_EACH; ++i) {
    const int pack = i * THREADS + threadIdx.x;
    if (pack >= PACKS) break;
    if (norm) {
      const Pack<WIDTH> weight = load<WIDTH>(norm + pack * WIDTH);
#pragma unroll
      for (int j = 0; j < WIDTH; ++j)
        x[i].at[j] = from_float(rounded(to_float(x[i].at[j]) * scale) * to_float(weight.at[j]));
    }
    store<WIDTH>(to + pack * WIDTH, x[i]);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    latent_rope(scalar* q_out, const scalar* q, const scalar* kv, const i64* positions, const float* cos_sin,
                scalar* cache, const i64* slots, const scalar* norm, i64 out_token, i64 out_head, i64 q_token,
                i64 q_head, i64 kv_stride, i64 cache_stride, float eps) {
  const int token = blockIdx.x;
  follow();
  const float* angles = cos_sin ? cos_sin + positions[token] * ROTARY_DIM : nullptr;
  if (blockIdx.y > 0) {
    const int item = (blockIdx.y - 1) * THREADS + threadIdx.x, head = item / PAIRS;
    if (head < HEADS)
      rotate(q_out + token * out_token + head * out_head, q + token * q_token + head * q_head, angles, item % PAIRS);
    return;
  }
  const i64 slot = slots[token];
  const scalar* row = kv + token * kv_stride;
  scalar* target = slot < 0 ? nullptr : cache + slot * cache_stride;
  write_latent(target, row, norm, eps);
  if (!target) return;
  for (int pair = threadIdx.x; pair < PAIRS; pair += THREADS)
    rotate(target + LATENT_DIM, row + LATENT_DIM, angles, pair);
}
