// silu_and_mul, gelu_and_mul, gelu_tanh_and_mul: x [rows, 2 * width] = gate | up -> act(gate) * up [rows, width].
#pragma once

#include "parallel.h"
#include "simd.h"

namespace llmfw {

struct Silu {
  static Vec of(Vec x) { return x / (set1(1.0f) + exp(set1(0.0f) - x)); }
};

struct GeluTanh {
  static Vec of(Vec x) {
    const Vec inner = set1(0.7978845608f) * fma(set1(0.044715f) * x * x, x, x);
    return set1(0.5f) * x * (set1(1.0f) + tanh(inner));
  }
};

// erf by Abramowitz and Stegun 7.1.26, absolute error 1.5e-7.
struct Gelu {
  static Vec of(Vec x) {
    const Vec z = x * set1(0.7071067812f);
    const Vec size = vmax(z, set1(0.0f) - z);
    const Vec t = set1(1.0f) / fma(set1(0.3275911f), size, set1(1.0f));
    Vec p = set1(1.061405429f);
    p = fma(p, t, set1(-1.453152027f));
    p = fma(p, t, set1(1.421413741f));
    p = fma(p, t, set1(-0.284496736f));
    p = fma(p, t, set1(0.254829592f));
    const Vec tail = p * t * exp(set1(0.0f) - size * size);  // 1 - erf(|z|)
    // x * (1 + erf(z)) / 2, without cancellation on the negative side
    const Vec half = set1(0.5f) * tail;
    return vmax(x, set1(0.0f)) - size * set1(1.4142135624f) * half;
  }
};

template <class T, class Act>
void act_and_mul(const T* x, T* out, int64_t rows, int64_t width, int64_t threads) {
  parallel_rows(threads, rows, width, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      const T* gate = x + row * 2 * width;
      const T* up = gate + width;
      T* to = out + row * width;
      each_vec(
          width, [&](int64_t i) { store(to + i, rounded(Act::of(load(gate + i)), T{}) * load(up + i)); },
          [&](int64_t i, int64_t left) {
            store_n(to + i, rounded(Act::of(load_n(gate + i, left)), T{}) * load_n(up + i, left), left);
          });
    }
  });
}

}  // namespace llmfw
