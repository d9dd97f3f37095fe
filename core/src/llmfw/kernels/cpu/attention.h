// paged_attention: softmax(scale * q k^T) v over a paged cache, causal, computed online, key tile by key tile
// (arXiv:1805.02867), with grouped query heads, sliding window, soft cap and sinks; any number of queries a request.
// Values may be the first features of the keys' rows (a latent cache): their rows are v_stride elements apart.
//
// One piece of work is a few queries of one request, all heads that share one key/value head, and one span of its keys.
// Its rows (query, head) go four at a time over a tile of keys, so that each key and value is read once for all of
// them. Spans are cut only when there are too few pieces to feed the threads (decoding one or two requests); their
// partial results (weighted values, maximum, sum) are merged after.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "binding.h"
#include "parallel.h"
#include "simd.h"

namespace llmfw {

constexpr int64_t kTile = 64;        // keys at a time
constexpr int64_t kRowsWanted = 48;  // rows of a piece, if the request has so many queries
constexpr int64_t kShortestSpan = 128;
constexpr float kNothing = -std::numeric_limits<float>::infinity();

struct Piece {
  int64_t request, query, queries;  // `query`: the first one, counted from the request's first
};

// What one thread needs while it works on a piece.
template <class T>
struct Workspace {
  std::vector<const T*> queries;
  std::vector<float*> state;
  std::vector<int64_t> from, to;  // the keys that a row sees
  std::vector<float> weights, shrink, values;
  const T* keys[kTile];
  const T* raw_values[kTile];

  void resize(size_t rows, size_t v_dim) {
    queries.resize(rows);
    state.resize(rows);
    from.resize(rows);
    to.resize(rows);
    shrink.resize(rows);
    weights.resize(rows * kTile);
    values.resize(kTile * v_dim);
  }
};

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
  int64_t blocks_stride, heads, kv_heads, head_dim, v_dim, v_stride, block_size, window;
  float scale, softcap;
  int64_t spans;
  float* partial;  // [tokens - cu_queries[0], heads, spans, v_dim + 2]

  float* partial_of(int64_t token, int64_t head, int64_t span) const {
    return partial + (((token - cu_queries[0]) * heads + head) * spans + span) * (v_dim + 2);
  }

  void run(const Piece& piece, int64_t kv_head, int64_t span) const {
    static thread_local Workspace<T> work;
    const int64_t group = heads / kv_heads, rows = piece.queries * group;
    work.resize(rows, v_dim);
    const int64_t first_token = cu_queries[piece.request] + piece.query;
    const int64_t all_queries = cu_queries[piece.request + 1] - cu_queries[piece.request];
    const int64_t first_seen = kv_lens[piece.request] - all_queries + piece.query + 1;
    for (int64_t r = 0; r < rows; r++) {
      const int64_t t = r / group, token = first_token + t, head = kv_head * group + r % group;
      work.queries[r] = q + (token * heads + head) * head_dim;
      work.to[r] = first_seen + t;
      work.from[r] = window > 0 ? std::max<int64_t>(0, first_seen + t - window) : 0;
      float* state = work.state[r] = partial_of(token, head, span);
      std::fill(state, state + v_dim, 0.0f);
      state[v_dim] = kNothing;
      state[v_dim + 1] = 0.0f;
    }
    const int64_t low = work.from[0], high = work.to[rows - 1];
    const int64_t begin = low + (high - low) * span / spans, end = low + (high - low) * (span + 1) / spans;
    for (int64_t at = begin; at < end; at += kTile) {
      tile(work, piece.request, kv_head, rows, at, std::min(kTile, end - at));
    }
  }

  void tile(Workspace<T>& work, int64_t request, int64_t kv_head, int64_t rows, int64_t at, int64_t count) const {
    find(work, request, kv_head, at, count);
    each_rows(rows, [&](int64_t r, auto n) { score<n()>(work, r, count); });
    for (int64_t r = 0; r < rows; r++) {
      const int64_t from = std::max<int64_t>(0, work.from[r] - at);
      const int64_t to = std::min(count, work.to[r] - at);
      work.shrink[r] = softmax(work.weights.data() + r * kTile, from, to, count, work.state[r] + v_dim);
    }
    if (rows <= 4) {
      weigh_rows(work, rows, count, [&](int64_t j) { return work.raw_values[j]; });
    } else {
      for (int64_t j = 0; j < count; j++) {
        const T* in = work.raw_values[j];
        float* to = work.values.data() + j * v_dim;
        each_vec(
            v_dim, [&](int64_t d) { store(to + d, load(in + d)); },
            [&](int64_t d, int64_t left) { store_n(to + d, load_n(in + d, left), left); });
      }
      weigh_rows(work, rows, count, [&](int64_t j) { return work.values.data() + j * v_dim; });
    }
  }

  // Where the tile's keys and values lie; their lines are asked for at once, the blocks being anywhere in memory.
  void find(Workspace<T>& work, int64_t request, int64_t kv_head, int64_t at, int64_t count) const {
    const int32_t* table = blocks + request * blocks_stride;
    for (int64_t j = 0; j < count;) {
      const int64_t offset = (at + j) % block_size;
      const int64_t slot = static_cast<int64_t>(table[(at + j) / block_size]) * block_size + offset;
      const int64_t here = std::min(count - j, block_size - offset);
      for (int64_t i = 0; i < here; i++, j++) {
        const int64_t row = (slot + i) * kv_heads + kv_head;
        prefetch(work.keys[j] = k_cache + row * head_dim, head_dim);
        prefetch(work.raw_values[j] = v_cache + row * v_stride, v_dim);
      }
    }
  }

  static void prefetch(const T* p, int64_t n) {
    const char* line = reinterpret_cast<const char*>(p);
    for (const char* end = reinterpret_cast<const char*>(p + n); line < end; line += 64) {
      _mm_prefetch(line, _MM_HINT_T0);
    }
  }

  // body(first row, how many as a constant) over rows, four at a time.
  template <class Body>
  static void each_rows(int64_t rows, Body&& body) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) body(r, std::integral_constant<int, 4>{});
    switch (rows - r) {
      case 3: body(r, std::integral_constant<int, 3>{}); break;
      case 2: body(r, std::integral_constant<int, 2>{}); break;
      case 1: body(r, std::integral_constant<int, 1>{}); break;
    }
  }

  template <int kRows>
  void score(Workspace<T>& work, int64_t r, int64_t count) const {
    using D = Dot<T>;
    const T* const* query = work.queries.data() + r;
    for (int64_t j = 0; j < count; j += 4) {
      const T* four[4];
      for (int c = 0; c < 4; c++) four[c] = work.keys[std::min(j + c, count - 1)];
      Vec acc[kRows][4];
#pragma GCC unroll 4
      for (int h = 0; h < kRows; h++)
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) acc[h][c] = set1(0.0f);
      auto step = [&](auto&& fetch) {
        typename D::Reg wanted[kRows];
#pragma GCC unroll 4
        for (int h = 0; h < kRows; h++) wanted[h] = fetch(query[h]);
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) {
          const typename D::Reg key = fetch(four[c]);
#pragma GCC unroll 4
          for (int h = 0; h < kRows; h++) acc[h][c] = D::add(acc[h][c], wanted[h], key);
        }
      };
      int64_t i = 0;
      for (; i + D::kStep <= head_dim; i += D::kStep) step([&](const T* p) { return D::load(p + i); });
      if (i < head_dim) step([&](const T* p) { return D::load_n(p + i, head_dim - i); });
#pragma GCC unroll 4
      for (int h = 0; h < kRows; h++) {
        _mm_storeu_ps(work.weights.data() + (r + h) * kTile + j,
                      sum4(acc[h][0], acc[h][1], acc[h][2], acc[h][3]) * _mm_set1_ps(scale));
      }
    }
  }

  // Scores [0, count) to weights relative to the running maximum, 0 outside the keys [from, to) that the row sees.
  // `running` is maximum and sum; returns what earlier results shrink by.
  float softmax(float* scores, int64_t from, int64_t to, int64_t count, float* running) const {
    if (from >= to) {
      std::fill(scores, scores + count, 0.0f);
      return 1.0f;
    }
    std::fill(scores, scores + from, kNothing);
    std::fill(scores + to, scores + kTile, kNothing);
    Vec tops = set1(running[0]);
    for (int64_t j = 0; j < count; j += kLanes) {
      if (softcap > 0.0f) {
        const Vec capped = set1(softcap) * tanh(load(scores + j) / set1(softcap));
        store(scores + j, capped);
        std::fill(scores + j, scores + std::max(j, std::min(from, j + kLanes)), kNothing);
        std::fill(scores + std::min(std::max(to, j), j + kLanes), scores + j + kLanes, kNothing);
      }
      tops = vmax(tops, load(scores + j));
    }
    float lanes[kLanes];
    store(lanes, tops);
    const float top = *std::max_element(lanes, lanes + kLanes);
    Vec total = set1(0.0f);
    for (int64_t j = 0; j < count; j += kLanes) {
      store(scores + j, exp(load(scores + j) - set1(top)));
    }
    std::fill(scores, scores + from, 0.0f);
    std::fill(scores + to, scores + kTile, 0.0f);
    for (int64_t j = 0; j < count; j += kLanes) total = total + load(scores + j);
    const float shrink = running[0] == kNothing ? 0.0f : std::exp(running[0] - top);
    running[0] = top;
    running[1] = running[1] * shrink + sum(total);
    return shrink;
  }

  template <class ValueAt>
  void weigh_rows(Workspace<T>& work, int64_t rows, int64_t count, ValueAt&& value_at) const {
    each_rows(rows, [&](int64_t r, auto n) {
      int64_t d = 0;
      for (; d + 2 * kLanes <= v_dim; d += 2 * kLanes) weigh<n(), 2>(work, r, d, kLanes, count, value_at);
      for (; d < v_dim; d += kLanes) weigh<n(), 1>(work, r, d, std::min(kLanes, v_dim - d), count, value_at);
    });
  }

  // state = state * shrink + weights @ values, for kRows rows and kVecs vectors of the values' columns from d on;
  // of the last vector `left` lanes count.
  template <int kRows, int kVecs, class ValueAt>
  void weigh(Workspace<T>& work, int64_t r, int64_t d, int64_t left, int64_t count, ValueAt&& value_at) const {
    const bool full = left == kLanes;
    const float* weights = work.weights.data() + r * kTile;
    Vec acc[kRows][kVecs];
#pragma GCC unroll 4
    for (int h = 0; h < kRows; h++)
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; v++) {
        const float* from = work.state[r + h] + d + v * kLanes;
        acc[h][v] = (full ? load(from) : load_n(from, left)) * set1(work.shrink[r + h]);
      }
    auto add = [&](auto&& fetch) {
      for (int64_t j = 0; j < count; j++) {
#pragma GCC unroll 2
        for (int v = 0; v < kVecs; v++) {
          const Vec value = fetch(value_at(j) + d + v * kLanes);
#pragma GCC unroll 4
          for (int h = 0; h < kRows; h++) acc[h][v] = fma(set1(weights[h * kTile + j]), value, acc[h][v]);
        }
      }
    };
    full ? add([](const auto* p) { return load(p); }) : add([=](const auto* p) { return load_n(p, left); });
#pragma GCC unroll 4
    for (int h = 0; h < kRows; h++)
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; v++) {
        float* to = work.state[r + h] + d + v * kLanes;
        full ? store(to, acc[h][v]) : store_n(to, acc[h][v], left);
      }
  }

  // The spans of one token and head, and the sink, to the result.
  void merge(int64_t token, int64_t head) const {
    float top = sinks ? sinks[head] : kNothing;
    for (int64_t s = 0; s < spans; s++) top = std::max(top, partial_of(token, head, s)[v_dim]);
    float total = sinks ? std::exp(sinks[head] - top) : 0.0f;
    float* all = partial_of(token, head, 0);
    for (int64_t s = 0; s < spans; s++) {
      const float* part = partial_of(token, head, s);
      const float share = part[v_dim] == kNothing ? 0.0f : std::exp(part[v_dim] - top);
      total += part[v_dim + 1] * share;
      for (int64_t d = 0; d < v_dim; d++) all[d] = (s ? all[d] : 0.0f) + part[d] * share;
    }
    const Vec whole = set1(1.0f / total);
    T* to = out + (token * heads + head) * v_dim;
    each_vec(
        v_dim, [&](int64_t d) { store(to + d, load(all + d) * whole); },
        [&](int64_t d, int64_t left) { store_n(to + d, load_n(all + d, left) * whole, left); });
  }
};

template <class T>
void paged_attention(const T* q, const T* k_cache, const T* v_cache, T* out, const int32_t* cu_queries,
                     const int32_t* kv_lens, const int32_t* blocks, const float* sinks, int64_t blocks_stride,
                     int64_t requests, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t v_dim,
                     int64_t v_stride, int64_t block_size, int64_t window, double scale, double softcap, int64_t threads) {
  static thread_local std::vector<Piece> pieces;
  static thread_local std::vector<float> scratch;
  pieces.clear();
  const int64_t at_once = std::max<int64_t>(1, kRowsWanted * kv_heads / heads);
  int64_t pairs = 0, longest = 0;
  for (int64_t r = 0; r < requests; r++) {
    const int64_t queries = cu_queries[r + 1] - cu_queries[r];
    const int64_t seen = window > 0 ? std::min<int64_t>(window, kv_lens[r]) : kv_lens[r];
    longest = std::max(longest, seen);
    pairs += seen * queries;
    for (int64_t t = queries; t > 0;) {  // the last queries first: they see most keys
      const int64_t begin = (t - 1) / at_once * at_once;
      pieces.push_back({r, begin, t - begin});
      t = begin;
    }
  }
  const int64_t work = pairs * heads * (head_dim + v_dim);
  if (work < (1 << 16)) threads = 1;
  const int64_t whole = static_cast<int64_t>(pieces.size()) * kv_heads;
  const int64_t wanted = threads > 1 && whole > 0 ? (3 * threads + whole - 1) / whole : 1;
  const int64_t spans = std::max<int64_t>(1, std::min(wanted, longest / kShortestSpan));
  const int64_t tokens = cu_queries[requests] - cu_queries[0];
  const size_t need = static_cast<size_t>(tokens * heads * spans * (v_dim + 2));
  if (scratch.size() < need) scratch.resize(need);
  const Attention<T> job{
      q,         k_cache, v_cache,  out,      cu_queries, kv_lens,    blocks, sinks,
      blocks_stride, heads, kv_heads, head_dim, v_dim, v_stride, block_size, window, static_cast<float>(scale),
      static_cast<float>(softcap), spans, scratch.data()};
  const Piece* piece_of = pieces.data();  // the vector itself is another one in each thread
  const Unlocked unlocked(work);
  parallel_chunks(threads, whole * spans, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      job.run(piece_of[i / (kv_heads * spans)], i / spans % kv_heads, i % spans);
    }
  });
  parallel_rows(threads, tokens * heads, spans * v_dim, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) job.merge(cu_queries[0] + i / heads, i % heads);
  });
}

}  // namespace llmfw
