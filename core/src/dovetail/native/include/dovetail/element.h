// Number types: how sixteen values are stored, loaded and multiplied.
//
// `pair` is 2 if the CPU multiplies pairs of bfloat16 (vdpbf16ps): operands are then stored in pairs along the summed
// dimension. Otherwise it is 1, and storage is widened to float32 on load.
#pragma once

#include <dovetail/vec.h>

#include <algorithm>

namespace dovetail {

enum class Type : int { f32, bf16, f16, i8, f8 };

struct F32 {
  static constexpr int pair = 1;
  using store_t = float;
  using operand_t = float;
  using vec_t = Vec;
  static vec_t load(const store_t* p) { return dovetail::load(p); }
  static vec_t splat(operand_t a) { return dovetail::splat(a); }
  static Vec dot(Vec acc, vec_t a, vec_t b) { return fma(a, b, acc); }
  static Vec widen16(const store_t* p) { return dovetail::load(p); }
  static void narrow16(store_t* p, Vec a) { store(p, a); }
};

struct F16 : F32 {
  using store_t = uint16_t;
  static vec_t load(const store_t* p) { return load_f16(p); }
  static Vec widen16(const store_t* p) { return load_f16(p); }
  static void narrow16(store_t* p, Vec a) { store_f16(p, a); }
};

#if defined(DOVETAIL_AVX512) && defined(__AVX512BF16__)
struct BF16 {
  static constexpr int pair = 2;
  using store_t = uint16_t;
  using operand_t = uint32_t;  // two bfloat16
  using vec_t = __m512i;
  static vec_t load(const store_t* p) { return _mm512_loadu_si512(p); }
  static vec_t splat(operand_t a) { return _mm512_set1_epi32(static_cast<int>(a)); }
  static Vec dot(Vec acc, vec_t a, vec_t b) {
    return {_mm512_dpbf16_ps(acc.x, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b))};
  }
  static Vec widen16(const store_t* p) { return load_bf16(p); }
  static void narrow16(store_t* p, Vec a) { store_bf16(p, a); }
};
#else
struct BF16 : F32 {
  using store_t = uint16_t;
  static vec_t load(const store_t* p) { return load_bf16(p); }
  static Vec widen16(const store_t* p) { return load_bf16(p); }
  static void narrow16(store_t* p, Vec a) { store_bf16(p, a); }
};
#endif

#if defined(DOVETAIL_AVX512) && defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#define DOVETAIL_BYTE_TABLES 1

// Sign and magnitude of a byte to bfloat16, with tables for the 128 magnitudes: first their low bytes, then their high bytes.
struct ByteTable {
  alignas(64) uint8_t at[256] = {};
  template <class F>
  constexpr explicit ByteTable(F&& bits_of) {
    for (int i = 0; i < 128; ++i) at[i] = bits_of(i) & 0xFF, at[128 + i] = bits_of(i) >> 8;
  }
};

// The bits of `number` * 2^exponent as bfloat16.
constexpr int bf16_bits(int number, int exponent) {
  if (number == 0) return 0;
  int top = 0;
  while (number >> (top + 1)) ++top;
  return (127 + exponent + top) << 7 | (number - (1 << top)) << (7 - top);
}

struct BytePairs {
  alignas(64) uint8_t at[64] = {};
  constexpr BytePairs() {
    for (int i = 0; i < 64; ++i) at[i] = static_cast<uint8_t>(i / 2);
  }
};
inline constexpr BytePairs kBytePairs;

// Converts 32 bytes to 32 bfloat16. `has_two_complement` is for int8; otherwise the first bit is the sign.
template <bool has_two_complement>
__m512i load_bytes(const void* p, const ByteTable& table) {
  auto row = [&](int i) { return _mm512_load_si512(table.at + 64 * i); };
  const __m512i bytes = _mm512_castsi256_si512(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
  const __m512i pairs = _mm512_permutexvar_epi8(_mm512_load_si512(kBytePairs.at), bytes);
  const __m512i size = has_two_complement ? _mm512_abs_epi8(pairs) : pairs;  // only 7 bits count
  const __m512i low = _mm512_permutex2var_epi8(row(0), size, row(1)), high = _mm512_permutex2var_epi8(row(2), size, row(3));
  const __m512i both = _mm512_mask_mov_epi8(low, 0xAAAAAAAAAAAAAAAAull, high);
  return _mm512_ternarylogic_epi32(both, pairs, _mm512_set1_epi16(static_cast<short>(0x8000)), 0xF8);  // both | pairs & sign
}
#endif

// One-byte types. Sums of loaded operands must be multiplied by `unit`; stored values are limited to ±`largest`.
struct I8 : BF16 {
  static constexpr float unit = 1.f, largest = 127.f;
  using store_t = int8_t;
  static Vec widen16(const store_t* p) {
    float x[kLanes];
    for (int i = 0; i < kLanes; ++i) x[i] = p[i];
    return dovetail::load(x);
  }
  static void narrow16(store_t* p, Vec a) {
    int32_t x[kLanes];
    a = round_even(a);
    float rounded[kLanes];
    store(rounded, a);
    for (int i = 0; i < kLanes; ++i) x[i] = rounded[i] == rounded[i] ? static_cast<int32_t>(rounded[i]) : 0;
    for (int i = 0; i < kLanes; ++i) p[i] = static_cast<store_t>(x[i]);
  }
#if defined(DOVETAIL_BYTE_TABLES)
  static constexpr ByteTable table{[](int size) { return bf16_bits(size, 0); }};
  static vec_t load(const store_t* p) { return load_bytes<true>(p, table); }
#elif defined(DOVETAIL_AVX512) && defined(__AVX512BF16__)
  static vec_t load(const store_t* p) {
    const __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    auto half = [](__m256i x) { return _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(x)); };
    return reinterpret_cast<__m512i>(
        _mm512_cvtne2ps_pbh(half(_mm512_extracti64x4_epi64(wide, 1)), half(_mm512_castsi512_si256(wide))));
  }
#else
  static vec_t load(const store_t* p) { return widen16(p); }
#endif
};

// E4M3: sign, 4 bits of exponent (bias 7), 3 bits of mantissa; no infinity, all ones are NaN. With the exponent in the place of a
// float16's, the value is 2^-8 of the number, subnormal numbers included.
struct F8 : BF16 {
  static constexpr float unit = 256.f, largest = 448.f;
  using store_t = uint8_t;
  static void as_f16(const store_t* p, uint16_t* x) {
    for (int i = 0; i < kLanes; ++i) {
      const uint16_t bits = static_cast<uint16_t>((p[i] & 0x80) << 8 | (p[i] & 0x7F) << 7);
      x[i] = (p[i] & 0x7F) == 0x7F ? static_cast<uint16_t>(0x7E00) : bits;
    }
  }
  static Vec widen16(const store_t* p) {
    uint16_t x[kLanes];
    as_f16(p, x);
    return mul(load_f16(x), dovetail::splat(unit));
  }
  static void narrow16(store_t* p, Vec a) {
    float x[kLanes];
    store(x, a);
    for (int i = 0; i < kLanes; ++i) {
      uint32_t bits;
      std::memcpy(&bits, &x[i], sizeof bits);
      const uint32_t size = bits & 0x7FFFFFFFu;
      const float steps = std::min(__builtin_fabsf(x[i]), 1.f) * 512.f + 8388608.f;  // of a subnormal's 2^-9; the sum rounds
      uint32_t small;
      std::memcpy(&small, &steps, sizeof small);
      const uint32_t normal = (size + 0x7FFFFu + (size >> 20 & 1)) / (1u << 20) - (120u << 3);
      const uint32_t code = size > 0x7F800000u ? 0x7Fu : size < (121u << 23) ? small & 0xFFu : normal;
      p[i] = static_cast<store_t>(code | bits >> 31 << 7);
    }
  }
#if defined(DOVETAIL_BYTE_TABLES)
  static constexpr ByteTable table{[](int size) {
    return size == 0x7F ? 0x7FC0 : size < 8 ? bf16_bits(size, -17) : bf16_bits(8 + size % 8, size / 8 - 18);
  }};
  static vec_t load(const store_t* p) { return load_bytes<false>(p, table); }
#elif defined(DOVETAIL_AVX512) && defined(__AVX512BF16__)
  static vec_t load(const store_t* p) {
    const __m512i wide = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    const __m512i size = _mm512_and_si512(wide, _mm512_set1_epi16(0x7F));
    const __mmask32 nan = _mm512_cmpeq_epi16_mask(size, _mm512_set1_epi16(0x7F));
    const __m512i sign = _mm512_slli_epi16(_mm512_andnot_si512(_mm512_set1_epi16(0x7F), wide), 8);
    const __m512i bits = _mm512_or_si512(sign, _mm512_slli_epi16(size, 7));
    const __m512i halves = _mm512_mask_blend_epi16(nan, bits, _mm512_set1_epi16(0x7E00));
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1)),
                                                         _mm512_cvtph_ps(_mm512_castsi512_si256(halves))));
  }
#else
  static vec_t load(const store_t* p) {
    uint16_t x[kLanes];
    as_f16(p, x);
    return load_f16(x);
  }
#endif
};

template <class E>
constexpr bool is_byte = sizeof(typename E::store_t) == 1;

// Loads sixteen values of any of the types as float32.
inline Vec load_as(Type type, const void* base, int64_t offset) {
  switch (type) {
    case Type::i8: return I8::widen16(static_cast<const int8_t*>(base) + offset);
    case Type::f8: return F8::widen16(static_cast<const uint8_t*>(base) + offset);
    case Type::f32: return load(static_cast<const float*>(base) + offset);
    case Type::bf16: return load_bf16(static_cast<const uint16_t*>(base) + offset);
    default: return load_f16(static_cast<const uint16_t*>(base) + offset);
  }
}

inline void store_as(Type type, void* base, int64_t offset, Vec a) {
  switch (type) {
    case Type::i8: return I8::narrow16(static_cast<int8_t*>(base) + offset, a);
    case Type::f8: return F8::narrow16(static_cast<uint8_t*>(base) + offset, a);
    case Type::f32: return store(static_cast<float*>(base) + offset, a);
    case Type::bf16: return store_bf16(static_cast<uint16_t*>(base) + offset, a);
    default: return store_f16(static_cast<uint16_t*>(base) + offset, a);
  }
}

// Calls f with the element type.
template <class F>
void with_element(Type type, F&& f) {
  switch (type) {
    case Type::f32: return f(F32{});
    case Type::bf16: return f(BF16{});
    case Type::i8: return f(I8{});
    case Type::f8: return f(F8{});
    default: return f(F16{});
  }
}

// Calls f with the element type: those that compiled steps compute in.
template <class F>
void with_type(Type type, F&& f) {
  if (type == Type::f32)
    f(F32{});
  else
    f(BF16{});
}

}  // namespace dovetail
