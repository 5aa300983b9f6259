// Sixteen float32 lanes: one AVX-512 register, or two AVX2 registers. The rest of this folder is built on it.
//
// Multiply-adds are explicit, and the compiler must not contract others (-ffp-contract=off), so that a value does not depend on
// where an expression was inlined. Batch invariance relies on this.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <limits>

namespace dovetail {

constexpr int kLanes = 16;
constexpr float kInf = std::numeric_limits<float>::infinity();

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define DOVETAIL_AVX512 1

struct Vec {
  __m512 x;
};

inline Vec splat(float a) { return {_mm512_set1_ps(a)}; }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.x); }
inline Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.x, b.x)}; }
inline Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.x, b.x)}; }
inline Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.x, b.x)}; }
inline Vec div(Vec a, Vec b) { return {_mm512_div_ps(a.x, b.x)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.x, b.x, c.x)}; }
// If either operand is NaN, the second one is returned.
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.x, b.x)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.x, b.x)}; }
inline float reduce_add(Vec a) { return _mm512_reduce_add_ps(a.x); }
inline float reduce_max(Vec a) { return _mm512_reduce_max_ps(a.x); }

// Returns lanes [lo, hi) of a, and -inf elsewhere.
inline Vec keep(Vec a, int lo, int hi) {
  const uint32_t below_hi = hi >= kLanes ? 0xFFFFu : (1u << hi) - 1, below_lo = lo <= 0 ? 0u : (1u << lo) - 1;
  return {_mm512_mask_blend_ps(static_cast<__mmask16>(below_hi & ~below_lo), _mm512_set1_ps(-kInf), a.x)};
}

// Returns 2^n for an integer n in [-127, 127]; 0 for -127.
inline Vec power_of_two(Vec n) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.x), _mm512_set1_epi32(127)), 23))};
}
inline Vec round_even(Vec a) { return {_mm512_roundscale_ps(a.x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }

inline Vec load_bf16(const uint16_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline Vec load_f16(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
inline void store_f16(uint16_t* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void store_bf16(uint16_t* p, Vec a) {
#ifdef __AVX512BF16__
  const __m256bh narrow = _mm512_cvtneps_pbh(a.x);
  std::memcpy(p, &narrow, sizeof narrow);
#else
  const __m512i bits = _mm512_castps_si512(a.x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.x, a.x, _CMP_UNORD_Q);  // rounding must not turn NaN into infinity
  rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
#endif
}

#else  // AVX2, FMA, F16C

struct Vec {
  __m256 lo, hi;
};

inline Vec splat(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Vec a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
inline Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline Vec div(Vec a, Vec b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }

inline float reduce_add(Vec a) {
  const __m256 eight = _mm256_add_ps(a.lo, a.hi);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}
inline float reduce_max(Vec a) {
  const __m256 eight = _mm256_max_ps(a.lo, a.hi);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_shuffle_ps(four, four, 1)));
}

inline __m256 keep_eight(__m256 a, int lo, int hi) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i inside =
      _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(lo), lane), _mm256_cmpgt_epi32(_mm256_set1_epi32(hi), lane));
  return _mm256_blendv_ps(_mm256_set1_ps(-kInf), a, _mm256_castsi256_ps(inside));
}
inline Vec keep(Vec a, int lo, int hi) { return {keep_eight(a.lo, lo, hi), keep_eight(a.hi, lo - 8, hi - 8)}; }

inline __m256 power_of_two_eight(__m256 n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
inline Vec power_of_two(Vec n) { return {power_of_two_eight(n.lo), power_of_two_eight(n.hi)}; }
inline Vec round_even(Vec a) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, mode), _mm256_round_ps(a.hi, mode)};
}

inline __m256 load_bf16_eight(const uint16_t* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline Vec load_bf16(const uint16_t* p) { return {load_bf16_eight(p), load_bf16_eight(p + 8)}; }
inline Vec load_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
inline void store_f16(uint16_t* p, Vec a) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.lo, mode));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(a.hi, mode));
}
inline void store_bf16(uint16_t* p, Vec a) {
  uint32_t bits[kLanes];
  std::memcpy(bits, &a, sizeof bits);
  for (int i = 0; i < kLanes; ++i) {
    const bool nan = (bits[i] & 0x7FFFFFFFu) > 0x7F800000u;  // rounding must not turn NaN into infinity
    p[i] = nan ? 0x7FC0 : static_cast<uint16_t>((bits[i] + 0x7FFFu + ((bits[i] >> 16) & 1)) >> 16);
  }
}

#endif

// Returns 2^x for x <= 127, within 2 units in the last place; exactly 0 below -126.5 and for -inf; NaN for NaN.
inline Vec exp2(Vec x) {
  x = max(splat(-127.f), x);  // NaN is the second operand, so it is preserved
  const Vec whole = round_even(x), f = sub(x, whole);
  Vec y = splat(1.5403530e-4f);  // Taylor series of 2^f on [-1/2, 1/2]: ln(2)^k / k!
  y = fma(y, f, splat(1.3333558e-3f));
  y = fma(y, f, splat(9.6181291e-3f));
  y = fma(y, f, splat(5.5504109e-2f));
  y = fma(y, f, splat(2.4022651e-1f));
  y = fma(y, f, splat(6.9314718e-1f));
  y = fma(y, f, splat(1.f));
  return mul(y, power_of_two(whole));
}

inline float exp2(float x) {
  float lanes[kLanes];
  store(lanes, exp2(splat(x)));
  return lanes[0];
}

inline Vec tanh(Vec x) {
  constexpr float kTwoLog2E = 2.8853900817779268f;
  const Vec e = exp2(min(splat(126.f), mul(x, splat(kTwoLog2E))));
  return sub(splat(1.f), div(splat(2.f), add(e, splat(1.f))));
}

}  // namespace dovetail
