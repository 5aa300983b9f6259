// The arithmetic of one key tile: logits, softmax, weighted values, and the merge with the tiles before it.
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>

#include <dovetail/element.h>

#include "kernel.h"

namespace dovetail {

constexpr float kLog2E = 1.4426950408889634f;
constexpr int kLogitStride = kTile + kLanes;  // not a power of two, so rows of a tile map to different cache sets
constexpr int kGroupsPerTile = kTile / kGroup;
#ifdef DOVETAIL_AVX512
constexpr int kMaxRows = 6;  // 6 rows × 4 vectors of sums, 4 operands and a broadcast fill the 32 registers
#else
constexpr int kMaxRows = 2;
#endif

// Returns the number of vectors per row that are computed at a time. Fewer rows use more vectors, for enough independent sums.
constexpr int wide(int rows) {
#ifdef DOVETAIL_AVX512
  return rows <= 3 ? 8 : 4;
#else
  return rows <= 1 ? 4 : 2;
#endif
}

// The running state of a softmax, in units of log2.
struct Softmax {
  float max = -kInf, sum = 0.f;
};

// The factors of the previous sums and of the tile's sums when a key tile is merged.
struct Factors {
  float before, tile;
};

inline Factors merge(Softmax& s, Softmax tile) {
  const float top = std::max(s.max, tile.max);
  const Factors f{s.max == -kInf ? 0.f : exp2(s.max - top), tile.max == -kInf ? 0.f : exp2(tile.max - top)};
  s.sum = __builtin_fmaf(s.sum, f.before, tile.sum * f.tile);
  s.max = top;
  return f;
}

inline Vec merge(Vec before, Vec tile, Factors f) { return fma(before, splat(f.before), mul(tile, splat(f.tile))); }

// logits[i][16 * j …] = q[i] · keys of group j, for M rows and N groups, of which the first `num_groups` are stored.
template <class E, int M, int N>
void dot_keys(const typename E::operand_t* q, int q_stride, const typename E::store_t* const* keys, int steps, int num_groups,
              float* logits) {
  Vec sums[M][N];
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j) sums[i][j] = splat(0.f);
  for (int d = 0; d < steps; ++d) {
    typename E::vec_t k[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) k[j] = E::load(keys[j] + d * kGroup * E::pair);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const auto a = E::splat(q[i * q_stride + d]);
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) sums[i][j] = E::dot(sums[i][j], a, k[j]);
    }
  }
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j)
      if (j < num_groups) store(logits + i * kLogitStride + j * kLanes, sums[i][j]);
}

// out[i][16 * j …] (+)= p[i] · values of the groups [begin, end), for M rows and N vectors of the head from dimension d.
template <class E, int M, int N>
void weigh_values(const typename E::operand_t* p, const typename E::store_t* const* values, int begin, int end, int head_size,
                  int d, float* out, const Factors* factors) {
  Vec sums[M][N];
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j) sums[i][j] = splat(0.f);
  for (int g = begin; g < end; ++g) {
    const auto* group = values[g] + d * E::pair;
    const auto* weights = p + g * kGroup / E::pair;
    for (int t = 0; t < kGroup / E::pair; ++t) {
      typename E::vec_t v[N];
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) v[j] = E::load(group + (t * head_size + j * kLanes) * E::pair);
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) {
        const auto a = E::splat(weights[i * (kLogitStride / E::pair) + t]);
#pragma GCC unroll 8
        for (int j = 0; j < N; ++j) sums[i][j] = E::dot(sums[i][j], a, v[j]);
      }
    }
  }
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j) {
      float* at = out + i * head_size + d + j * kLanes;
      store(at, factors ? merge(load(at), sums[i][j], factors[i]) : sums[i][j]);
    }
}

// Calls f with the constant `rows` in 1 … kMaxRows.
template <class F, int... I>
void with_rows(int rows, F&& f, std::integer_sequence<int, I...>) {
  (void)((rows == I + 1 && (f(std::integral_constant<int, I + 1>{}), true)) || ...);
}

// Computes the softmax weights `p` of one row of logits for the keys [lo, hi) of the tile, and zeros for the other keys of the
// groups [begin, end). Overwrites the logits.
template <class E>
Softmax exponentials(float* logits, typename E::operand_t* p, int lo, int hi, int begin, int end, const LayerArgs& layer) {
  auto* weights = reinterpret_cast<std::conditional_t<E::pair == 1, float, uint16_t>*>(p);
  auto put = [&](int g, Vec a) {
    if constexpr (E::pair == 1)
      store(weights + g * kGroup, a);
    else
      store_bf16(weights + g * kGroup, a);
  };
  if (hi <= lo) {
    for (int g = begin; g < end; ++g) put(g, splat(0.f));
    return {};
  }
  const int first = lo / kGroup, last = (hi + kGroup - 1) / kGroup;
  const bool capped = layer.soft_cap != 0.f;
  const Vec scale = splat(capped ? layer.scale / layer.soft_cap : layer.scale * kLog2E), cap = splat(layer.soft_cap * kLog2E);
  Vec tops = splat(-kInf);
  for (int g = first; g < last; ++g) {
    Vec x = mul(load(logits + g * kGroup), scale);
    if (capped) x = mul(tanh(x), cap);
    if (g == first || g == last - 1) x = keep(x, lo - g * kGroup, hi - g * kGroup);
    store(logits + g * kGroup, x);
    tops = max(x, tops);
  }
  Softmax s{reduce_max(tops), 0.f};
  const Vec top = splat(s.max == -kInf ? 0.f : s.max);
  Vec sum = splat(0.f);
  for (int g = begin; g < first; ++g) put(g, splat(0.f));
  for (int g = first; g < last; ++g) {
    const Vec x = exp2(sub(load(logits + g * kGroup), top));
    sum = add(sum, x);
    put(g, x);
  }
  for (int g = last; g < end; ++g) put(g, splat(0.f));
  s.sum = reduce_add(sum);
  return s;
}

// Normalizes sums of values, multiplies them by `unit` and stores them.
inline void write_out(const float* sums, Softmax s, const float* sink, float unit, int head_size, const Rows& out,
                      int64_t offset) {
  float factor;
  if (sink) {
    const float logit = *sink * kLog2E, top = std::max(s.max, logit), weight = exp2(s.max - top);
    factor = weight / __builtin_fmaf(s.sum, weight, exp2(logit - top));
  } else {
    factor = 1.f / s.sum;
  }
  factor *= unit;
  for (int d = 0; d < head_size; d += kLanes) store_as(out.type, out.data, offset + d, mul(load(sums + d), splat(factor)));
}

}  // namespace dovetail
