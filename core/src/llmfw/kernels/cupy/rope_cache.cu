// rope_and_cache: q/k norm, rotary embedding and paged K/V write in one pass over the packed qkv.
//
// Shapes: qkv [tokens, (Q_HEADS + 2 KV_HEADS) * HEAD_DIM], rows qkv_stride apart; q [tokens, Q_HEADS, HEAD_DIM];
//   caches [slots, KV_HEADS, HEAD_DIM], slots k_stride and v_stride apart; cos_sin float32 [positions, ROTARY_DIM],
//   cosines then sines, or null; q_norm, k_norm [HEAD_DIM] or null. A negative slot writes nothing.
// Launch: block THREADS, grid ceil(tokens * heads / (THREADS / LANES)); LANES lanes serve one head of one token,
//   as rotary.cuh tells.
// Numbers: rotary.cuh.
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
#ifndef THREADS
#define THREADS 128
#endif

#include "rotary.cuh"

constexpr int HEADS = Q_HEADS + 2 * KV_HEADS;
static_assert(THREADS % 32 == 0, "whole warps");

extern "C" __global__ void __launch_bounds__(THREADS)
    rope_and_cache(scalar* q_out, const scalar* qkv, const i64* positions, const float* cos_sin, scalar* k_cache,
                   scalar* v_cache, const i64* slots, const scalar* q_norm, const scalar* k_norm, i64 qkv_stride,
                   i64 k_stride, i64 v_stride, int tokens, float eps, float offset) {
  follow_briefly();
  const i64 item = i64(blockIdx.x) * (THREADS / LANES) + threadIdx.x / LANES;
  const Unit unit = this_unit();
  const bool inside = item < i64(tokens) * HEADS;  // the others stay for the shuffles
  const int token = inside ? int(item / HEADS) : 0;
  const int head = inside ? int(item - i64(token) * HEADS) : 0;
  const bool active = inside && unit.active();

  Part part;
  if (active) part.set(load_packs(qkv + token * qkv_stride + head * HEAD_DIM, unit));

  const bool is_value = head >= Q_HEADS + KV_HEADS;
  const scalar* norm = head < Q_HEADS ? q_norm : k_norm;
  if (q_norm || k_norm) {  // uniform, so that all lanes meet in the shuffles
    const float scale = part.inverse_rms(eps);
    if (active && norm && !is_value) part.normalise(scale, load_packs(norm, unit), offset);
  }

  if (!active) return;
  if (cos_sin && unit.turns() && !is_value) part.turn(load_angles(cos_sin, positions[token], unit));

  scalar* target;
  if (head < Q_HEADS) {
    target = q_out + (i64(token) * Q_HEADS + head) * HEAD_DIM;
  } else {
    const i64 slot = slots[token];
    if (slot < 0) return;
    target = is_value ? v_cache + slot * v_stride + (head - Q_HEADS - KV_HEADS) * HEAD_DIM
                      : k_cache + slot * k_stride + (head - Q_HEADS) * HEAD_DIM;
  }
  store_packs(target, part.rounded_packs(), unit);
}
