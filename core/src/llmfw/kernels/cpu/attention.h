// paged_attention for generation rows: softmax(scale * q k^T) v over a paged cache, computed online, key tile by tile
// (arXiv:1805.02867), with grouped query heads, sliding window, soft cap and sinks.
//
// One piece of work is one request, one key/value head and one span of its keys; spans are cut only when there are
// too few requests to feed the threads, and their partial results (sum, maximum, weighted values) are merged after.
// Query heads of a group go up to four at a time, so that each key and value is read once for them.
#pragma once

#include "binding.h"
#include "parallel.h"
#include "simd.h"

#include <cmath>
#include <limits>
#include <vector>

namespace llmfw {

constexpr int64_t kTile = 64;
constexpr int kMaxGroup = 4;
constexpr float kNothing = -std::numeric_limits<float>::infinity();

template <class T>
struct Attention {
  const T* q;  // [tokens, heads, head_dim]
  const T* k_cache;
  const T* v_cache;
  T* out;                     // [tokens, heads, v_dim]
  const int32_t* cu_queries;  // [requests + 1]
  const int32_t* kv_lens;     // [requests]
  const int32_t* blocks;      // [requests, blocks_stride]
  const float* sinks;         // [heads] or null
  int64_t blocks_stride, requests, heads, kv_heads, head_dim, v_dim, block_size, window;
  float scale, softcap;
  int64_t spans;
  float* partial;  // [tokens - cu_queries[0], heads, spans, v_dim + 2]

  int64_t slot(int64_t request, int64_t key) const {
    return static_cast<int64_t>(blocks[request * blocks_stride + key / block_size]) * block_size + key % block_size;
  }
  float* partial_of(int64_t token, int64_t head, int64_t span) const {
    return partial + (((token - cu_queries[0]) * heads + head) * spans + span) * (v_dim + 2);
  }

  // All query heads of `kv_head` over the keys of one span of one request.
  void run(int64_t request, int64_t kv_head, int64_t span) const {
    const int64_t kv_len = kv_lens[request];
    const int64_t group = heads / kv_heads;
    const int64_t queries = cu_queries[request + 1] - cu_queries[request];
    for (int64_t t = 0; t < queries; t++) {
      const int64_t seen = kv_len - queries + t + 1;
      const int64_t from = window > 0 ? std::max<int64_t>(0, seen - window) : 0;
      const int64_t begin = from + (seen - from) * span / spans;
      const int64_t end = from + (seen - from) * (span + 1) / spans;
      const int64_t token = cu_queries[request] + t;
      for (int64_t g = 0; g < group; g += kMaxGroup) {
        const int64_t head = kv_head * group + g;
        switch (std::min<int64_t>(kMaxGroup, group - g)) {
          case 1: attend<1>(request, token, head, kv_head, begin, end, span); break;
          case 2: attend<2>(request, token, head, kv_head, begin, end, span); break;
          case 3: attend<3>(request, token, head, kv_head, begin, end, span); break;
          default: attend<4>(request, token, head, kv_head, begin, end, span);
        }
      }
    }
  }

  template <int kHeads>
  void attend(int64_t request, int64_t token, int64_t head, int64_t kv_head, int64_t begin, int64_t end,
              int64_t span) const {
    const T* keys[kTile];
    const T* values[kTile];
    float scores[kHeads][kTile];
    float* state[kHeads];  // weighted values, then maximum, then sum
    for (int h = 0; h < kHeads; h++) {
      state[h] = partial_of(token, head + h, span);
      std::fill(state[h], state[h] + v_dim, 0.0f);
      state[h][v_dim] = kNothing;
      state[h][v_dim + 1] = 0.0f;
    }
    for (int64_t at = begin; at < end; at += kTile) {
      const int64_t count = std::min(kTile, end - at);
      for (int64_t j = 0; j < count; j++) {
        const int64_t row = slot(request, at + j) * kv_heads + kv_head;
        keys[j] = k_cache + row * head_dim;
        values[j] = v_cache + row * v_dim;
      }
      score<kHeads>(q + (token * heads + head) * head_dim, keys, count, scores);
      float shrink[kHeads];
      for (int h = 0; h < kHeads; h++) shrink[h] = softmax_tile(scores[h], count, state[h] + v_dim);
      weigh<kHeads>(scores, shrink, values, count, state);
    }
  }

  template <int kHeads>
  void score(const T* query, const T* const* keys, int64_t count, float (*scores)[kTile]) const {
    using D = Dot<T>;
    for (int64_t j = 0; j < count; j += 4) {
      const T* four[4];
      for (int c = 0; c < 4; c++) four[c] = keys[std::min(j + c, count - 1)];
      Vec acc[kHeads][4];
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; h++)
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) acc[h][c] = set1(0.0f);
      auto step = [&](auto&& fetch) {
        typename D::Reg wanted[kHeads];
#pragma GCC unroll 4
        for (int h = 0; h < kHeads; h++) wanted[h] = fetch(query + h * head_dim);
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) {
          const typename D::Reg key = fetch(four[c]);
#pragma GCC unroll 4
          for (int h = 0; h < kHeads; h++) acc[h][c] = D::add(acc[h][c], wanted[h], key);
        }
      };
      int64_t i = 0;
      for (; i + D::kStep <= head_dim; i += D::kStep) step([&](const T* p) { return D::load(p + i); });
      if (i < head_dim) step([&](const T* p) { return D::load_n(p + i, head_dim - i); });
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; h++) {
        _mm_storeu_ps(scores[h] + j, sum4(acc[h][0], acc[h][1], acc[h][2], acc[h][3]) * _mm_set1_ps(scale));
      }
    }
  }

  // Scores to weights relative to the running maximum; returns what earlier results shrink by.
  float softmax_tile(float* scores, int64_t count, float* running) const {
    if (softcap > 0.0f) {
      for (int64_t j = 0; j < count; j += kLanes) {
        store(scores + j, set1(softcap) * tanh(load(scores + j) / set1(softcap)));
      }
    }
    float top = running[0];
    for (int64_t j = 0; j < count; j++) top = std::max(top, scores[j]);
    Vec total = set1(0.0f);
    auto weight = [&](Vec s) { return exp(s - set1(top)); };
    each_vec(
        count,
        [&](int64_t j) {
          const Vec w = weight(load(scores + j));
          store(scores + j, w);
          total = total + w;
        },
        [&](int64_t j, int64_t left) {
          store_n(scores + j, weight(load_n(scores + j, left)), left);
          total = total + load_n(scores + j, left);
        });
    const float shrink = running[0] == kNothing ? 0.0f : std::exp(running[0] - top);
    running[0] = top;
    running[1] = running[1] * shrink + sum(total);
    return shrink;
  }

  template <int kHeads>
  void weigh(const float (*weights)[kTile], const float* shrink, const T* const* values, int64_t count,
             float* const* state) const {
    auto columns = [&](int64_t d, auto&& fetch, auto&& fetch_state, auto&& put_state) {
      Vec acc[kHeads];
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; h++) acc[h] = fetch_state(state[h] + d) * set1(shrink[h]);
      for (int64_t j = 0; j < count; j++) {
        const Vec value = fetch(values[j] + d);
#pragma GCC unroll 4
        for (int h = 0; h < kHeads; h++) acc[h] = fma(set1(weights[h][j]), value, acc[h]);
      }
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; h++) put_state(state[h] + d, acc[h]);
    };
    each_vec(
        v_dim,
        [&](int64_t d) {
          columns(
              d, [](const T* p) { return load(p); }, [](const float* p) { return load(p); },
              [](float* p, Vec a) { store(p, a); });
        },
        [&](int64_t d, int64_t left) {
          columns(
              d, [=](const T* p) { return load_n(p, left); }, [=](const float* p) { return load_n(p, left); },
              [=](float* p, Vec a) { store_n(p, a, left); });
        });
  }

  // The spans of one token and head, and the sink, to the result.
  void merge(int64_t token, int64_t head) const {
    float top = sinks ? sinks[head] : kNothing;
    for (int64_t s = 0; s < spans; s++) top = std::max(top, partial_of(token, head, s)[v_dim]);
    float total = sinks ? std::exp(sinks[head] - top) : 0.0f;
    float* first = partial_of(token, head, 0);
    for (int64_t s = 0; s < spans; s++) {
      const float* part = partial_of(token, head, s);
      const float share = part[v_dim] == kNothing ? 0.0f : std::exp(part[v_dim] - top);
      total += part[v_dim + 1] * share;
      for (int64_t d = 0; d < v_dim; d++) first[d] = (s ? first[d] : 0.0f) + part[d] * share;
    }
    T* to = out + (token * heads + head) * v_dim;
    for (int64_t d = 0; d < v_dim; d++) put(to + d, first[d] / total);
  }
};

template <class T>
void paged_attention(const T* q, const T* k_cache, const T* v_cache, T* out, const int32_t* cu_queries,
                     const int32_t* kv_lens, const int32_t* blocks, const float* sinks, int64_t blocks_stride,
                     int64_t requests, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t v_dim,
                     int64_t block_size, int64_t window, double scale, double softcap, int64_t threads) {
  constexpr int64_t kShortestSpan = 128;
  int64_t keys = 0, longest = 0;
  for (int64_t r = 0; r < requests; r++) {
    const int64_t seen = window > 0 ? std::min<int64_t>(window, kv_lens[r]) : kv_lens[r];
    longest = std::max(longest, seen);
    keys += seen * (cu_queries[r + 1] - cu_queries[r]);
  }
  const int64_t pieces = std::max<int64_t>(1, requests * kv_heads);
  const int64_t wanted = threads > 1 ? (3 * threads + pieces - 1) / pieces : 1;
  const int64_t spans = std::max<int64_t>(1, std::min(wanted, longest / kShortestSpan));
  const int64_t tokens = cu_queries[requests] - cu_queries[0];
  static thread_local std::vector<float> scratch;
  const size_t need = static_cast<size_t>(tokens * heads * spans * (v_dim + 2));
  if (scratch.size() < need) scratch.resize(need);
  const Attention<T> job{q,        k_cache,  v_cache,  out,    cu_queries, kv_lens,    blocks,
                         sinks,    blocks_stride, requests, heads, kv_heads, head_dim, v_dim,
                         block_size, window, static_cast<float>(scale), static_cast<float>(softcap), spans,
                         scratch.data()};
  const Unlocked unlocked(keys * heads * (head_dim + v_dim));
  if (keys * heads * (head_dim + v_dim) < (1 << 16)) threads = 1;
  parallel_chunks(threads, requests * kv_heads * spans, 1, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; piece++) {
      job.run(piece / (kv_heads * spans), piece / spans % kv_heads, piece % spans);
    }
  });
  parallel_rows(threads, tokens * heads, spans * v_dim, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) job.merge(cu_queries[0] + i / heads, i % heads);
  });
}

}  // namespace llmfw
