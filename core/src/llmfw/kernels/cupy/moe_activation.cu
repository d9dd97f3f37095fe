// The gated activation over rows in the experts' order: y[p] = act(gate, up) of x[p] + bias[expert of place p].
//
// Shapes: x [pairs, 2 * WIDTH] = gate | up, order int32 [pairs] the pair at each place, experts int64 [pairs] by pair,
//   bias [experts, 2 * WIDTH] or null, y [pairs, WIDTH]; contiguous, 16-byte aligned, WIDTH a multiple of a pack.
// Launch: block THREADS, grid (pairs, ceil(packs of a row / THREADS)); a pack of the result a thread.
// Numbers: float32; gate and up are rounded where the products of moe_grouped.cu round them.
#include "common.cuh"

#ifndef WIDTH
#define WIDTH 768
#endif
#ifndef THREADS
#define THREADS 128
#endif
#ifndef ACTIVATION
#define ACTIVATION silu(gate) * up
#endif

__device__ __forceinline__ float activate(float gate, float up) { return ACTIVATION; }

extern "C" __global__ void __launch_bounds__(THREADS)
    moe_activation(scalar* y, const scalar* x, const scalar* bias, const int* order, const i64* experts) {
  const i64 place = blockIdx.x;
  const int column = (blockIdx.y * THREADS + threadIdx.x) * VEC;
  follow();
  if (column >= WIDTH) return;
  const scalar* source = x + place * (2 * WIDTH) + column;
  const Pack<VEC> gate = load<VEC>(source), up = load<VEC>(source + WIDTH);
  Pack<VEC> gate_bias = {}, up_bias = {};
  if (bias) {
    const scalar* own = bias + experts[order[place]] * (2 * WIDTH) + column;
    gate_bias = load<VEC>(own);
    up_bias = load<VEC>(own + WIDTH);
  }
  Pack<VEC> out;
#pragma unroll
  for (int j = 0; j < VEC; ++j)
    out.at[j] = from_float(activate(rounded(to_float(gate.at[j]) + to_float(gate_bias.at[j])),
                                    rounded(to_float(up.at[j]) + to_float(up_bias.at[j]))));
  store<VEC>(y + place * WIDTH + column, out);
}
