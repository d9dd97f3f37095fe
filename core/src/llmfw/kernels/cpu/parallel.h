// A share in torch's own pool of threads.
//
// The symbols below are those of the OpenMP runtime that torch has loaded already (libgomp, or LLVM's and Intel's,
// which offer the same names); they are found when the object is loaded. So there is one pool, not two that
// fight for the cores, and any compiler will do: no -fopenmp.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

extern "C" void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);

namespace llmfw {

// Runs body(begin, end) over [0, count) in chunks that idle threads take in order.
template <class Body>
void parallel_chunks(int64_t threads, int64_t count, int64_t chunk, Body&& body) {
  threads = std::min(threads, (count + chunk - 1) / chunk);
  if (threads <= 1) {
    if (count > 0) body(int64_t{0}, count);
    return;
  }
  std::atomic<int64_t> next{0};
  auto work = [&] {
    for (int64_t begin; (begin = next.fetch_add(chunk, std::memory_order_relaxed)) < count;) {
      body(begin, std::min(count, begin + chunk));
    }
  };
  using Work = decltype(work);
  GOMP_parallel([](void* data) { (*static_cast<Work*>(data))(); }, &work, static_cast<unsigned>(threads), 0);
}

// The same over rows of `width` numbers, with chunks big enough to be worth a thread.
template <class Body>
void parallel_rows(int64_t threads, int64_t rows, int64_t width, Body&& body) {
  constexpr int64_t kNumbersAChunk = 16384;
  parallel_chunks(threads, rows, std::max<int64_t>(1, kNumbersAChunk / std::max<int64_t>(width, 1)), body);
}

}  // namespace llmfw
