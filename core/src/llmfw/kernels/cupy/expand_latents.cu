// Keys and values of all heads, laid out for flash attention, from the product of latents with their weight.
//
// Shapes: made [keys, HEADS, KEY_DIM + V_DIM]; rows [keys, LATENT_DIM + ROTARY_DIM], whose last ROTARY_DIM
//   values are the key that all heads share; k, v [keys, HEADS, KEY_DIM + ROTARY_DIM], v with zeros after V_DIM.
//   Contiguous, all dims multiples of 8.
// Launch: block THREADS, grid (keys).
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
#ifndef KEY_DIM
#define KEY_DIM 128
#endif
#ifndef V_DIM
#define V_DIM 128
#endif
#ifndef THREADS
#define THREADS 128
#endif

#if DTYPE != F32

constexpr int K_PACKS = KEY_DIM / 8, V_PACKS = V_DIM / 8, ROTARY_PACKS = ROTARY_DIM / 8, MADE = K_PACKS + V_PACKS;
constexpr int PACKS = K_PACKS + ROTARY_PACKS;  // of 16 bytes in a head of k and of v
static_assert(KEY_DIM % 8 == 0 && V_DIM % 8 == 0 && ROTARY_DIM % 8 == 0 && LATENT_DIM % 8 == 0, "whole packs");
static_assert(V_PACKS <= PACKS, "a value fits a key's width");

extern "C" __global__ void __launch_bounds__(THREADS)
    expand_latents(uint4* k, uint4* v, const uint4* made, const uint4* rows) {
  follow();
  const i64 key = blockIdx.x;
  const uint4* source = made + key * HEADS * MADE;
  const uint4* shared = rows + key * (LATENT_DIM + ROTARY_DIM) / 8 + LATENT_DIM / 8;
#pragma unroll 4
  for (int item = threadIdx.x; item < HEADS * PACKS; item += THREADS) {
    const int head = item / PACKS, pack = item % PACKS;
    k[key * HEADS * PACKS + item] = pack < K_PACKS ? source[head * MADE + pack] : shared[pack - K_PACKS];
    v[key * HEADS * PACKS + item] = pack < V_PACKS ? source[head * MADE + K_PACKS + pack] : uint4{0, 0, 0, 0};
  }
}

#endif
