// selective_update, selective_scan: a diagonal state space a channel (reference selective_scan):
// h = exp(dt a) h + dt x b, y = (h c + d x) silu(z), with dt = softplus(dt + dt_bias).
//
// Shapes: x, dt, z [tokens, CHANNELS], b, c [tokens, STATE], each with rows a stride apart, b and c aligned to 4
//   scalars; a float32 [CHANNELS, STATE]; d, dt_bias float32 [CHANNELS]; state float32 [slots, CHANNELS, STATE], slots
//   slot_stride apart, 16-byte aligned; slots int64 [requests]; ends int32 [requests + 1], cumulative; out [tokens,
//   CHANNELS] contiguous.
// Launch: block THREADS, grid (blocks of channels, requests from `first` on); LANES lanes share a channel.
//   selective_update takes one token a request, the first of them at first_token, and has ROWS channels a lane;
//   selective_scan any number, one after another with h in registers, while the next piece of them is read.
#include "common.cuh"

#ifndef CHANNELS
#define CHANNELS 8192
#endif
#ifndef STATE
#define STATE 16
#endif
#ifndef THREADS
#define THREADS 128
#endif
#ifndef MOST_ROWS  // channels of a lane in selective_update, where as many lanes share them
#define MOST_ROWS 2
#endif

constexpr int QUADS = STATE / 4;
constexpr int LANES = lanes_for(QUADS);
constexpr int PER = QUADS / LANES;             // float4s of a channel that a lane holds
constexpr int BLOCK_CHANNELS = THREADS / LANES;
constexpr int ROWS = LANES < MOST_ROWS ? LANES : MOST_ROWS;
constexpr int STEPS = STATE > 256 ? 8 : LANES < 4 ? 8 * LANES : STATE <= 128 ? 32 : 16;  // tokens in shared memory
constexpr int SHARE = (STEPS * BLOCK_CHANNELS + THREADS - 1) / THREADS;  // of their channels that a thread prepares
constexpr int PACKS = (STEPS * QUADS + THREADS - 1) / THREADS;           // of their b and c that a thread copies
constexpr int TOKENS = LANES < 8 ? LANES : 8;  // tokens a round, whose sums are dealt out to the lanes
static_assert(STATE % 4 == 0 && STATE <= 512, "rows of whole float4s");

__device__ __forceinline__ float4 widened(const Pack<4>& x) {
  return {to_float(x.at[0]), to_float(x.at[1]), to_float(x.at[2]), to_float(x.at[3])};
}

__device__ __forceinline__ float4 load4(const scalar* p) { return widened(load<4>(p)); }

// h = exp(step a) h + value b, a in units of log 2; gives this lane's part of h c.
__device__ __forceinline__ float advance(float4& h, const float4& rate, float step, float value, const float4& b,
                                         const float4& c) {
  h.x = exp2_fast(step * rate.x) * h.x + value * b.x;
  h.y = exp2_fast(step * rate.y) * h.y + value * b.y;
  h.z = exp2_fast(step * rate.z) * h.z + value * b.z;
  h.w = exp2_fast(step * rate.w) * h.w + value * b.w;
  return h.x * c.x + h.y * c.y + h.z * c.z + h.w * c.w;
}

__device__ __forceinline__ void read_rates(float4 (&rates)[PER], const float* a) {
#pragma unroll
  for (int j = 0; j < PER; ++j) {
    const float4 rate = reinterpret_cast<const float4*>(a)[j * LANES];
    rates[j] = {rate.x * LOG2E, rate.y * LOG2E, rate.z * LOG2E, rate.w * LOG2E};
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    selective_update(scalar* out, const scalar* x, const scalar* dt, const float* a, const scalar* b, const scalar* c,
                     const float* d, const scalar* z, const float* dt_bias, float* state, const i64* slots,
                     i64 x_stride, i64 dt_stride, i64 b_stride, i64 c_stride, i64 z_stride, i64 slot_stride, int first,
                     int first_token) {
  const int lane = threadIdx.x % LANES, column = lane * 4;
  const auto channel_of = [&](int i) { return (blockIdx.x * ROWS + i) * BLOCK_CHANNELS + threadIdx.x / LANES; };
  const auto has = [&](int i) { return CHANNELS % (BLOCK_CHANNELS * ROWS) == 0 || channel_of(i) < CHANNELS; };
  const auto place = [&](int i) { return i64(has(i) ? channel_of(i) : 0) * STATE + column; };  // none reads channel 0
  follow_older();
  float* slot = state + slots[first + blockIdx.y] * slot_stride;
  const auto row = [&](int i) { return reinterpret_cast<float4*>(slot + place(i)); };
  float4 rates[ROWS][PER], h[ROWS][PER];
#pragma unroll
  for (int i = 0; i < ROWS; ++i) {
#pragma unroll
    for (int j = 0; j < PER; ++j)
      if (place(i) % 32 == 0) fetch_l2(row(i) + j * LANES);
    read_rates(rates[i], a + place(i));
  }
  // Of a token's channels each lane prepares and finishes one, or none.
  const int mine = lane / (LANES / ROWS), own = has(mine) ? channel_of(mine) : 0;
  const float skip = d[own], bias = dt_bias[own];
  follow();
#pragma unroll
  for (int i = 0; i < ROWS; ++i)
#pragma unroll
    for (int j = 0; j < PER; ++j) h[i][j] = row(i)[j * LANES];
  const i64 token = first_token + int(blockIdx.y);
  const float input = to_float(x[token * x_stride + own]);
  const float gate = to_float(z[token * z_stride + own]);
  const float step = softplus(to_float(dt[token * dt_stride + own]) + bias);
  float sums[ROWS] = {};
  float4 ins[PER], weights[PER];
#pragma unroll
  for (int j = 0; j < PER; ++j) {
    ins[j] = load4(b + token * b_stride + column + j * 4 * LANES);
    weights[j] = load4(c + token * c_stride + column + j * 4 * LANES);
  }
#pragma unroll
  for (int i = 0; i < ROWS; ++i) {
    const int from = (threadIdx.x % 32 / LANES) * LANES + i * (LANES / ROWS);
    const float its_step = __shfl_sync(ALL, step, from), its_input = __shfl_sync(ALL, input, from);
#pragma unroll
    for (int j = 0; j < PER; ++j) {
      sums[i] += advance(h[i][j], rates[i][j], its_step, its_step * its_input, ins[j], weights[j]);
      if (has(i)) store_once(row(i) + j * LANES, h[i][j]);
    }
  }
  Summed<ROWS, LANES>(sums).each([&](int i, float sum) {
    if (has(i)) out[token * CHANNELS + own] = from_float((sum + skip * input) * silu(gate));
  });
}

// What a thread prepares of a piece of tokens: numbers on their way from memory.
struct Piece {
  scalar x[SHARE], dt[SHARE], z[SHARE];
  Pack<4> b[PACKS], c[PACKS];
};

extern "C" __global__ void __launch_bounds__(THREADS)
    selective_scan(scalar* out, const scalar* x, const scalar* dt, const float* a, const scalar* b, const scalar* c,
                   const float* d, const scalar* z, const float* dt_bias, float* state, const i64* slots,
                   const int* ends, i64 x_stride, i64 dt_stride, i64 b_stride, i64 c_stride, i64 z_stride,
                   i64 slot_stride, int first) {
  __shared__ float4 ins[STEPS][QUADS], outs[STEPS][QUADS];
  __shared__ float steps[STEPS][BLOCK_CHANNELS], values[STEPS][BLOCK_CHANNELS], sums[STEPS][BLOCK_CHANNELS];
  const int local = threadIdx.x / LANES, lane = threadIdx.x % LANES, first_channel = blockIdx.x * BLOCK_CHANNELS;
  const bool mine = first_channel + local < CHANNELS;
  const i64 place = i64(mine ? first_channel + local : 0) * STATE + lane * 4;
  float4 rates[PER], h[PER];
  read_rates(rates, a + place);
  // A thread prepares one channel's share of tokens, and finishes them.
  const int own = threadIdx.x % BLOCK_CHANNELS, own_token = threadIdx.x / BLOCK_CHANNELS;
  const int channel = min(first_channel + own, CHANNELS - 1);
  const float bias = dt_bias[channel], skip = d[channel];
  follow();
  const int request = first + blockIdx.y, begin = ends[request], end = ends[request + 1];
  if (begin >= end) return;
  float4* row = reinterpret_cast<float4*>(state + slots[request] * slot_stride + place);
#pragma unroll
  for (int j = 0; j < PER; ++j) h[j] = row[j * LANES];

  Piece next;
  const auto read = [&](int from) {  // tokens behind the last are read as the last
#pragma unroll
    for (int i = 0; i < SHARE; ++i) {
      const i64 t = min(from + own_token + i * LANES, end - 1);
      next.x[i] = x[t * x_stride + channel];
      next.dt[i] = dt[t * dt_stride + channel];
      next.z[i] = z[t * z_stride + channel];
    }
#pragma unroll
    for (int i = 0; i < PACKS; ++i) {
      const int at = threadIdx.x + i * THREADS;
      const i64 t = min(from + at / QUADS, end - 1);
      next.b[i] = load<4>(b + t * b_stride + at % QUADS * 4);
      next.c[i] = load<4>(c + t * c_stride + at % QUADS * 4);
    }
  };
  read(begin);
  for (int from = begin; from < end; from += STEPS) {
    const int count = min(STEPS, end - from);
    scalar inputs[SHARE], gates[SHARE];
#pragma unroll
    for (int i = 0; i < SHARE; ++i) {
      const int t = own_token + i * LANES;
      inputs[i] = next.x[i];
      gates[i] = next.z[i];
      if (t >= STEPS) continue;
      const float step = t < count ? softplus(to_float(next.dt[i]) + bias) : 0.0f;  // 0 leaves h as it is
      steps[t][own] = step;
      values[t][own] = step * to_float(inputs[i]);
    }
#pragma unroll
    for (int i = 0; i < PACKS; ++i) {
      const int at = threadIdx.x + i * THREADS;
      if (at >= STEPS * QUADS) continue;
      ins[at / QUADS][at % QUADS] = widened(next.b[i]);
      outs[at / QUADS][at % QUADS] = widened(next.c[i]);
    }
    __syncthreads();
    if (from + STEPS < end) read(from + STEPS);
    for (int t = 0; t < count; t += TOKENS) {
      float parts[TOKENS] = {};
#pragma unroll
      for (int i = 0; i < TOKENS; ++i)
#pragma unroll
        for (int j = 0; j < PER; ++j)
          parts[i] += advance(h[j], rates[j], steps[t + i][local], values[t + i][local], ins[t + i][lane + j * LANES],
                              outs[t + i][lane + j * LANES]);
      Summed<TOKENS, LANES>(parts).each([&](int i, float sum) { sums[t + i][local] = sum; });
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < SHARE; ++i) {
      const int t = own_token + i * LANES;
      if (t < count && first_channel + own < CHANNELS)
        out[i64(from + t) * CHANNELS + channel] =
            from_float((sums[t][own] + skip * to_float(inputs[i])) * silu(to_float(gates[i])));
    }
  }
#pragma unroll
  for (int j = 0; j < PER; ++j)
    if (mine) row[j * LANES] = h[j];
}
