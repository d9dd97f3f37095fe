// rope_and_cache: q/k norm, rotary embedding and paged K/V write in one pass over the packed qkv.
//
// Shapes: qkv [tokens, (Q_HEADS + 2 KV_HEADS) * HEAD_DIM], rows qkv_stride apart; q [tokens, Q_HEADS, HEAD_DIM];
//   caches [slots, KV_HEADS, HEAD_DIM], slots k_stride and v_stride apart; cos_sin float32 [positions, ROTARY_DIM],
//   cosines then sines, or null; q_norm, k_norm [HEAD_DIM] or null. A negative slot writes nothing.
// Launch: block THREADS, grid ceil(tokens * heads / (THREADS / LANES)); LANES lanes serve one head of one token,
//   each with two packs of WIDTH scalars that rotate together.
// Numbers: norm and rotation in float32, with the reference's rounding between them.
#include "common.cuh"

#ifndef Q_HEADS
#define Q_HEADS 32
#endif
#ifndef KV_HEADS
#define KV_HEADS 8
#endif
#ifndef HEAD_DIM
#define HEAD_DIM 128
#endif
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
#ifndef THREADS
#define THREADS 128
#endif

constexpr int UNITS = HEAD_DIM / (2 * WIDTH);        // pairs of packs in a head
constexpr int TURNING = ROTARY_DIM / (2 * WIDTH);    // of these, the ones that rotate
constexpr int HEADS = Q_HEADS + 2 * KV_HEADS;
static_assert(HEAD_DIM % (2 * WIDTH) == 0 && ROTARY_DIM % (2 * WIDTH) == 0, "whole pairs of packs");
static_assert(UNITS <= LANES && LANES <= 32 && THREADS % 32 == 0, "a head fits its lanes");
static_assert(!INTERLEAVED || WIDTH % 2 == 0, "an interleaved pair stays in one pack");

extern "C" __global__ void __launch_bounds__(THREADS)
    rope_and_cache(scalar* q_out, const scalar* qkv, const i64* positions, const float* cos_sin, scalar* k_cache,
                   scalar* v_cache, const i64* slots, const scalar* q_norm, const scalar* k_norm, i64 qkv_stride,
                   i64 k_stride, i64 v_stride, int tokens, float eps, float offset) {
  follow_briefly();
  const i64 item = i64(blockIdx.x) * (THREADS / LANES) + threadIdx.x / LANES;
  const int unit = threadIdx.x % LANES;
  const bool inside = item < i64(tokens) * HEADS;  // the others stay for the shuffles
  const int token = inside ? int(item / HEADS) : 0;
  const int head = inside ? int(item - i64(token) * HEADS) : 0;
  const bool active = inside && unit < UNITS;
  const bool turns = unit < TURNING;

  // Offsets of this lane's two packs in the head.
  int first, second;
  if (!turns) {
    first = ROTARY_DIM + (unit - TURNING) * 2 * WIDTH;
    second = first + WIDTH;
  } else if (INTERLEAVED) {
    first = unit * 2 * WIDTH;
    second = first + WIDTH;
  } else {
    first = unit * WIDTH;
    second = ROTARY_DIM / 2 + first;
  }

  float a[WIDTH] = {}, b[WIDTH] = {};
  if (active) {
    const scalar* source = qkv + token * qkv_stride + head * HEAD_DIM;
    const Pack<WIDTH> x = load<WIDTH>(source + first), y = load<WIDTH>(source + second);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      a[i] = to_float(x.at[i]);
      b[i] = to_float(y.at[i]);
    }
  }

  const bool is_value = head >= Q_HEADS + KV_HEADS;
  const scalar* norm = head < Q_HEADS ? q_norm : k_norm;
  if (q_norm || k_norm) {  // uniform, so that all lanes meet in the shuffles
    float squares = 0;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) squares += a[i] * a[i] + b[i] * b[i];
    const float scale = rsqrtf(group_sum<LANES>(squares) * (1.0f / HEAD_DIM) + eps);
    if (active && norm && !is_value) {
      const Pack<WIDTH> v = load<WIDTH>(norm + first), w = load<WIDTH>(norm + second);
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) {
        const float x = a[i] * scale, y = b[i] * scale, wx = to_float(v.at[i]), wy = to_float(w.at[i]);
        a[i] = rounded(offset != 0 ? x * (offset + wx) : rounded(x) * wx);
        b[i] = rounded(offset != 0 ? y * (offset + wy) : rounded(y) * wy);
      }
    }
  }

  if (!active) return;
  if (cos_sin && turns && !is_value) {
    const float* row = cos_sin + positions[token] * ROTARY_DIM + unit * WIDTH;
    float cosine[WIDTH], sine[WIDTH];
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      cosine[i] = __ldg(row + i);
      sine[i] = __ldg(row + ROTARY_DIM / 2 + i);
    }
#if INTERLEAVED
    // Pairs are neighbours: the first pack holds the angles 0 .. WIDTH/2 - 1 of this lane, the second the rest.
#pragma unroll
    for (int i = 0; i < WIDTH; i += 2) {
      const float a0 = a[i], a1 = a[i + 1], b0 = b[i], b1 = b[i + 1];
      const int j = i / 2, k = WIDTH / 2 + i / 2;
      a[i] = a0 * cosine[j] - a1 * sine[j];
      a[i + 1] = a1 * cosine[j] + a0 * sine[j];
      b[i] = b0 * cosine[k] - b1 * sine[k];
      b[i + 1] = b1 * cosine[k] + b0 * sine[k];
    }
#else
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      const float x = a[i], y = b[i];
      a[i] = x * cosine[i] - y * sine[i];
      b[i] = y * cosine[i] + x * sine[i];
    }
#endif
  }

  scalar* target;
  if (head < Q_HEADS) {
    target = q_out + (i64(token) * Q_HEADS + head) * HEAD_DIM;
  } else {
    const i64 slot = slots[token];
    if (slot < 0) return;
    target = is_value ? v_cache + slot * v_stride + (head - Q_HEADS - KV_HEADS) * HEAD_DIM
                      : k_cache + slot * k_stride + (head - Q_HEADS) * HEAD_DIM;
  }
  Pack<WIDTH> x, y;
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) {
    x.at[i] = from_float(a[i]);
    y.at[i] = from_float(b[i]);
  }
  store<WIDTH>(target + first, x);
  store<WIDTH>(target + second, y);
}
