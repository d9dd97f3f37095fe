// The CPU's stand-in for ptx.cuh: the same functions in plain C++, mma over the lanes of an emulated warp.
#pragma once

inline float to_float(scalar x) {
#if DTYPE == F32
  return x;
#elif DTYPE == BF16
  return __uint_as_float(u32(x) << 16);
#else
  _Float16 y;
  memcpy(&y, &x, 2);
  return float(y);
#endif
}

inline scalar from_float(float x) {
#if DTYPE == F32
  return x;
#elif DTYPE == BF16
  u32 bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return u16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
#else
  const _Float16 y = _Float16(x);
  u16 bits;
  memcpy(&bits, &y, 2);
  return bits;
#endif
}

inline void wait_for_previous() { emulated::await_previous(); }
inline void let_next_start() {}
inline uint4 stream16(const void* p) { return *reinterpret_cast<const uint4*>(p); }
inline uint2 stream8(const void* p) { return *reinterpret_cast<const uint2*>(p); }
inline u32 stream4(const void* p) { return *reinterpret_cast<const u32*>(p); }
inline float4 load_l2(const float4* p) { return *p; }
inline float2 load_l2(const float2* p) { return *p; }
inline void fetch_l2(const void* p) { static_cast<void>(*static_cast<const volatile u8*>(p)); }
inline void store_once(float4* p, const float4& x) { *p = x; }
inline int add_release_acquire(int* p, int x) { return atomicAdd(p, x); }
inline float exp2_fast(float x) { return exp2f(x); }
inline float reciprocal_fast(float x) { return 1.0f / x; }
#define DYNAMIC_SHARED(name) u8* const name = emulated::block->dynamic_shared()
inline void copy16_async(void* to, const void* from, int bytes) {
  emulated::current->open.push_back({to, from, bytes, 16 - bytes});
}
template <int BYTES>
inline void copy_async(void* to, const void* from) {
  emulated::current->open.push_back({to, from, BYTES, 0});
}
inline void close_copies() {
  emulated::current->closed.push_back(std::move(emulated::current->open));
  emulated::current->open.clear();
}
template <int PENDING>
inline void wait_for_copies() {
  for (auto& groups = emulated::current->closed; groups.size() > PENDING; groups.pop_front())
    for (const emulated::Copy& one : groups.front()) {
      if (one.bytes) memcpy(one.to, one.from, size_t(one.bytes));
      memset(static_cast<u8*>(one.to) + one.bytes, 0, size_t(one.zeros));
    }
}

#if DTYPE != F32
inline u32 pack2(float low, float high) { return u32(from_float(low)) | u32(from_float(high)) << 16; }

inline void load_rows(u32 (&x)[4], const scalar* row, bool columns) {
  const u64 mine = u64(row);
  const emulated::Operands& all = emulated::exchange({{u32(mine), u32(mine >> 32)}});
  const int g = emulated::lane() / 4, c = emulated::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const auto value = [&](int r, int k) {
      const auto& words = all.of[8 * i + r];
      return u32(reinterpret_cast<const scalar*>(u64(words[0]) | u64(words[1]) << 32)[k]);
    };
    x[i] = columns ? value(2 * c, g) | value(2 * c + 1, g) << 16 : value(g, 2 * c) | value(g, 2 * c + 1) << 16;
  }
}
inline void load_matrices(u32 (&x)[4], const scalar* row) { load_rows(x, row, false); }
inline void load_columns(u32 (&x)[4], const scalar* row) { load_rows(x, row, true); }

inline u32 turned(u32 x) {
  const emulated::Operands& all = emulated::exchange({{x}});
  const int g = emulated::lane() / 4, c = emulated::lane() % 4;
  const auto value = [&](int row) { return all.of[4 * row + g / 2][0] >> (16 * (g % 2)) & 0xffff; };
  return value(2 * c) | value(2 * c + 1) << 16;
}

inline void mma(float& d0, float& d1, float& d2, float& d3, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  const emulated::Operands& all = emulated::exchange({{a0, a1, a2, a3, b0, b1}});
  const int lane = emulated::lane(), g = lane / 4, c = lane % 4;
  const auto half = [](u32 word, int which) { return to_float(scalar(word >> (16 * which))); };
  float* out[4] = {&d0, &d1, &d2, &d3};
  for (int i = 0; i < 4; ++i) {
    const int row = g + i / 2 * 8, column = 2 * c + i % 2;
    float sum = *out[i];
    for (int k = 0; k < 16; ++k) {
      const int from = k % 8 / 2;
      const float a = half(all.of[row % 8 * 4 + from][row / 8 + 2 * (k / 8)], k % 2);
      const float b = half(all.of[column * 4 + from][4 + k / 8], k % 2);
      sum += a * b;
    }
    *out[i] = sum;
  }
}
#endif
