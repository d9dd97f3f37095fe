// rms_norm and add_rms_norm: x / sqrt(mean(x^2) + eps) * (offset + weight) over rows of `hidden` numbers.
//
// With offset 0 the normalised value is rounded to x's format before the product with weight, as the reference does.
#pragma once

#include "parallel.h"
#include "simd.h"

#include <cmath>

namespace llmfw {

template <class T>
inline float mean_square(const T* x, int64_t n) {
  Vec total = set1(0.0f);
  auto add = [&](Vec v) { total = fma(v, v, total); };
  each_vec(
      n, [&](int64_t i) { add(load(x + i)); }, [&](int64_t i, int64_t left) { add(load_n(x + i, left)); });
  return sum(total) / static_cast<float>(n);
}

template <class T>
inline void norm_row(const T* x, const T* weight, T* out, int64_t n, float eps, float offset) {
  const Vec inverse = set1(1.0f / std::sqrt(mean_square(x, n) + eps));
  auto scaled = [&](Vec v, Vec w) {
    return offset == 0.0f ? rounded(v * inverse, T{}) * w : v * inverse * (w + set1(offset));
  };
  each_vec(
      n, [&](int64_t i) { store(out + i, scaled(load(x + i), load(weight + i))); },
      [&](int64_t i, int64_t left) {
        store_n(out + i, scaled(load_n(x + i, left), load_n(weight + i, left)), left);
      });
}

template <class T>
void rms_norm(const T* x, const T* weight, T* out, int64_t rows, int64_t hidden, double eps, double offset,
              int64_t threads) {
  parallel_rows(threads, rows, hidden, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      norm_row(x + row * hidden, weight, out + row * hidden, hidden, static_cast<float>(eps),
               static_cast<float>(offset));
    }
  });
}

// In place: residual becomes x + residual, x its norm.
template <class T>
void add_rms_norm(T* x, T* residual, const T* weight, int64_t rows, int64_t hidden, double eps, double offset,
                  int64_t threads) {
  parallel_rows(threads, rows, hidden, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      T* a = x + row * hidden;
      T* b = residual + row * hidden;
      each_vec(
          hidden, [&](int64_t i) { store(b + i, load(a + i) + load(b + i)); },
          [&](int64_t i, int64_t left) { store_n(b + i, load_n(a + i, left) + load_n(b + i, left), left); });
      norm_row(b, weight, a, hidden, static_cast<float>(eps), static_cast<float>(offset));
    }
  });
}

}  // namespace llmfw
