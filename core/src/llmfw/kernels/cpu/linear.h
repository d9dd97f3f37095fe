// linear: out [rows, out_features] = x [rows, in_features] @ weight^T (+ bias); weight [out_features, in_features]
// stays as it was loaded, so that torch's product (many rows) and a tied embedding share it.
//
// One row is bound by reading the weights: chunks of the weight's rows go to the threads, four rows of it at a time,
// each streamed once. More rows take a register tile of kTileRows x 4 sums; a chunk of the weight is small enough to
// stay in the second-level cache while the rows of x pass over it.
//
// grouped_linear: rows sorted by group, each group's with its own weight; chunks of all groups' weights go to the
// threads one after the other, so no thread waits at the end of a group.
//
// head_linear: the same for each head of x [tokens, heads, in] with its own weight; chunks of heads go to the threads.
#pragma once

#include <vector>

#include "binding.h"
#include "parallel.h"
#include "simd.h"

namespace llmfw {

#ifdef LLMFW_AVX512
constexpr int kTileRows = 6;  // 24 sums + 6 rows of x + 1 of the weight fill 32 registers
#else
constexpr int kTileRows = 3;
#endif
constexpr int64_t kChunkBytes = 128 << 10;
constexpr int64_t kAhead = 4096;  // bytes of the weight to ask for early when several rows pass over it

template <class T>
struct Product {
  const T* x;
  const T* weight;
  const T* bias;
  T* out;
  int64_t in;
  int64_t x_stride, out_stride;  // from one row to the next
};

// Sums of kRows rows of x with kCols rows of the weight, from (row, col) on.
template <class T, int kRows, int kCols>
inline void tile(const Product<T>& p, int64_t row, int64_t col) {
  using D = Dot<T>;
  const T* x = p.x + row * p.x_stride;
  const T* w = p.weight + col * p.in;
  Vec acc[kRows][kCols];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; r++)
#pragma GCC unroll 4
    for (int c = 0; c < kCols; c++) acc[r][c] = set1(0.0f);
  int64_t k = 0;
  auto step = [&](auto&& fetch) {
    typename D::Reg rows[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++) rows[r] = fetch(x + r * p.x_stride);
#pragma GCC unroll 4
    for (int c = 0; c < kCols; c++) {
      const T* w_row = w + c * p.in;
      const typename D::Reg w_c = fetch(w_row);
      if (kRows > 1) _mm_prefetch(reinterpret_cast<const char*>(w_row + k) + kAhead, _MM_HINT_T0);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; r++) acc[r][c] = D::add(acc[r][c], rows[r], w_c);
    }
  };
  for (; k + D::kStep <= p.in; k += D::kStep) step([&](const T* at) { return D::load(at + k); });
  if (k < p.in) step([&](const T* at) { return D::load_n(at + k, p.in - k); });
#pragma GCC unroll 8
  for (int r = 0; r < kRows; r++) {
    T* out = p.out + (row + r) * p.out_stride + col;
    if constexpr (kCols == 4) {
      __m128 sums = sum4(acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
      if (p.bias) sums += load4(p.bias + col);
      store4(out, sums);
    } else {
      put(out, sum(acc[r][0]) + (p.bias ? to_float(p.bias[col]) : 0.0f));
    }
  }
}

template <class T, int kRows>
inline void columns(const Product<T>& p, int64_t row, int64_t begin, int64_t end) {
  int64_t col = begin;
  for (; col + 4 <= end; col += 4) tile<T, kRows, 4>(p, row, col);
  for (; col < end; col++) tile<T, kRows, 1>(p, row, col);
}

template <class T, int kRows = kTileRows>
inline void columns_of(int64_t rows, const Product<T>& p, int64_t row, int64_t begin, int64_t end) {
  if constexpr (kRows == 1) {
    columns<T, 1>(p, row, begin, end);
  } else if (rows == kRows) {
    columns<T, kRows>(p, row, begin, end);
  } else {
    columns_of<T, kRows - 1>(rows, p, row, begin, end);
  }
}

// All rows times the weight's rows [begin, end), so many of the latter at a time that they stay in the cache.
template <class T>
inline void chunks_of(const Product<T>& p, int64_t rows, int64_t chunk, int64_t begin, int64_t end) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  for (; begin < end; begin += chunk) {
    for (int64_t t = 0; t < tiles; t++) {  // as even as can be: 8 rows are 4 and 4, not 6 and 2
      const int64_t from = rows * t / tiles, to = rows * (t + 1) / tiles;
      columns_of<T>(to - from, p, from, begin, std::min(end, begin + chunk));
    }
  }
}

template <class T>
int64_t chunk_that_fits(int64_t in) {
  return std::max<int64_t>(4, (kChunkBytes / static_cast<int64_t>(sizeof(T) * std::max<int64_t>(in, 1))) & ~int64_t{3});
}

template <class T>
void linear(const T* x, const T* weight, const T* bias, T* out, int64_t rows, int64_t in, int64_t outs,
            int64_t threads) {
  const int64_t work = rows * in * outs;
  const Unlocked unlocked(work);
  const Product<T> product{x, weight, bias, out, in, in, outs};
  if (work < (1 << 16)) threads = 1;
  const int64_t share = outs / (4 * std::max<int64_t>(threads, 1)) & ~int64_t{3};
  const int64_t chunk = std::max<int64_t>(4, std::min(chunk_that_fits<T>(in), share));
  parallel_chunks(threads, outs, chunk,
                  [&](int64_t begin, int64_t end) { chunks_of(product, rows, chunk, begin, end); });
}

// ends: where each group's rows end. weight: each group's [outs, in].
template <class T>
void grouped_linear(const T* x, const T* weight, const int32_t* ends, T* out, int64_t rows, int64_t groups, int64_t in,
                    int64_t outs, int64_t threads) {
  struct Group {
    int64_t number, start, rows;
  };
  static thread_local std::vector<Group> found;
  std::vector<Group>& busy = found;  // the caller's, for all threads
  busy.clear();
  int64_t start = 0;
  for (int64_t g = 0; g < groups; g++) {
    const int64_t end = std::min<int64_t>(ends[g], rows);
    if (end > start) busy.push_back({g, start, end - start});
    start = std::max(start, end);
  }
  const int64_t work = rows * in * outs;
  const Unlocked unlocked(work);
  if (work < (1 << 16)) threads = 1;
  const int64_t chunk = std::min(chunk_that_fits<T>(in), std::max<int64_t>(4, outs / 4 & ~int64_t{3}));
  const int64_t pieces = (outs + chunk - 1) / chunk;
  parallel_chunks(threads, static_cast<int64_t>(busy.size()) * pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; at++) {
      const Group group = busy[at / pieces];
      const Product<T> product{x + group.start * in, weight + group.number * in * outs, nullptr,
                               out + group.start * outs, in, in, outs};
      const int64_t from = at % pieces * chunk;
      chunks_of(product, group.rows, chunk, from, std::min(outs, from + chunk));
    }
  });
}

// x: rows of `in` numbers, x_token and x_head apart. weight: each head's [outs, in], w_head apart.
template <class T>
void head_linear(const T* x, const T* weight, T* out, int64_t tokens, int64_t heads, int64_t in, int64_t outs,
                 int64_t x_token, int64_t x_head, int64_t w_head, int64_t threads) {
  const int64_t work = tokens * heads * in * outs;
  const Unlocked unlocked(work);
  if (work < (1 << 16)) threads = 1;
  parallel_chunks(threads, heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; head++) {
      const Product<T> product{x + head * x_head, weight + head * w_head, nullptr, out + head * outs,
                               in, x_token, heads * outs};
      chunks_of(product, tokens, chunk_that_fits<T>(in), 0, outs);
    }
  });
}

}  // namespace llmfw
