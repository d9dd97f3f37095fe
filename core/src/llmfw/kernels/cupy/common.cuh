// Shared by all kernels: scalar types, 16-byte packs, warp sums. Needs no header of the toolkit, so that NVRTC
// compiles it anywhere and fast.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define BF16 0
#define F16 1
#define F32 2
#ifndef DTYPE
#define DTYPE BF16
#endif

#if DTYPE == F32
typedef float scalar;
#else
typedef u16 scalar;
#endif

constexpr int VEC = 16 / sizeof(scalar);  // scalars in one 16-byte access
constexpr u32 ALL = 0xffffffffu;
constexpr float LOG2E = 1.4426950408889634f;
#define NEG_INF __int_as_float(0xff800000)

#include "ptx.cuh"

#ifndef PDL
#define PDL 0
#endif

// With PDL a kernel starts while the one before it still runs; every kernel calls follow() before it reads or writes
// what the one before writes or reads. Earlier it may read weights, and after follow_older() what was written two
// kernels ago or earlier, one more for each of those right before that follow briefly (embedding and norm do in a row).
// PDL 1 lets the next kernel start when the one before is done, 2 at once; 0 does nothing.
// What `read` reads is asked for at once, however late it is used: the assembler moves no load past a step of this.
template <class Read>
__device__ __forceinline__ void follow(Read&& read) {
  if (PDL == 2) let_next_start();
  if (PDL > 0) wait_for_previous();
  read();
  if (PDL == 1) let_next_start();
}

__device__ __forceinline__ void follow() {
  follow([] {});
}

// For short kernels: the one after has much to fetch, and may do so while the one before still runs.
__device__ __forceinline__ void follow_briefly() {
  if (PDL > 0) let_next_start();
  if (PDL > 0) wait_for_previous();
}

__device__ __forceinline__ void follow_older() {
  if (PDL == 2) follow();
}

// N scalars that move in one access.
template <int N>
struct alignas(N * sizeof(scalar)) Pack {
  scalar at[N];
};

// The value that survives a store and a load: references round here, so kernels do too.
__device__ __forceinline__ float rounded(float x) { return to_float(from_float(x)); }

template <int N>
__device__ __forceinline__ Pack<N> load(const scalar* p) {
  return *reinterpret_cast<const Pack<N>*>(p);
}

template <int N>
__device__ __forceinline__ void store(scalar* p, const Pack<N>& x) {
  *reinterpret_cast<Pack<N>*>(p) = x;
}

// Sum over aligned groups of N lanes; every lane gets it.
template <int N>
__device__ __forceinline__ float group_sum(float x) {
#pragma unroll
  for (int step = N / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL, x, step);
  return x;
}

__device__ __forceinline__ float warp_sum(float x) { return group_sum<32>(x); }

// Activations; code of a `GatedActivation` may use them.
__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
// Results of 16 bits are rounded far more coarsely than the quick instructions err; 1 / infinity is 0 here too.
__device__ __forceinline__ float silu(float x) {
  return DTYPE == F32 ? x / (1.0f + expf(-x)) : x * reciprocal_fast(1.0f + exp2_fast(-LOG2E * x));
}
__device__ __forceinline__ float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f)); }
__device__ __forceinline__ float gelu_tanh(float x) {
  return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
}

__device__ __forceinline__ float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

// How many lanes of a warp share `count` things evenly: the greatest power of two that divides it, at most 32.
constexpr int lanes_for(int count) { return count % 32 == 0 ? 32 : count & -count; }

// Sums of R values over aligned groups of N lanes. Where R <= N the values are dealt out while they are summed, so each
// lane ends with one of them and few shuffles are needed; else every lane gets all.
template <int R, int N>
struct Summed {
  static constexpr bool DEALT = R <= N;
  float sums[R];

  __device__ __forceinline__ explicit Summed(const float (&parts)[R]) {
#pragma unroll
    for (int i = 0; i < R; ++i) sums[i] = DEALT ? parts[i] : group_sum<N>(parts[i]);
    if (!DEALT) return;
    int mask = N / 2;
#pragma unroll
    for (int half = R / 2; half > 0; half /= 2) {
      const bool upper = threadIdx.x & mask;
#pragma unroll
      for (int i = 0; i < half; ++i) {
        const float given = upper ? sums[i] : sums[i + half];
        sums[i] = (upper ? sums[i + half] : sums[i]) + __shfl_xor_sync(ALL, given, mask);
      }
      mask /= 2;
    }
#pragma unroll
    for (; mask > 0; mask /= 2) sums[0] += __shfl_xor_sync(ALL, sums[0], mask);
  }

  // take(i, sum i), once for each i among the lanes of a group.
  template <class Take>
  __device__ __forceinline__ void each(Take&& take) const {
    const int lane = threadIdx.x % N;
    if (DEALT) {
      if (lane % (N / (DEALT ? R : N)) == 0) take(lane / (N / (DEALT ? R : N)), sums[0]);
    } else if (lane == 0) {
#pragma unroll
      for (int i = 0; i < R; ++i) take(i, sums[i]);
    }
  }
};
