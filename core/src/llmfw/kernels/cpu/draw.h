// draw_tokens: one token a row by temperature, top_k, top_p and min_p, without sorting the vocabulary.
//
// The reference says what distances and masses are. Masses are whole numbers, so sums may be taken in any order;
// products and sums of floats are rounded one by one, for which library.py keeps the compiler from fusing them.
#pragma once

#include "parallel.h"
#include "simd.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace llmfw {

struct DrawRow {
  float scale, farthest;
  int64_t top_k;
  double top_p, uniform;
};

class Drawing {
 public:
  template <class T>
  int64_t run(const T* logits, int64_t vocab, int64_t best, const DrawRow& row) {
    measure(logits, vocab, to_float(logits[best]), row.scale / kUnit);
    float limit = row.farthest / kUnit;
    if (row.top_k > 0) limit = std::min(limit, among_best(std::min(row.top_k, vocab), row.top_p));
    else if (row.top_p < 1.0) limit = std::min(limit, nucleus(row.top_p));
    return draw(limit, row.uniform);
  }

 private:
  static constexpr int64_t kTile = 1024;
  static constexpr int kBins = 2048;
  static constexpr float kUnit = 64.0f;  // octaves of a distance of 1, beyond which all counts as 1
  static constexpr float kPlaces = 3072.0f;  // bins in that; all beyond the last are in it

  template <class T>
  void measure(const T* logits, int64_t vocab, float greatest, float scale) {
    tiles_ = (vocab + kTile - 1) / kTile;
    distance_.assign(tiles_ * kTile, 1.0f);
    nearest_.resize(tiles_);
    for (int64_t i = 0; i < vocab; i++) {
      const float below = greatest - to_float(logits[i]);
      const float distance = below * scale;
      distance_[i] = distance < 1.0f ? distance : 1.0f;
    }
    for (int64_t tile = 0; tile < tiles_; tile++) {
      const float* x = &distance_[tile * kTile];
      float nearest = 1.0f;
      for (int64_t i = 0; i < kTile; i++) nearest = x[i] < nearest ? x[i] : nearest;
      nearest_[tile] = nearest;
    }
  }

  static uint64_t mass_of(float distance) {
    const float shifted = distance + 6144.0f;  // 1.5 * 2^12: the sum's last bit is 1/32 octave
    const float x = (shifted - 6144.0f) - distance;
    float p = x * 983.9677734375f;
    p = p + 44.36206817626953f;
    p = p * x;
    p = p + 1.0f;
    uint32_t steps;
    std::memcpy(&steps, &shifted, sizeof steps);
    const uint32_t bits = kPowers[steps % 32] - (steps << 18);
    float power;
    std::memcpy(&power, &bits, sizeof power);
    const double mass = static_cast<double>(p * power) * 0x1p40 + 0x1.8p52;  // the sum's last bit is 1
    uint64_t whole;
    std::memcpy(&whole, &mass, sizeof whole);
    return whole & ((uint64_t{1} << 51) - 1);
  }

  static int bin_of(float distance) {
    const float place = distance * kPlaces;
    return static_cast<int>(place < kBins - 1 ? place : kBins - 1);
  }

  // What top_p asks of a sum: at least 1, at most all of it.
  static uint64_t part_of(uint64_t all, double top_p) {
    const double part = std::ceil(static_cast<double>(all) * top_p);
    return std::min(std::max<uint64_t>(static_cast<uint64_t>(part), 1), all);
  }

  // The first bin with which the sum reaches `target`; `target` becomes what is left for it.
  int bin_that_reaches(uint64_t& target) const {
    int bin = 0;
    while (table_[bin] < target) target -= table_[bin++];
    return bin;
  }

  void list(int first, int last) {
    listed_.clear();
    for (float y : distance_) {
      const int bin = bin_of(y);
      if (bin >= first && bin <= last) listed_.push_back(y);
    }
    std::sort(listed_.begin(), listed_.end());
  }

  // The listed distance with which the mass reaches `target`.
  float reach(uint64_t target) const {
    uint64_t reached = 0;
    for (float y : listed_)
      if ((reached += mass_of(y)) >= target) return y;
    return listed_.back();
  }

  float among_best(int64_t top_k, double top_p) {
    table_.assign(kBins, 0);
    for (float y : distance_) table_[bin_of(y)]++;
    uint64_t left = top_k;
    const int bin = bin_that_reaches(left);
    list(top_p < 1.0 ? 0 : bin, bin);
    if (top_p >= 1.0) return listed_[left - 1];
    const float kth = listed_[top_k - 1];
    uint64_t all = 0;
    for (int64_t i = 0; i < top_k; i++) all += mass_of(listed_[i]);
    return std::min(kth, reach(part_of(all, top_p)));
  }

  float nucleus(double top_p) {
    table_.assign(kBins, 0);
    uint64_t masses[kTile], all = 0;
    for (int64_t start = 0; start < tiles_ * kTile; start += kTile) {
      for (int64_t i = 0; i < kTile; i++) masses[i] = mass_of(distance_[start + i]);
      for (int64_t i = 0; i < kTile; i++) {
        table_[bin_of(distance_[start + i])] += masses[i];
        all += masses[i];
      }
    }
    uint64_t left = part_of(all, top_p);
    const int bin = bin_that_reaches(left);
    list(bin, bin);
    return reach(left);
  }

  int64_t draw(float limit, double uniform) {
    sums_.assign(tiles_, 0);
    uint64_t all = 0;
    for (int64_t tile = 0; tile < tiles_; tile++) {
      if (nearest_[tile] > limit) continue;
      const float* x = &distance_[tile * kTile];
      uint64_t sum = 0;
      for (int64_t i = 0; i < kTile; i++) sum += x[i] <= limit ? mass_of(x[i]) : 0;
      sums_[tile] = sum;
      all += sum;
    }
    uint64_t left = std::min(static_cast<uint64_t>(static_cast<double>(all) * uniform), all - 1);
    int64_t tile = 0;
    while (sums_[tile] <= left) left -= sums_[tile++];
    for (int64_t token = tile * kTile;; token++) {
      const uint64_t mass = distance_[token] <= limit ? mass_of(distance_[token]) : 0;
      if (mass > left) return token;
      left -= mass;
    }
  }

  // Bits of 2^(-i / 32), plus i << 18: less n << 18 they are those of 2^(-n / 32), where i = n % 32.
  static constexpr uint32_t kPowers[32] = {
      0x3f800000, 0x3f7e83b3, 0x3f7d257d, 0x3f7be4ba, 0x3f7ac0c7, 0x3f79b907, 0x3f78ccdf, 0x3f77fbb8,
      0x3f7744fd, 0x3f76a81e, 0x3f76248c, 0x3f75b9be, 0x3f75672a, 0x3f752c4d, 0x3f7508a4, 0x3f74fbaf,
      0x3f7504f3, 0x3f7523f6, 0x3f75583f, 0x3f75a15b, 0x3f75fed7, 0x3f767043, 0x3f76f532, 0x3f778d3a,
      0x3f7837f0, 0x3f78f4f0, 0x3f79c3d3, 0x3f7aa43a, 0x3f7b95c2, 0x3f7c980f, 0x3f7daac3, 0x3f7ecd87};

  int64_t tiles_ = 0;
  std::vector<float> distance_, nearest_, listed_;  // distances of all, padded with 1; least of each tile
  std::vector<uint64_t> table_, sums_;
};

// parameters: [5, rows] as the reference has them.
template <class T>
void draw_tokens(const T* logits, const int64_t* best, const double* parameters, int64_t* tokens, int64_t rows,
                 int64_t vocab, int64_t stride, int64_t threads) {
  parallel_chunks(threads, rows, 1, [&](int64_t begin, int64_t end) {
    static thread_local Drawing drawing;
    for (int64_t i = begin; i < end; i++) {
      const DrawRow row{static_cast<float>(parameters[i]), static_cast<float>(parameters[3 * rows + i]),
                        static_cast<int64_t>(parameters[rows + i]), parameters[2 * rows + i], parameters[4 * rows + i]};
      tokens[i] = best[i] < 0 || row.scale == 0 ? best[i] : drawing.run(logits + i * stride, vocab, best[i], row);
    }
  });
}

}  // namespace llmfw
