// silu_and_mul, gelu_and_mul, gelu_tanh_and_mul: x [rows, 2 * WIDTH] = gate | up -> act(gate) * up [rows, WIDTH].
//
// Shapes: contiguous, 16-byte aligned, WIDTH a multiple of a 16-byte pack.
// Launch: block THREADS, grid ceil(rows * packs of a row / THREADS); one pack of gate and of up a thread.
// Numbers: float32; act(gate) is rounded before the product, as the reference does.
#include "common.cuh"

#ifndef WIDTH
#define WIDTH 14336
#endif
#ifndef THREADS
#define THREADS 256
#endif

constexpr int PACKS = WIDTH / VEC;
static_assert(WIDTH % VEC == 0, "a row is whole packs");

template <float (*ACT)(float)>
__device__ __forceinline__ void gated(scalar* out, const scalar* x, i64 packs) {
  follow_briefly();
  const i64 index = i64(blockIdx.x) * THREADS + threadIdx.x;
  if (index >= packs) return;
  const i64 row = index / PACKS;
  const int column = int(index - row * PACKS) * VEC;
  const scalar* source = x + row * (2 * WIDTH) + column;
  const Pack<VEC> gate = load<VEC>(source);
  const Pack<VEC> up = load<VEC>(source + WIDTH);
  Pack<VEC> y;
#pragma unroll
  for (int j = 0; j < VEC; ++j) y.at[j] = from_float(rounded(ACT(to_float(gate.at[j]))) * to_float(up.at[j]));
  store<VEC>(out + index * VEC, y);
}

extern "C" __global__ void __launch_bounds__(THREADS) silu_and_mul(scalar* out, const scalar* x, i64 packs) {
  gated<silu>(out, x, packs);
}

extern "C" __global__ void __launch_bounds__(THREADS) gelu_and_mul(scalar* out, const scalar* x, i64 packs) {
  gated<gelu>(out, x, packs);
}

extern "C" __global__ void __launch_bounds__(THREADS) gelu_tanh_and_mul(scalar* out, const scalar* x, i64 packs) {
  gated<gelu_tanh>(out, x, packs);
}
