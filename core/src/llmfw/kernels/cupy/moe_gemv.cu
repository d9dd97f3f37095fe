// The experts of a few tokens: every pair of a token and one of its experts streams that expert's weights once.
//
// moe_up: y[pair] = act(gate, up) of x[pair / top_k] with expert experts[pair]. Shapes: x [tokens, IN], weight
//   [experts, 2 * outputs, IN] = gate | up, bias [experts, 2 * outputs] or null, y [pairs, outputs]; without GATED
//   weight [experts, outputs, IN], y = x weight^T + bias.
// moe_down: y[token] = sum of weights[pair] * (x[pair] weight[expert]^T + bias[expert]) over the token's pairs, plus
//   added[token]. Shapes: x [pairs, IN], weight [experts, outputs, IN], bias [experts, outputs] or null, added and y
//   [tokens, outputs], added may be null.
// All contiguous, 16-byte aligned, IN a multiple of a 16-byte pack, top_k at most 32; experts int64, weights float32.
// Launch: block WARPS * 32, grid (pairs or tokens, ceil(outputs / (R * WARPS / KW))): who shares an expert reads the
//   same rows at the same time. R, KW, U as in gemv.cu.
// Numbers: float32 products and sums, which need no order of blocks: results are equal in every run.
#include "common.cuh"

#ifndef IN
#define IN 2048
#endif
#ifndef GATED
#define GATED 1
#endif
#ifndef OUTPUTS
#define OUTPUTS 1
#endif
#ifndef SHARERS
#define SHARERS 4
#endif
#ifndef IN_FLIGHT
#define IN_FLIGHT 2
#endif
#ifndef ACTIVATION
#define ACTIVATION silu(gate) * up
#endif

constexpr int WARPS = 8, R = OUTPUTS, KW = SHARERS, U = IN_FLIGHT;
constexpr int TEAMS = WARPS / KW;                      // groups of KW warps in the block
constexpr int STRETCH = 32 * VEC;                      // values of one load of a warp
constexpr int STRETCHES = (IN + STRETCH - 1) / STRETCH;  // of a row

__device__ __forceinline__ float activate(float gate, float up) { return ACTIVATION; }

__device__ __forceinline__ float dot(const uint4& w, const Pack<VEC>& v) {
  const Pack<VEC> z = *reinterpret_cast<const Pack<VEC>*>(&w);
  float sum = 0;
#pragma unroll
  for (int j = 0; j < VEC; ++j) sum += to_float(z.at[j]) * to_float(v.at[j]);
  return sum;
}

// Adds each sum over the lanes and over the KW warps of a team; thread `item` < TEAMS * R then calls
// finish(output, N / R sums) for its output.
template <int N, typename Finish>
__device__ __forceinline__ void meet(float (&sum)[N], int outputs, const Finish& finish) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  __shared__ float parts[WARPS][N];
#pragma unroll
  for (int n = 0; n < N; ++n) {
    sum[n] = warp_sum(sum[n]);
    if (lane == 0) parts[warp][n] = sum[n];
  }
  __syncthreads();
  const int item = threadIdx.x, output = blockIdx.y * TEAMS * R + item;
  if (item >= TEAMS * R || output >= outputs) return;
  float total[N / R] = {};
#pragma unroll
  for (int i = 0; i < KW; ++i)
#pragma unroll
    for (int n = 0; n < N / R; ++n) total[n] += parts[item / R * KW + i][n * R + item % R];
  finish(output, total);
}

extern "C" __global__ void __launch_bounds__(WARPS * 32)
    moe_up(scalar* y, const scalar* x, const scalar* weight, const scalar* bias, const i64* experts, int outputs,
           int top_k) {
  constexpr int READ = GATED ? 2 * R : R;  // rows of the weight that a warp reads
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = warp % KW;
  const int pair = blockIdx.x, first = (blockIdx.y * TEAMS + warp / KW) * R;
  follow();
  const i64 before = experts[pair] * (GATED ? 2 : 1) * outputs;  // rows of the experts before
  const scalar* own = x + i64(pair / top_k) * IN;
  const scalar* source[READ];
#pragma unroll
  for (int r = 0; r < READ; ++r)
    source[r] = weight + (before + min(first + r % R, outputs - 1) + (r < R ? 0 : outputs)) * IN;
  float sum[READ] = {};
#pragma unroll 1
  for (int turn = part; turn < STRETCHES; turn += KW * U) {
    uint4 w[U][READ];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int at = (turn + u * KW) * STRETCH + lane * VEC;
#pragma unroll
      for (int r = 0; r < READ; ++r) w[u][r] = at < IN ? stream16(source[r] + at) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int at = (turn + u * KW) * STRETCH + lane * VEC;
      if (at >= IN) break;
      const Pack<VEC> v = load<VEC>(own + at);
#pragma unroll
      for (int r = 0; r < READ; ++r) sum[r] += dot(w[u][r], v);
    }
  }
  meet(sum, outputs, [&](int output, const float(&total)[READ / R]) {
    float gate = total[0] + (bias ? to_float(bias[before + output]) : 0.0f);
    if (GATED) {
      const float up = total[READ / R - 1] + (bias ? to_float(bias[before + outputs + output]) : 0.0f);
      gate = activate(rounded(gate), rounded(up));
    }
    y[i64(pair) * outputs + output] = from_float(gate);
  });
}

extern "C" __global__ void __launch_bounds__(WARPS * 32)
    moe_down(scalar* y, const scalar* x, const scalar* weight, const scalar* bias, const float* weights,
             const i64* experts, const scalar* added, int outputs, int top_k) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = warp % KW;
  const int token = blockIdx.x, first = (blockIdx.y * TEAMS + warp / KW) * R;
  const int all = top_k * STRETCHES;
  follow_older();
  const int mine = lane < top_k ? int(experts[token * top_k + lane]) : 0;
  const float share = lane < top_k ? weights[token * top_k + lane] : 0.0f;
  const scalar* own = x + i64(token) * top_k * IN;
  const scalar* source[R];
#pragma unroll
  for (int r = 0; r < R; ++r) source[r] = weight + i64(min(first + r, outputs - 1)) * IN;

  uint4 w[U][R];
  const auto fetch = [&](int turn) {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int stretch = min(turn + u * KW, all - 1), slot = stretch / STRETCHES;
      const int at = (stretch - slot * STRETCHES) * STRETCH + lane * VEC;
      const i64 before = i64(__shfl_sync(ALL, mine, slot)) * outputs * IN;
#pragma unroll
      for (int r = 0; r < R; ++r) w[u][r] = at < IN ? stream16(source[r] + before + at) : make_uint4(0, 0, 0, 0);
    }
  };
  float sum[R] = {};
  fetch(part);
  follow();
#pragma unroll 1
  for (int turn = part;;) {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int stretch = turn + u * KW, slot = min(stretch, all - 1) / STRETCHES;
      const int at = (stretch - slot * STRETCHES) * STRETCH + lane * VEC;
      const float factor = __shfl_sync(ALL, share, slot);
      if (stretch >= all || at >= IN) continue;
      const Pack<VEC> v = load<VEC>(own + i64(slot) * IN + at);
#pragma unroll
      for (int r = 0; r < R; ++r) sum[r] += factor * dot(w[u][r], v);
    }
    turn += KW * U;
    if (turn >= all) break;
    fetch(turn);
  }
  meet(sum, outputs, [&](int output, const float(&total)[1]) {
    float out = total[0];
    if (bias)
      for (int slot = 0; slot < top_k; ++slot) {
        const i64 pair = i64(token) * top_k + slot;
        out += weights[pair] * to_float(bias[experts[pair] * outputs + output]);
      }
    const i64 at = i64(token) * outputs + output;
    if (added) out = rounded(out) + to_float(added[at]);
    y[at] = from_float(out);
  });
}
