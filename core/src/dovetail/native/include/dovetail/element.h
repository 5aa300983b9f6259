// Number types: how sixteen values are stored, loaded, and multiplied.
//
// `pair` is 2 where the CPU multiplies pairs of bfloat16 (vdpbf16ps): operands then lie in pairs along the summed
// dimension. Elsewhere it is 1, with storage widened to float32 on load.
#pragma once

#include <dovetail/vec.h>

namespace dovetail {

enum class Type : int { f32, bf16, f16 };

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

// Sixteen values of any of the types, as float32.
inline Vec load_as(Type type, const void* base, int64_t offset) {
  switch (type) {
    case Type::f32: return load(static_cast<const float*>(base) + offset);
    case Type::bf16: return load_bf16(static_cast<const uint16_t*>(base) + offset);
    default: return load_f16(static_cast<const uint16_t*>(base) + offset);
  }
}

inline void store_as(Type type, void* base, int64_t offset, Vec a) {
  switch (type) {
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
    default: return f(F16{});
  }
}

}  // namespace dovetail
