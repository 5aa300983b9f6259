// Pack weights into panels, and prepare rows of x for the product.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <vector>

#include "matmul.h"

namespace dovetail {
namespace {

float element(Type type, const void* x, int64_t i) {
  if (type == Type::f32) return static_cast<const float*>(x)[i];
  const uint16_t bits = static_cast<const uint16_t*>(x)[i];
  if (type == Type::f16) return _cvtsh_ss(bits);
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float f;
  std::memcpy(&f, &wide, 4);
  return f;
}

// Loads chunk c of a row as float32, padded with zeros to whole vectors.
void gather(const Weight& w, const void* x, int64_t c, float* to) {
  const int64_t first = c * w.chunk, count = std::min(w.chunk, w.depth - first);
  int64_t k = 0;
  if (!w.order)
    with_element(w.type, [&](auto e) {
      const auto* from = static_cast<const typename decltype(e)::store_t*>(x) + first;
      for (; k + kLanes <= count; k += kLanes) store(to + k, e.widen16(from + k));
    });
  for (; k < count; ++k) to[k] = element(w.type, x, w.order ? w.order[first + k] : first + k);
  std::fill(to + count, to + (w.chunk_width() + kLanes - 1) / kLanes * kLanes, 0.f);
}

// Returns the largest magnitude, or NaN if there is one: without their signs, floats compare as integers, and NaN is the largest.
float largest(const float* values, int64_t count) {
  __m512i most = _mm512_setzero_si512();
  for (int64_t k = 0; k < count; k += kLanes)
    most = _mm512_max_epi32(most, _mm512_castps_si512(_mm512_abs_ps(load(values + k).x)));
  const int32_t bits = _mm512_reduce_max_epi32(most);
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// Rounds to the nearest E4M3 values (OCP 8-bit floating point: bias 7, no infinity) of magnitude at most 448; ties to even.
Vec round_e4m3(Vec a) {
  const Vec limited = max(splat(-448.f), min(splat(448.f), a));
  // The mantissa has three fraction bits. Below 2^-6, numbers are subnormal and the step is constant.
  const Vec exponent = max(splat(-6.f), Vec{_mm512_getexp_ps(limited.x)});
  const Vec step = power_of_two(sub(exponent, splat(3.f)));
  return mul(round_even(div(limited, step)), step);
}

// Returns the step size with which `most` is `steps` steps. It is 0 if all values are 0, and NaN if any value is not finite, so
// that the product is NaN too.
float step_of(float most, float steps) {
  if (most - most != 0) return NAN;
  return most / steps;
}
Vec divisor(float step) { return splat(step > 0 ? step : 1.f); }

// Writes chunk c as digits.
void write_digits(const Weight& w, const Rows& layout, const float* values, float step, int64_t c, char* row) {
  const int64_t wide = w.chunk_width();
  const bool two = w.num_parts() == 2;
  const float usable = step >= FLT_MIN ? step : 1;  // with smaller steps, all digits are zero
  const Vec by = splat(usable), times = splat(1 / usable), none = splat(0.f);
  const __m512i half = _mm512_set1_epi32(128), limit = _mm512_set1_epi32(127), lowest = _mm512_set1_epi32(-127);
  char* to = row + c * wide;
  __m512i sum = _mm512_setzero_si512();
  for (int64_t k = 0; k < wide; k += kLanes) {
    const Vec v = load(values + k);
    Vec q = mul(v, times);
    if (!two) q = fma(sub(none, fma(q, by, sub(none, v))), times, q);  // equals a division, and is faster
    __m512i n = _mm512_cvtps_epi32(q.x);
    if (!two) n = _mm512_max_epi32(lowest, _mm512_min_epi32(limit, n));
    sum = _mm512_add_epi32(sum, n);
    const __m512i first = two ? _mm512_srai_epi32(_mm512_add_epi32(n, half), 8) : n;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + k), _mm512_cvtepi32_epi8(first));
    if (two) _mm_storeu_si128(reinterpret_cast<__m128i*>(to + layout.part + k), _mm512_cvtepi32_epi8(n));
  }
  reinterpret_cast<float*>(row + layout.scales)[c] = step;
  const float zero = w.zeros ? 1 : static_cast<float>(w.zero);
  reinterpret_cast<float*>(row + layout.sums)[c] = -zero * static_cast<float>(_mm512_reduce_add_epi32(sum)) * step;
}

// Writes chunk c as bfloat16.
void write_floats(const Weight& w, const Rows& layout, const float* values, float step, int64_t c, char* row) {
  const int64_t wide = w.chunk_width();
  const Vec by = divisor(step);
  Vec sum = splat(0.f);
  for (int64_t k = 0; k < wide; k += kLanes) {
    Vec v = load(values + k);
    if (w.inputs == Inputs::float8) v = round_e4m3(div(v, by));
    auto* to = reinterpret_cast<uint16_t*>(row) + c * wide + k;
    store_bf16(to, v);
    Vec stands = load_bf16(to);
    if (w.num_parts() == 2) {
      auto* rest = reinterpret_cast<uint16_t*>(row + layout.part) + c * wide + k;
      store_bf16(rest, sub(v, stands));
      stands = add(stands, load_bf16(rest));
    }
    sum = add(sum, stands);
  }
  reinterpret_cast<float*>(row + layout.scales)[c] = step;
  reinterpret_cast<float*>(row + layout.sums)[c] = reduce_add(sum);
}

}  // namespace

void pack(const Weight& w, const uint8_t* codes) {
  const int64_t depth = w.depth, wide = w.chunk_width();
  const int64_t row_bytes = w.codes == Codes::uint4 ? (depth + 1) / 2 : depth;
#pragma omp parallel for schedule(static)
  for (int64_t panel = 0; panel < w.num_panels(); ++panel) {
    uint8_t* to = w.packed + panel * w.panel_bytes();
    for (int64_t n = 0; n < std::min<int64_t>(kPanel, w.num_outputs - panel * kPanel); ++n) {
      const uint8_t* from = codes + (panel * kPanel + n) * row_bytes;
      for (int64_t k = 0; k < depth; ++k) {
        const int64_t at = k / w.chunk * wide + k % w.chunk;  // with every chunk padded
        const uint8_t code = w.codes != Codes::uint4 ? from[k] : k % 2 ? from[k / 2] >> 4 : from[k / 2] & 15;
        if (w.is_integer()) {
          if (w.codes == Codes::int8)  // [k / 4][64][4], unsigned
            to[(at / 4 * kPanel + n) * 4 + at % 4] = code ^ 0x80;
          else  // [k / 8][64][4]: the first four in the low halves
            to[(at / 8 * kPanel + n) * 4 + at % 4] |= at % 8 < 4 ? code : code << 4;
          continue;
        }
        const int64_t vector = n / kLanes, pair = at / 2;
        if (w.codes == Codes::uint4) {
          // [k / 2][16 outputs][2 inputs] of 16 bits, with four bits for each of the four vectors of outputs.
          to[pair * 64 + (n % kLanes * 2 + at % 2) * 2 + vector / 2] |= code << vector % 2 * 4;
        } else {
          // [k / 2][2][64 bytes for two vectors of outputs]. Interleaving by 128-bit lanes returns the pairs in order: lane L
          // has 8 bytes of the first vector's outputs 4 L … 4 L + 3, then 8 of the second's.
          const int64_t place = vector / 2 * 64 + n % kLanes / 4 * 16 + vector % 2 * 8 + n % 4 * 2 + at % 2;
          to[pair * 128 + place] = w.codes == Codes::int8 ? code ^ 0x80 : code;
        }
      }
    }
  }
}

void prepare_row(const Weight& w, const void* x, void* row) {
  const Rows layout(w);
  const int64_t wide = w.chunk_width(), chunks = w.num_chunks();
  thread_local std::vector<float> buffer;
  buffer.resize((wide + kLanes - 1) / kLanes * kLanes);
  float* values = buffer.data();
  const float num_steps = w.num_steps();
  float step = 1;
  if (w.inputs != Inputs::plain) {  // one step for the whole row
    float most = 0;
    for (int64_t c = 0; c < chunks; ++c) {
      gather(w, x, c, values);
      const float here = largest(values, wide);
      most = here > most || here != here ? here : most;
    }
    const float own = step_of(most, w.is_integer() ? 127.f : 448.f);
    step = w.input_scale == 0 || own != own ? own : w.input_scale;
  }
  for (int64_t c = 0; c < chunks; ++c) {
    gather(w, x, c, values);
    if (w.is_integer()) {
      if (w.inputs == Inputs::plain) step = step_of(largest(values, wide), num_steps);
      write_digits(w, layout, values, step, c, static_cast<char*>(row));
    } else {
      write_floats(w, layout, values, step, c, static_cast<char*>(row));
    }
  }
}

}  // namespace dovetail
