// selective_update, selective_scan: a diagonal state space a channel (reference selective_scan):
// h = exp(dt a) h + dt x b, y = (h c + d x) silu(z), with dt = softplus(dt + dt_bias).
//
// Shapes: x, dt, z [tokens, CHANNELS], b, c [tokens, STATE], each with rows a stride apart, b and c aligned to 4
//   scalars; a float32 [CHANNELS, STATE]; d, dt_bias float32 [CHANNELS]; state float32 [slots, CHANNELS, STATE], slots
//   slot_stride apart, 16-byte aligned; slots int64 [requests]; ends int32 [requests + 1], cumulative; out [tokens,
//   CHANNELS] contiguous.
// Launch: block THREADS, LANES lanes a channel. selective_update: grid (blocks of channels, requests / BATCH), one
//   token a request, the first of them at first_token. selective_scan: grid (blocks of channels, requests), any number
//   of tokens, one after another with h in registers.
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
#ifndef BATCH
#define BATCH 1
#endif

constexpr int QUADS = STATE / 4;
constexpr int LANES = lanes_for(QUADS);
constexpr int PER = QUADS / LANES;             // float4s of a channel that a lane holds
constexpr int BLOCK_CHANNELS = THREADS / LANES;
constexpr int STEPS = STATE <= 128 ? 32 : STATE <= 256 ? 16 : 8;  // tokens that shared memory holds
constexpr int TOKENS = LANES < 8 ? LANES : 8;  // tokens a round, whose sums are dealt out to the lanes
static_assert(STATE % 4 == 0 && STATE <= 512, "rows of whole float4s");

__device__ __forceinline__ float4 load4(const scalar* p) {
  const Pack<4> x = load<4>(p);
  return {to_float(x.at[0]), to_float(x.at[1]), to_float(x.at[2]), to_float(x.at[3])};
}

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
    selective_update(scalar* __restrict__ out, const scalar* __restrict__ x, const scalar* __restrict__ dt,
                     const float* __restrict__ a, const scalar* __restrict__ b, const scalar* __restrict__ c,
                     const float* __restrict__ d, const scalar* __restrict__ z, const float* __restrict__ dt_bias,
                     float* __restrict__ state, const i64* __restrict__ slots, i64 x_stride, i64 dt_stride,
                     i64 b_stride, i64 c_stride, i64 z_stride, i64 slot_stride, int first, int first_token,
                     int requests) {
  const int channel = blockIdx.x * BLOCK_CHANNELS + threadIdx.x / LANES, column = threadIdx.x % LANES * 4;
  const bool mine = channel < CHANNELS;
  const i64 place = i64(mine ? channel : 0) * STATE + column;  // lanes without a channel read channel 0, write nothing
  const int own = mine ? channel : 0;
  float4 rates[PER];
  read_rates(rates, a + place);
  const float skip = d[own], bias = dt_bias[own];
  follow();
  float4* rows[BATCH];
  float4 h[BATCH][PER];
#pragma unroll
  for (int i = 0; i < BATCH; ++i) {
    const int request = min(int(blockIdx.y) * BATCH + i, requests - 1);
    rows[i] = reinterpret_cast<float4*>(state + slots[first + request] * slot_stride + place);
#pragma unroll
    for (int j = 0; j < PER; ++j) h[i][j] = rows[i][j * LANES];
  }
#pragma unroll
  for (int i = 0; i < BATCH; ++i) {
    const int request = int(blockIdx.y) * BATCH + i;
    const i64 token = first_token + min(request, requests - 1);
    const float input = to_float(x[token * x_stride + own]);
    const float gate = to_float(z[token * z_stride + own]);
    const float step = softplus(to_float(dt[token * dt_stride + own]) + bias);
    const bool writes = mine && request < requests;
    float sum = 0;
#pragma unroll
    for (int j = 0; j < PER; ++j) {
      const float4 in = load4(b + token * b_stride + column + j * 4 * LANES);
      const float4 weight = load4(c + token * c_stride + column + j * 4 * LANES);
      sum += advance(h[i][j], rates[j], step, step * input, in, weight);
      if (writes) rows[i][j * LANES] = h[i][j];
    }
    sum = group_sum<LANES>(sum);
    if (writes && column == 0) out[token * CHANNELS + channel] = from_float((sum + skip * input) * silu(gate));
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    selective_scan(scalar* __restrict__ out, const scalar* __restrict__ x, const scalar* __restrict__ dt,
                   const float* __restrict__ a, const scalar* __restrict__ b, const scalar* __restrict__ c,
                   const float* __restrict__ d, const scalar* __restrict__ z, const float* __restrict__ dt_bias,
                   float* __restrict__ state, const i64* __restrict__ slots, const int* __restrict__ ends,
                   i64 x_stride, i64 dt_stride, i64 b_stride, i64 c_stride, i64 z_stride, i64 slot_stride, int first) {
  __shared__ float4 ins[STEPS][QUADS], outs[STEPS][QUADS];
  __shared__ float steps[STEPS][BLOCK_CHANNELS], values[STEPS][BLOCK_CHANNELS], sums[STEPS][BLOCK_CHANNELS];
  const int local = threadIdx.x / LANES, lane = threadIdx.x % LANES, first_channel = blockIdx.x * BLOCK_CHANNELS;
  const bool mine = first_channel + local < CHANNELS;
  const i64 place = i64(mine ? first_channel + local : 0) * STATE + lane * 4;
  float4 rates[PER], h[PER];
  read_rates(rates, a + place);
  follow();
  const int request = first + blockIdx.y, begin = ends[request], end = ends[request + 1];
  float4* row = reinterpret_cast<float4*>(state + slots[request] * slot_stride + place);
#pragma unroll
  for (int j = 0; j < PER; ++j) h[j] = row[j * LANES];

  for (int from = begin; from < end; from += STEPS) {
    const int count = min(STEPS, end - from);
    for (int i = threadIdx.x; i < STEPS * BLOCK_CHANNELS; i += THREADS) {
      const int t = i / BLOCK_CHANNELS, channel = first_channel + i % BLOCK_CHANNELS;
      float step = 0, value = 0;  // what leaves h as it is
      if (t < count && channel < CHANNELS) {
        step = softplus(to_float(dt[(from + t) * dt_stride + channel]) + dt_bias[channel]);
        value = step * to_float(x[(from + t) * x_stride + channel]);
      }
      steps[t][i % BLOCK_CHANNELS] = step;
      values[t][i % BLOCK_CHANNELS] = value;
    }
    for (int i = threadIdx.x; i < STEPS * QUADS; i += THREADS) {
      const int t = i / QUADS, quad = i % QUADS;
      ins[t][quad] = t < count ? load4(b + (from + t) * b_stride + quad * 4) : float4{0, 0, 0, 0};
      outs[t][quad] = t < count ? load4(c + (from + t) * c_stride + quad * 4) : float4{0, 0, 0, 0};
    }
    __syncthreads();
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
    for (int i = threadIdx.x; i < count * BLOCK_CHANNELS; i += THREADS) {
      const int t = i / BLOCK_CHANNELS, channel = first_channel + i % BLOCK_CHANNELS;
      if (channel >= CHANNELS) continue;
      const float input = to_float(x[(from + t) * x_stride + channel]);
      const float gate = to_float(z[(from + t) * z_stride + channel]);
      out[i64(from + t) * CHANNELS + channel] =
          from_float((sums[t][i % BLOCK_CHANNELS] + d[channel] * input) * silu(gate));
    }
  }
#pragma unroll
  for (int j = 0; j < PER; ++j)
    if (mine) row[j * LANES] = h[j];
}
