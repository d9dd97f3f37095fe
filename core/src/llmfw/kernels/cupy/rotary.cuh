// A head of q, k or v between the packed qkv and where it is kept: norm and rotation, by LANES neighbouring lanes, each
// with two packs of WIDTH scalars that rotate together. For sources that define HEAD_DIM.
// Numbers: norm and rotation in float32, with the references' rounding between them.
#pragma once
#include "common.cuh"

#ifndef ROTARY_DIM
#define ROTARY_DIM HEAD_DIM
#endif
#ifndef INTERLEAVED
#define INTERLEAVED 0
#endif
#ifndef WIDTH
#define WIDTH 8
#endif
#ifndef LANES
#define LANES 8
#endif

constexpr int UNITS = HEAD_DIM / (2 * WIDTH);      // pairs of packs in a head
constexpr int TURNING = ROTARY_DIM / (2 * WIDTH);  // of these, the ones that rotate
static_assert(HEAD_DIM % (2 * WIDTH) == 0 && ROTARY_DIM % (2 * WIDTH) == 0, "whole pairs of packs");
static_assert(UNITS <= LANES && LANES <= 32, "a head fits its lanes");
static_assert(!INTERLEAVED || WIDTH % 2 == 0, "an interleaved pair stays in one pack");

// Where a lane's two packs lie in a head.
struct Unit {
  int number, first, second;
  __device__ __forceinline__ bool active() const { return number < UNITS; }
  __device__ __forceinline__ bool turns() const { return number < TURNING; }
};

__device__ __forceinline__ Unit this_unit() {
  const int number = threadIdx.x % LANES;
  if (number >= TURNING) {
    const int first = ROTARY_DIM + (number - TURNING) * 2 * WIDTH;
    return {number, first, first + WIDTH};
  }
  if (INTERLEAVED) return {number, number * 2 * WIDTH, number * 2 * WIDTH + WIDTH};
  return {number, number * WIDTH, ROTARY_DIM / 2 + number * WIDTH};
}

struct Packs {
  Pack<WIDTH> a, b;
};

__device__ __forceinline__ Packs load_packs(const scalar* head, const Unit& unit) {
  return {load<WIDTH>(head + unit.first), load<WIDTH>(head + unit.second)};
}

// N floats that nobody writes, 4 in one access.
template <int N>
__device__ __forceinline__ void load_floats(float* to, const float* from) {
  if constexpr (N == 4) {
    const float4 x = __ldg(reinterpret_cast<const float4*>(from));
    to[0] = x.x;
    to[1] = x.y;
    to[2] = x.z;
    to[3] = x.w;
  } else {
    to[0] = __ldg(from);
  }
}

// A lane's cosines and sines of a position.
struct Angles {
  float cosine[WIDTH], sine[WIDTH];
};

__device__ __forceinline__ Angles load_angles(const float* cos_sin, i64 position, const Unit& unit) {
  const float* row = cos_sin + position * ROTARY_DIM + unit.number * WIDTH;
  Angles angles;
  constexpr int TOGETHER = WIDTH % 4 == 0 ? 4 : 1;
#pragma unroll
  for (int i = 0; i < WIDTH; i += TOGETHER) {
    load_floats<TOGETHER>(angles.cosine + i, row + i);
    load_floats<TOGETHER>(angles.sine + i, row + ROTARY_DIM / 2 + i);
  }
  return angles;
}

// A lane's part of a head; zeros where the lane has none.
struct Part {
  float a[WIDTH] = {}, b[WIDTH] = {};

  __device__ __forceinline__ void set(const Packs& x) {
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      a[i] = to_float(x.a.at[i]);
      b[i] = to_float(x.b.at[i]);
    }
  }

  // 1 / rms of the whole head; all lanes of the warp take part.
  __device__ __forceinline__ float inverse_rms(float eps) const {
    float squares = 0;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) squares += a[i] * a[i] + b[i] * b[i];
    return rsqrtf(group_sum<LANES>(squares) * (1.0f / HEAD_DIM) + eps);
  }

  __device__ __forceinline__ void normalise(float scale, const Packs& weight, float offset) {
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      const float x = a[i] * scale, y = b[i] * scale;
      const float wx = to_float(weight.a.at[i]), wy = to_float(weight.b.at[i]);
      a[i] = rounded(offset != 0 ? x * (offset + wx) : rounded(x) * wx);
      b[i] = rounded(offset != 0 ? y * (offset + wy) : rounded(y) * wy);
    }
  }

  __device__ __forceinline__ void turn(const Angles& by) {
#if INTERLEAVED
    // Pairs are neighbours: the first pack holds the angles 0 .. WIDTH/2 - 1 of this lane, the second the rest.
#pragma unroll
    for (int i = 0; i < WIDTH; i += 2) {
      const float a0 = a[i], a1 = a[i + 1], b0 = b[i], b1 = b[i + 1];
      const int j = i / 2, k = WIDTH / 2 + i / 2;
      a[i] = a0 * by.cosine[j] - a1 * by.sine[j];
      a[i + 1] = a1 * by.cosine[j] + a0 * by.sine[j];
      b[i] = b0 * by.cosine[k] - b1 * by.sine[k];
      b[i + 1] = b1 * by.cosine[k] + b0 * by.sine[k];
    }
#else
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      const float x = a[i], y = b[i];
      a[i] = x * by.cosine[i] - y * by.sine[i];
      b[i] = y * by.cosine[i] + x * by.sine[i];
    }
#endif
  }

  __device__ __forceinline__ Packs rounded_packs() const {
    Packs x;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      x.a.at[i] = from_float(a[i]);
      x.b.at[i] = from_float(b[i]);
    }
    return x;
  }
};

__device__ __forceinline__ void store_packs(scalar* head, const Packs& x, const Unit& unit) {
  store<WIDTH>(head + unit.first, x.a);
  store<WIDTH>(head + unit.second, x.b);
}
