// moe_route: the top_k experts of each token and their weights, from the router's logits, as the reference tells.
//
// Shapes: logits [tokens, EXPERTS] contiguous, bias float32 [EXPERTS] or null, weights float32 [tokens, top_k], experts
//   int64 [tokens, top_k]; top_k and num_groups at most 32. scoring: 0 softmax, 1 softmax of the chosen, 2 sigmoid.
// Launch: block WARPS * 32, grid ceil(tokens / WARPS); a warp serves a token, lane l has experts l, l + 32, ...
// Numbers: float32; of equal scores the lower expert comes first.
#include "common.cuh"

#ifndef EXPERTS
#define EXPERTS 128
#endif

constexpr int WARPS = 4;
constexpr int EACH = (EXPERTS + 31) / 32;  // experts of a lane
constexpr int SOFTMAX = 0, TOPK_SOFTMAX = 1, SIGMOID = 2;

// Ordered as the values are, never 0.
__device__ __forceinline__ u32 key_of(float x) {
  const u32 bits = __float_as_uint(x), key = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return key ? key : 1;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(ALL, x, step));
  return x;
}

// The number of the greatest key over all lanes, the lowest of equals; `number` of a lane's key i is i * 32 + lane.
template <int COUNT>
__device__ __forceinline__ int greatest(const u32 (&key)[COUNT]) {
  u32 top = 0;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) top = key[i] > top ? key[i] : top;
  top = __reduce_max_sync(ALL, top);
  u32 number = ~0u;
#pragma unroll
  for (int i = COUNT - 1; i >= 0; --i)
    if (key[i] == top) number = i * 32 + threadIdx.x % 32;
  return int(__reduce_min_sync(ALL, number));
}

// The sum of the `count` greatest of `size` values.
__device__ __forceinline__ float sum_of_best(const float* values, int size, int count) {
  float sum = 0;
  u64 limit = ~u64(0);
  for (int i = 0; i < count; ++i) {
    u64 best = 0;
    int at = 0;
    for (int j = 0; j < size; ++j) {
      const u64 key = u64(key_of(values[j])) << 32 | u32(~j);
      if (key < limit && key > best) {
        best = key;
        at = j;
      }
    }
    limit = best;
    sum += values[at];
  }
  return sum;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32)
    moe_route(float* weights, i64* experts, const scalar* logits, const float* bias, int tokens, int top_k, int scoring,
              int renormalize, int num_groups, int top_groups, int group_best, float scale) {
  __shared__ float shared[WARPS][EXPERTS];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const i64 token = i64(blockIdx.x) * WARPS + warp;
  follow();
  if (token >= tokens) return;
  float score[EACH];
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int e = i * 32 + lane;
    score[i] = e < EXPERTS ? to_float(logits[token * EXPERTS + e]) : NEG_INF;
  }
  if (scoring == SOFTMAX) {
    float top = NEG_INF, total = 0;
#pragma unroll
    for (int i = 0; i < EACH; ++i) top = fmaxf(top, score[i]);
    top = warp_max(top);
#pragma unroll
    for (int i = 0; i < EACH; ++i) total += score[i] = expf(score[i] - top);
    total = warp_sum(total);
#pragma unroll
    for (int i = 0; i < EACH; ++i) score[i] /= total;
  } else if (scoring == SIGMOID) {
#pragma unroll
    for (int i = 0; i < EACH; ++i) score[i] = 1.0f / (1.0f + expf(-score[i]));
  }

  u32 key[EACH];
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int e = i * 32 + lane;
    const float wanted = score[i] + (bias && e < EXPERTS ? bias[e] : 0.0f);
    key[i] = e < EXPERTS ? key_of(wanted) : 0;
    if (num_groups > 1 && e < EXPERTS) shared[warp][e] = wanted;
  }
  if (num_groups > 1) {
    __syncwarp();
    const int size = EXPERTS / num_groups;
    u32 group[1] = {lane < num_groups ? key_of(sum_of_best(shared[warp] + lane * size, size, group_best)) : 0};
    u32 open = 0;
    for (int i = 0; i < top_groups; ++i) {
      const int best = greatest(group);
      open |= 1u << best;
      if (lane == best) group[0] = 0;
    }
#pragma unroll
    for (int i = 0; i < EACH; ++i)
      if (!(open >> (i * 32 + lane) / size & 1)) key[i] = 0;
  }

  float weight = scoring == TOPK_SOFTMAX ? NEG_INF : 0.0f;  // of the choice that this lane keeps
  int expert = 0;
#pragma unroll 1
  for (int slot = 0; slot < top_k; ++slot) {
    const int best = greatest(key);
    float value = 0;
#pragma unroll
    for (int i = 0; i < EACH; ++i)
      if (i * 32 + lane == best) {
        value = score[i];
        key[i] = 0;
      }
    value = __shfl_sync(ALL, value, best % 32);
    if (lane == slot) {
      weight = value;
      expert = best;
    }
  }
  if (scoring == TOPK_SOFTMAX) {
    const float top = warp_max(weight);
    weight = lane < top_k ? expf(weight - top) : 0.0f;
    weight /= warp_sum(weight);
  } else if (renormalize) {
    weight /= warp_sum(weight) + (scoring == SIGMOID ? 1e-20f : 0.0f);
  }
  if (lane >= top_k) return;
  weights[token * top_k + lane] = weight * scale;
  experts[token * top_k + lane] = expert;
}
