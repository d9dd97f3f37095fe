// causal_conv1d: each channel's weighted sum of a token and the TAPS - 1 before it, with silu (reference of that name).
//
// Shapes: x [tokens, CHANNELS], rows x_stride apart; weight [CHANNELS, TAPS]; bias [CHANNELS] or null; state
//   [slots, TAPS - 1, CHANNELS], slots slot_stride apart; slots int64 [requests]; ends int32 [requests + 1],
//   cumulative; out [tokens, CHANNELS] contiguous. x, state and out are aligned to WIDTH scalars.
// Launch: block THREADS, grid (blocks of THREADS * WIDTH channels, tiles of TILE tokens of the longest request,
//   requests from `first` on). TILE 1: every request has one token.
// Numbers: float32, with silu to within 2 of its last places; the thread of a request's first tile reads the old state and writes the new one.
#include "common.cuh"

#ifndef CHANNELS
#define CHANNELS 5376
#endif
#ifndef TAPS
#define TAPS 4
#endif
#ifndef WIDTH
#define WIDTH 4
#endif
#ifndef TILE
#define TILE 8
#endif
#ifndef THREADS
#define THREADS 128
#endif

constexpr int PAST = TAPS - 1;
static_assert(CHANNELS % WIDTH == 0, "a thread has whole packs");
static_assert(TILE == 1 || TILE >= PAST, "only a request's first tile reads its state");

// As silu: with its exact division and exponential the sums would wait for instructions, not for memory.

// The state after the request: its last tokens, and before them, where it has fewer than PAST, what was kept.
__device__ __forceinline__ void keep_last(scalar* kept, const Pack<WIDTH> (&inputs)[PAST + TILE], const scalar* source,
                                          int tokens, int end, i64 x_stride) {
#pragma unroll
  for (int count = 1; count <= PAST && count <= TILE; ++count) {
    if (TILE > 1 && tokens != count) continue;
#pragma unroll
    for (int i = 0; i < PAST; ++i) store<WIDTH>(kept + i * CHANNELS, inputs[count + i]);
  }
#pragma unroll
  for (int i = 0; i < PAST; ++i)
    if (TILE > 1 && tokens > PAST)
      store<WIDTH>(kept + i * CHANNELS, load<WIDTH>(source + (end - PAST + i) * x_stride));
}

extern "C" __global__ void __launch_bounds__(THREADS)
    causal_conv1d(scalar* out, const scalar* x, const scalar* weight, const scalar* bias, scalar* state,
                  const i64* slots, const int* ends, i64 x_stride, i64 slot_stride, int first, int with_silu) {
  const int channel = (blockIdx.x * THREADS + threadIdx.x) * WIDTH;
  const bool mine = channel < CHANNELS;
  Pack<WIDTH> weights[TAPS], offsets;  // weights[i].at[j]: of the pack's values in their order, not yet by tap
#pragma unroll
  for (int i = 0; i < TAPS; ++i)
    if (mine) weights[i] = load<WIDTH>(weight + i64(channel) * TAPS + i * WIDTH);
  if (mine && bias) offsets = load<WIDTH>(bias + channel);
  follow();
  const int request = first + blockIdx.z;
  const int begin = ends[request], end = ends[request + 1], from = begin + int(blockIdx.y) * TILE;
  if (!mine || from >= end) return;

  scalar* kept = state + slots[request] * slot_stride + channel;
  const scalar* source = x + channel;
  Pack<WIDTH> inputs[PAST + TILE];  // the tokens before the tile, then its own; without branches: loads go together
#pragma unroll
  for (int i = 0; i < PAST + TILE; ++i)
    inputs[i] = load<WIDTH>(source + min(max(from - PAST + i, begin), end - 1) * x_stride);
  if (TILE == 1 || blockIdx.y == 0) {
#pragma unroll
    for (int i = 0; i < PAST; ++i) inputs[i] = load<WIDTH>(kept + i * CHANNELS);
    keep_last(kept, inputs, source, end - begin, end, x_stride);
  }
#pragma unroll
  for (int i = 0; i < TILE; ++i) {
    if (from + i >= end) break;
    Pack<WIDTH> y;
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) {
      float sum = 0;
#pragma unroll
      for (int k = 0; k < TAPS; ++k) {
        const int at = j * TAPS + k;
        sum += to_float(inputs[i + k].at[j]) * to_float(weights[at / WIDTH].at[at % WIDTH]);
      }
      if (bias) sum += to_float(offsets.at[j]);
      y.at[j] = from_float(with_silu ? silu(sum) : sum);
    }
    store<WIDTH>(out + i64(from + i) * CHANNELS + channel, y);
  }
}
