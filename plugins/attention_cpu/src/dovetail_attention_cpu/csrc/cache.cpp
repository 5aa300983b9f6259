// Write tokens to the packed cache and read them from it. kernel.h documents the layout.
#include <algorithm>
#include <cstring>

#include <dovetail/element.h>

#include "kernel.h"

namespace dovetail {
namespace {

template <class E>
struct Place {  // addresses of the key and value of one token and head
  typename E::store_t *key, *value;
  int lane;  // token within its group

  Place(const Geometry& g, const Cache& cache, int64_t slot, int head) {
    const int64_t block = slot / g.block_size;
    const int offset = static_cast<int>(slot % g.block_size);
    const int64_t half = static_cast<int64_t>(g.block_size) * g.head_size;
    auto* base = static_cast<typename E::store_t*>(cache.data) + (block * g.num_kv_heads + head) * 2 * half;
    key = base + static_cast<int64_t>(offset / kGroup) * kGroup * g.head_size;
    value = key + half;
    lane = offset % kGroup;
  }
  typename E::store_t& key_at(int d) const { return key[(d / E::pair * kGroup + lane) * E::pair + d % E::pair]; }
  typename E::store_t& value_at(int d, int head_size) const {
    return value[(lane / E::pair * head_size + d) * E::pair + lane % E::pair];
  }
  // Each store writes a whole pair, or one half of every pair of a vector.
  void put_key(const typename E::store_t* row, int head_size) const {
    if constexpr (E::pair == 2)
      for (int d = 0; d < head_size; d += 2) std::memcpy(&key_at(d), row + d, 2 * sizeof *row);
    else
      for (int d = 0; d < head_size; ++d) key_at(d) = row[d];
  }
  void put_value(const typename E::store_t* row, int head_size) const {
#if defined(DOVETAIL_AVX512) && defined(__AVX512BF16__)
    if constexpr (E::pair == 2 && !is_byte<E>) {
      const bool odd = lane % 2;
      for (int d = 0; d < head_size; d += kLanes) {
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + d)));
        _mm512_mask_storeu_epi16(&value_at(d, head_size) - odd, odd ? 0xAAAAAAAAu : 0x55555555u,
                                 odd ? _mm512_slli_epi32(wide, 16) : wide);
      }
      return;
    }
#endif
    for (int d = 0; d < head_size; ++d) value_at(d, head_size) = row[d];
  }
};

// `prepare(x, which)` transforms keys (0) or values (1) before they are narrowed to the cache's type.
template <class E, class F>
void write(const Geometry& g, const Cache& cache, const int64_t* slots, Rows k, Rows v, int64_t begin, int64_t end, F&& prepare) {
  typename E::store_t row[256];
  for (int64_t t = begin; t < end; ++t)
    for (int h = 0; h < g.num_kv_heads; ++h) {
      const Place<E> at(g, cache, slots[t], h);
      for (int d = 0; d < g.head_size; d += kLanes)
        E::narrow16(row + d, prepare(load_as(k.type, k.data, t * k.token_stride + h * k.head_stride + d), 0));
      at.put_key(row, g.head_size);
      for (int d = 0; d < g.head_size; d += kLanes)
        E::narrow16(row + d, prepare(load_as(v.type, v.data, t * v.token_stride + h * v.head_stride + d), 1));
      at.put_value(row, g.head_size);
    }
}

template <class E>
void read(const Geometry& g, const Cache& cache, const int64_t* slots, Rows k, Rows v, int64_t begin, int64_t end) {
  typename E::store_t row[256];
  for (int64_t t = begin; t < end; ++t)
    for (int h = 0; h < g.num_kv_heads; ++h) {
      const Place<E> at(g, cache, slots[t], h);
      for (int d = 0; d < g.head_size; ++d) row[d] = at.key_at(d);
      for (int d = 0; d < g.head_size; d += kLanes)
        store_as(k.type, k.data, t * k.token_stride + h * k.head_stride + d, E::widen16(row + d));
      for (int d = 0; d < g.head_size; ++d) row[d] = at.value_at(d, g.head_size);
      for (int d = 0; d < g.head_size; d += kLanes)
        store_as(v.type, v.data, t * v.token_stride + h * v.head_stride + d, E::widen16(row + d));
    }
}

}  // namespace

void write_tokens(const Geometry& g, Cache cache, const int64_t* slots, Rows k, Rows v, int64_t begin, int64_t end) {
  with_element(cache.type,
               [&](auto e) { write<decltype(e)>(g, cache, slots, k, v, begin, end, [](Vec x, int) { return x; }); });
}

void quantize_tokens(const Geometry& g, Cache cache, const int64_t* slots, Rows k, Rows v, const float* kv_scales, int64_t begin,
                     int64_t end) {
  with_element(cache.type, [&](auto e) {
    using E = decltype(e);
    if constexpr (is_byte<E>) {
      const Vec scales[2] = {splat(kv_scales ? kv_scales[0] : 1.f), splat(kv_scales ? kv_scales[1] : 1.f)};
      const Vec low = splat(-E::largest), high = splat(E::largest);
      // NaN is the second operand of min and max, so it is propagated.
      auto limited = [&](Vec x, int which) { return max(low, min(high, div(x, scales[which]))); };
      write<E>(g, cache, slots, k, v, begin, end, limited);
    } else {
      write<E>(g, cache, slots, k, v, begin, end, [](Vec x, int) { return x; });
    }
  });
}

void read_tokens(const Geometry& g, Cache cache, const int64_t* slots, Rows k, Rows v, int64_t begin, int64_t end) {
  with_element(cache.type, [&](auto e) { read<decltype(e)>(g, cache, slots, k, v, begin, end); });
}

}  // namespace dovetail
