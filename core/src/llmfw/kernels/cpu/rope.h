// rope_and_cache: take q, k, v of each token from packed qkv, normalise and rotate the heads of q and k, write k and v
// to the token's slot of the paged cache and q to `q_out` [tokens, heads, head_dim].
//
// latent_rope_and_cache: normalise each token's latent, rotate the key that its heads share, write both to its slot of
// a latent cache; rotate the heads of q [tokens, heads, rotary_dim], which may be part of wider ones, to `q_out`.
#pragma once

#include "norm.h"

namespace llmfw {

constexpr int64_t kMaxHeadDim = 1024;

template <class T>
struct HeadMath {
  int64_t head_dim, rotary_dim;
  bool interleaved;
  float eps, norm_offset;

  // One head: norm (may be null), rotation by `turn` = cosines | sines of its position (may be null).
  void apply(const T* in, const T* norm, const float* turn, T* out) const {
    if (!norm && !turn) {
      std::memcpy(out, in, head_dim * sizeof(T));
      return;
    }
    float head[kMaxHeadDim];
    if (norm) {
      T normed[kMaxHeadDim];
      norm_row(in, norm, normed, head_dim, eps, norm_offset);
      widen_all(normed, head);
    } else {
      widen_all(in, head);
    }
    if (turn) interleaved ? rotate_pairs(head, turn) : rotate_halves(head, turn);
    each_vec(
        head_dim, [&](int64_t i) { store(out + i, load(head + i)); },
        [&](int64_t i, int64_t left) { store_n(out + i, load_n(head + i, left), left); });
  }

  void widen_all(const T* in, float* out) const {
    each_vec(
        head_dim, [&](int64_t i) { store(out + i, load(in + i)); },
        [&](int64_t i, int64_t left) { store_n(out + i, load_n(in + i, left), left); });
  }

  void rotate_halves(float* head, const float* turn) const {
    const int64_t half = rotary_dim / 2;
    float* other = head + half;
    each_vec(
        half,
        [&](int64_t i) {
          const Vec a = load(head + i), b = load(other + i), c = load(turn + i), s = load(turn + half + i);
          store(head + i, a * c - b * s);
          store(other + i, b * c + a * s);
        },
        [&](int64_t i, int64_t left) {
          const Vec a = load_n(head + i, left), b = load_n(other + i, left);
          const Vec c = load_n(turn + i, left), s = load_n(turn + half + i, left);
          store_n(head + i, a * c - b * s, left);
          store_n(other + i, b * c + a * s, left);
        });
  }

  void rotate_pairs(float* head, const float* turn) const {
    const int64_t half = rotary_dim / 2;
    for (int64_t i = 0; i < half; i++) {
      const float a = head[2 * i], b = head[2 * i + 1], c = turn[i], s = turn[half + i];
      head[2 * i] = a * c - b * s;
      head[2 * i + 1] = b * c + a * s;
    }
  }
};

template <class T>
void rope_and_cache(const T* qkv, const int64_t* positions, const float* cos_sin, T* k_cache, T* v_cache,
                    const int64_t* slots, const T* q_norm, const T* k_norm, T* q_out, int64_t tokens, int64_t heads,
                    int64_t kv_heads, int64_t head_dim, int64_t rotary_dim, int64_t interleaved, double eps,
                    double norm_offset, int64_t threads) {
  const HeadMath<T> math{head_dim, rotary_dim, interleaved != 0, static_cast<float>(eps),
                         static_cast<float>(norm_offset)};
  const int64_t q_width = heads * head_dim, kv_width = kv_heads * head_dim;
  const int64_t width = q_width + 2 * kv_width;
  parallel_rows(threads, tokens, width, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; token++) {
      const T* in = qkv + token * width;
      const float* turn = cos_sin ? cos_sin + positions[token] * rotary_dim : nullptr;
      T* q = q_out + token * q_width;
      for (int64_t h = 0; h < heads; h++) math.apply(in + h * head_dim, q_norm, turn, q + h * head_dim);
      if (slots[token] < 0) continue;
      T* k = k_cache + slots[token] * kv_width;
      in += q_width;
      for (int64_t h = 0; h < kv_heads; h++) math.apply(in + h * head_dim, k_norm, turn, k + h * head_dim);
      std::memcpy(v_cache + slots[token] * kv_width, in + kv_width, kv_width * sizeof(T));
    }
  });
}

// kv: [tokens, latent_dim + rotary_dim], as a slot of the cache is. q: heads q_head apart, tokens q_token.
template <class T>
void latent_rope_and_cache(const T* q, const T* kv, const int64_t* positions, const float* cos_sin, T* cache,
                           const int64_t* slots, const T* norm, T* q_out, int64_t tokens, int64_t heads,
                           int64_t latent_dim, int64_t rotary_dim, int64_t q_token, int64_t q_head,
                           int64_t interleaved, double eps, int64_t threads) {
  const HeadMath<T> math{rotary_dim, rotary_dim, interleaved != 0, 0.0f, 0.0f};
  const int64_t width = latent_dim + rotary_dim;
  parallel_rows(threads, tokens, width + heads * rotary_dim, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; token++) {
      const float* turn = cos_sin ? cos_sin + positions[token] * rotary_dim : nullptr;
      for (int64_t h = 0; h < heads; h++) {
        math.apply(q + token * q_token + h * q_head, nullptr, turn, q_out + (token * heads + h) * rotary_dim);
      }
      if (slots[token] < 0) continue;
      const T* in = kv + token * width;
      T* to = cache + slots[token] * width;
      if (norm) {
        norm_row(in, norm, to, latent_dim, static_cast<float>(eps), 0.0f);
      } else {
        std::memcpy(to, in, latent_dim * sizeof(T));
      }
      math.apply(in + latent_dim, nullptr, turn, to + latent_dim);
    }
  });
}

}  // namespace llmfw
