// causal_conv1d, selective_scan and ssd_scan: recurrent layers over a packed batch, each request from its slot.
//
// A piece of work is one request and a few channels (or one head), token after token: the state stays in registers
// or in the nearest cache, and what differs between prompts and single tokens is only the number of turns.
#pragma once

#include "activation.h"
#include "binding.h"
#include "parallel.h"
#include "simd.h"

#include <algorithm>
#include <cmath>

namespace llmfw {

constexpr int64_t kMostTaps = 8;
constexpr int64_t kMostState = 256;

// Where the tokens and the state of a batch's requests are.
struct Requests {
  const int64_t* slots;
  const int32_t* ends;  // [count + 1], cumulative
  int64_t count;
  int64_t slot_stride;  // numbers from slot to slot

  int64_t tokens() const { return ends[count]; }
};

template <class T>
inline Vec load_some(const T* p, int64_t n) {
  return n >= kLanes ? load(p) : load_n(p, n);
}
template <class T>
inline void store_some(T* p, Vec a, int64_t n) {
  n >= kLanes ? store(p, a) : store_n(p, a, n);
}

// log(1 + e^x): max(x, 0) + log1p(e^-|x|), the latter as 2 artanh(e / (2 + e)), whose series ends soon for e <= 1.
inline Vec softplus(Vec x) {
  const Vec zero = set1(0.0f);
  const Vec e = exp(vmin(x, zero - x));
  const Vec s = e / (e + set1(2.0f));
  const Vec square = s * s;
  Vec p = set1(2.0f / 13);
  for (int odd = 11; odd >= 1; odd -= 2) p = fma(p, square, set1(2.0f / odd));
  return fma(p, s, vmax(x, zero));
}

// body(request, block) for all requests and blocks of a layer, shared by the threads.
template <class Body>
inline void parallel_requests(int64_t threads, const Requests& requests, int64_t blocks, int64_t cost, Body&& body) {
  const Unlocked unlocked(requests.tokens() * blocks * cost);
  const int64_t each = std::max<int64_t>(1, cost * requests.tokens() / std::max<int64_t>(1, requests.count));
  const int64_t chunk = std::max<int64_t>(1, 8192 / each);
  parallel_chunks(threads, requests.count * blocks, chunk, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) body(i / blocks, i % blocks);
  });
}

// out = silu(bias + sum of the last `taps` inputs, each times its column of weight [channels, taps]).
template <class T>
void causal_conv1d(const T* x, const T* weight, const T* bias, T* state, T* out, const int64_t* slots,
                   const int32_t* ends, int64_t count, int64_t slot_stride, int64_t channels, int64_t taps,
                   int64_t x_stride, int64_t silu, int64_t threads) {
  const Requests requests{slots, ends, count, slot_stride};
  const int64_t blocks = (channels + kLanes - 1) / kLanes;
  parallel_requests(threads, requests, blocks, kLanes * taps, [&](int64_t request, int64_t block) {
    const int64_t first = block * kLanes, n = std::min(kLanes, channels - first), past = taps - 1;
    T* kept = state + slots[request] * slot_stride + first;
    Vec weights[kMostTaps], window[kMostTaps];
    for (int64_t k = 0; k < taps; k++) {
      float column[kLanes] = {};
      for (int64_t i = 0; i < n; i++) column[i] = to_float(weight[(first + i) * taps + k]);
      weights[k] = load(column);
    }
    for (int64_t k = 0; k < past; k++) window[k] = load_some(kept + k * channels, n);
    const Vec begin = bias ? load_some(bias + first, n) : set1(0.0f);
    for (int64_t t = ends[request]; t < ends[request + 1]; t++) {
      window[past] = load_some(x + t * x_stride + first, n);
      Vec total = begin;
      for (int64_t k = 0; k < taps; k++) total = fma(window[k], weights[k], total);
      store_some(out + t * channels + first, silu ? Silu::of(total) : total, n);
      for (int64_t k = 0; k < past; k++) window[k] = window[k + 1];
    }
    for (int64_t k = 0; k < past; k++) store_some(kept + k * channels, window[k], n);
  });
}

// h = decay * h + value * in, for one row of the state; returns the sum of h * out.
template <class Decay>
inline float advance(float* h, const float* in, const float* out, float value, int64_t width, Decay&& decay) {
  Vec total = set1(0.0f);
  const Vec v = set1(value);
  auto step = [&](int64_t i, int64_t n) {
    const Vec next = fma(decay(i, n), load_some(h + i, n), v * load_some(in + i, n));
    store_some(h + i, next, n);
    total = fma(next, load_some(out + i, n), total);
  };
  each_vec(width, [&](int64_t i) { step(i, kLanes); }, step);
  return sum(total);
}

template <class T>
inline void widen_row(const T* from, float* to, int64_t width) {
  auto step = [&](int64_t i, int64_t n) { store_some(to + i, load_some(from + i, n), n); };
  each_vec(width, [&](int64_t i) { step(i, kLanes); }, step);
}

// h = exp(dt a) h + dt x b; out = (c h + d x) silu(z), with dt = softplus(dt + dt_bias).
template <class T>
void selective_scan(const T* x, const T* dt, const float* a, const T* b, const T* c, const float* d, const T* z,
                    const float* dt_bias, float* state, T* out, const int64_t* slots, const int32_t* ends,
                    int64_t count, int64_t slot_stride, int64_t channels, int64_t width, int64_t x_stride,
                    int64_t dt_stride, int64_t b_stride, int64_t c_stride, int64_t z_stride, int64_t threads) {
  const Requests requests{slots, ends, count, slot_stride};
  const int64_t blocks = (channels + kLanes - 1) / kLanes;
  parallel_requests(threads, requests, blocks, kLanes * width * 4, [&](int64_t request, int64_t block) {
    const int64_t first = block * kLanes, n = std::min(kLanes, channels - first);
    float* hidden = state + slots[request] * slot_stride + first * width;
    float in[kMostState], weights[kMostState], steps[kLanes], values[kLanes], sums[kLanes] = {};
    for (int64_t t = ends[request]; t < ends[request + 1]; t++) {
      const Vec input = load_some(x + t * x_stride + first, n);
      const Vec step = softplus(load_some(dt + t * dt_stride + first, n) + load_some(dt_bias + first, n));
      store(steps, step);
      store(values, step * input);
      widen_row(b + t * b_stride, in, width);
      widen_row(c + t * c_stride, weights, width);
      for (int64_t i = 0; i < n; i++) {
        const float* rates = a + (first + i) * width;
        const Vec size = set1(steps[i]);
        auto decay = [&](int64_t j, int64_t m) { return exp(size * load_some(rates + j, m)); };
        sums[i] = advance(hidden + i * width, in, weights, values[i], width, decay);
      }
      const Vec y = fma(load_some(d + first, n), input, load(sums));
      store_some(out + t * channels + first, y * Silu::of(load_some(z + t * z_stride + first, n)), n);
    }
  });
}

// h = exp(dt a) h + dt x b^T; out = h c + d x, with dt = softplus(dt + dt_bias) within limits; one rate a head.
template <class T>
void ssd_scan(const T* x, const T* dt, const float* a, const T* b, const T* c, const float* d, const float* dt_bias,
              double least, double most, float* state, T* out, const int64_t* slots, const int32_t* ends,
              int64_t count, int64_t slot_stride, int64_t heads, int64_t head_dim, int64_t groups, int64_t width,
              int64_t x_stride, int64_t dt_stride, int64_t b_stride, int64_t c_stride, int64_t threads) {
  const Requests requests{slots, ends, count, slot_stride};
  parallel_requests(threads, requests, heads, head_dim * width, [&](int64_t request, int64_t head) {
    const int64_t group = head / (heads / groups);
    float* hidden = state + slots[request] * slot_stride + head * head_dim * width;
    float in[kMostState], weights[kMostState], size[kLanes];
    for (int64_t t = ends[request]; t < ends[request + 1]; t++) {
      store(size, softplus(set1(to_float(dt[t * dt_stride + head]) + dt_bias[head])));
      const float step = std::min(std::max(size[0], static_cast<float>(least)), static_cast<float>(most));
      const Vec factor = set1(std::exp(step * a[head]));
      widen_row(b + t * b_stride + group * width, in, width);
      widen_row(c + t * c_stride + group * width, weights, width);
      const T* from = x + t * x_stride + head * head_dim;
      T* to = out + (t * heads + head) * head_dim;
      for (int64_t p = 0; p < head_dim; p++) {
        const float input = to_float(from[p]);
        auto decay = [&](int64_t, int64_t) { return factor; };
        const float y = advance(hidden + p * width, in, weights, step * input, width, decay);
        put(to + p, y + d[head] * input);
      }
    }
  });
}

}  // namespace llmfw
