// Number formats and vectors: one float vector type `Vec` of `kLanes` lanes with AVX-512 or AVX2 beneath.
//
// Every kernel loads bf16, fp16 or fp32, computes in fp32 and rounds once when it stores.
// `Dot<T>` is the multiply-add of long products: AVX512-BF16's pair products where the CPU has them.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace llmfw {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

inline float to_float(float value) { return value; }
inline float to_float(fp16 value) { return _cvtsh_ss(value.bits); }
inline float to_float(bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

// Round half to even, as torch does; a NaN stays a quiet NaN.
inline uint16_t bf16_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (value != value) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void put(float* out, float value) { *out = value; }
inline void put(bf16* out, float value) { out->bits = bf16_bits(value); }
inline void put(fp16* out, float value) { out->bits = static_cast<uint16_t>(_cvtss_sh(value, 0)); }

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define LLMFW_AVX512 1
using Vec = __m512;
constexpr int64_t kLanes = 16;

inline Vec set1(float value) { return _mm512_set1_ps(value); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec vmax(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec vmin(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec round_int(Vec a) { return _mm512_roundscale_ps(a, 0); }
inline Vec times_power_of_2(Vec a, Vec n) { return _mm512_scalef_ps(a, n); }
inline float sum(Vec a) { return _mm512_reduce_add_ps(a); }

inline __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
inline Vec widen(__m256i half, bf16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
inline Vec widen(__m256i half, fp16) { return _mm512_cvtph_ps(half); }
inline __m256i narrow(Vec a, fp16) { return _mm512_cvtps_ph(a, 0); }
inline __m256i narrow(Vec a, bf16) {
#ifdef __AVX512BF16__
  return (__m256i)_mm512_cvtneps_pbh(a);
#else
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
#endif
}

inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec load_n(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a); }
inline void store_n(float* p, Vec a, int64_t n) { _mm512_mask_storeu_ps(p, first(n), a); }
template <class T>
Vec load(const T* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T{});
}
template <class T>
Vec load_n(const T* p, int64_t n) {
  return widen(_mm256_maskz_loadu_epi16(first(n), p), T{});
}
template <class T>
void store(T* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a, T{}));
}
template <class T>
void store_n(T* p, Vec a, int64_t n) {
  _mm256_mask_storeu_epi16(p, first(n), narrow(a, T{}));
}

// The sums of four vectors, as the four lanes of one.
inline __m128 sum4(Vec a, Vec b, Vec c, Vec d) {
  const Vec ab = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
  const Vec cd = _mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d);
  const Vec all = _mm512_shuffle_ps(ab, cd, 0x44) + _mm512_shuffle_ps(ab, cd, 0xee);
  const __m256 half = _mm512_castps512_ps256(all) + _mm512_extractf32x8_ps(all, 1);
  return _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1);
}

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
using Vec = __m256;
constexpr int64_t kLanes = 8;

inline Vec set1(float value) { return _mm256_set1_ps(value); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec vmax(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec vmin(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline Vec round_int(Vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec times_power_of_2(Vec a, Vec n) {
  const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return a * _mm256_castsi256_ps(power);
}

inline Vec widen(__m128i half, bf16) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
inline Vec widen(__m128i half, fp16) { return _mm256_cvtph_ps(half); }
inline __m128i narrow(Vec a, fp16) { return _mm256_cvtps_ph(a, 0); }
inline __m128i narrow(Vec a, bf16) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan);
  rounded = _mm256_srli_epi32(rounded, 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}

inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a); }
template <class T>
Vec load(const T* p) {
  return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), T{});
}
template <class T>
void store(T* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(a, T{}));
}
template <class T>
Vec load_n(const T* p, int64_t n) {
  T part[kLanes] = {};
  std::memcpy(part, p, n * sizeof(T));
  return load(part);
}
template <class T>
void store_n(T* p, Vec a, int64_t n) {
  T part[kLanes];
  store(part, a);
  std::memcpy(p, part, n * sizeof(T));
}

inline __m128 sum4(Vec a, Vec b, Vec c, Vec d) {
  const Vec all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm256_castps256_ps128(all) + _mm256_extractf128_ps(all, 1);
}
inline float sum(Vec a) { return _mm_cvtss_f32(sum4(a, a, a, a)); }
#else
#error "the CPU kernels need AVX2, FMA and F16C"
#endif

// Four numbers at once, the sums of a product's tile.
inline __m128 load4(const float* p) { return _mm_loadu_ps(p); }
inline __m128 load4(const fp16* p) { return _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))); }
inline __m128 load4(const bf16* p) {
  const __m128i bits = _mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return _mm_castsi128_ps(_mm_slli_epi32(bits, 16));
}
inline void store4(float* p, __m128 a) { _mm_storeu_ps(p, a); }
inline void store4(fp16* p, __m128 a) { _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_cvtps_ph(a, 0)); }
inline void store4(bf16* p, __m128 a) {
#ifdef __AVX512BF16__
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), (__m128i)_mm_cvtneps_pbh(a));
#else
  const __m128i bits = _mm_castps_si128(a);
  const __m128i odd = _mm_and_si128(_mm_srli_epi32(bits, 16), _mm_set1_epi32(1));
  __m128i rounded = _mm_add_epi32(bits, _mm_add_epi32(odd, _mm_set1_epi32(0x7fff)));
  const __m128i nan = _mm_castps_si128(_mm_cmpunord_ps(a, a));
  rounded = _mm_srli_epi32(_mm_blendv_epi8(rounded, _mm_set1_epi32(0x7fc00000), nan), 16);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(rounded, rounded));
#endif
}

// Calls step(first element, vector of up to kLanes) for all of [0, n): `full` without, `rest` with a count.
template <class Full, class Rest>
inline void each_vec(int64_t n, Full&& full, Rest&& rest) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) full(i);
  if (i < n) rest(i, n - i);
}

// The value as a T would hold it.
inline Vec rounded(Vec a, float) { return a; }
template <class T>
Vec rounded(Vec a, T) {
  return widen(narrow(a, T{}), T{});
}

// e^x to 2 units in the last place; below -87 it gives the least normal number's neighbourhood, not 0.
inline Vec exp(Vec x) {
  x = vmin(vmax(x, set1(-87.3f)), set1(88.3f));
  const Vec n = round_int(x * set1(1.44269504f));
  Vec r = fma(n, set1(-0.693359375f), x);
  r = fma(n, set1(2.12194440e-4f), r);
  Vec p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, r * r, r + set1(1.0f));
  return times_power_of_2(p, n);
}

inline Vec tanh(Vec x) {
  x = vmin(vmax(x, set1(-15.0f)), set1(15.0f));
  return set1(1.0f) - set1(2.0f) / (exp(x + x) + set1(1.0f));
}

// Products of T, summed in fp32.
template <class T>
struct Dot {
  using Reg = Vec;
  static constexpr int64_t kStep = kLanes;
  static Reg load(const T* p) { return llmfw::load(p); }
  static Reg load_n(const T* p, int64_t n) { return llmfw::load_n(p, n); }
  static Vec add(Vec acc, Reg a, Reg b) { return fma(a, b, acc); }
};

#ifdef __AVX512BF16__
template <>
struct Dot<bf16> {
  using Reg = __m512bh;
  static constexpr int64_t kStep = 32;
  static Reg load(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static Reg load_n(const bf16* p, int64_t n) {
    return (__m512bh)_mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << n) - 1), p);
  }
  static Vec add(Vec acc, Reg a, Reg b) { return _mm512_dpbf16_ps(acc, a, b); }
};
#endif

}  // namespace llmfw
