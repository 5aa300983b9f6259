// Compute one layer of a step: write the keys and values, then attend with an online softmax.
//
// The tiling follows FlashAttention-2 (Dao, 2023), and the splitting of keys over threads follows flash-decoding (Dao et al.,
// 2023). The rows of a query tile are (query, head) pairs of one KV head, so a key is loaded once for all heads that share it.
#include "kernel.h"

#include <omp.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include <dovetail/pieces.h>

#include "tile.h"

namespace dovetail {
namespace {

// The buffers of one thread, for tiles of up to `rows` rows.
template <class E>
struct Scratch {
  typename E::operand_t *q, *p;  // [rows, D / pair], [rows, kLogitStride / pair]
  float *logits, *sums;          // [rows, kLogitStride], [rows, D]
  Softmax *state, *tile;         // [rows]
  Factors* factors;              // [rows]
  typename E::store_t* edges;    // [2, 16 * D]
  uint16_t* wide;                // [kTile * D]

  Scratch(char* memory, int rows, int head_size) {
    auto take = [&](int64_t bytes) { return std::exchange(memory, memory + (bytes + 63) / 64 * 64); };
    q = reinterpret_cast<typename E::operand_t*>(take(4LL * rows * head_size));
    logits = reinterpret_cast<float*>(take(4LL * rows * kLogitStride));
    // The softmax weights overwrite the logits if both have the same type.
    p = reinterpret_cast<typename E::operand_t*>(E::pair == 1 ? reinterpret_cast<char*>(logits) : take(2LL * rows * kLogitStride));
    sums = reinterpret_cast<float*>(take(4LL * rows * head_size));
    state = reinterpret_cast<Softmax*>(take(sizeof(Softmax) * rows));
    tile = reinterpret_cast<Softmax*>(take(sizeof(Softmax) * rows));
    factors = reinterpret_cast<Factors*>(take(sizeof(Factors) * rows));
    edges = reinterpret_cast<typename E::store_t*>(take(8LL * kGroup * head_size));
    wide = reinterpret_cast<uint16_t*>(take(2LL * kTile * head_size));
  }
};

template <class E>
class Worker {
 public:
  using store_t = typename E::store_t;
  using Wide = std::conditional_t<is_byte<E>, BF16, E>;
  using wide_t = typename Wide::store_t;

  Worker(const Step& step, const LayerArgs& layer, const Rows& q, const Cache& cache, const Rows& out, char* memory,
         float* partials)
      : step_(step), g_(step.geometry), layer_(layer), q_(q), out_(out), cache_(static_cast<store_t*>(cache.data)),
        partials_(partials), s_(memory, step.max_rows, step.geometry.head_size) {
    if constexpr (is_byte<E>) {
      layer_.scale *= E::unit * (layer.kv_scales ? layer.kv_scales[0] : 1.f);
      value_unit_ = E::unit * (layer.kv_scales ? layer.kv_scales[1] : 1.f);
    }
  }

  void attend(const Item& item) {
    const int rows = item.num_queries * g_.group();
    pack_queries(item);
    if (item.job < 0) {
      std::fill_n(s_.sums, static_cast<int64_t>(rows) * g_.head_size, 0.f);
      std::fill_n(s_.state, rows, Softmax{});
      for (int tile = item.tile_begin; tile < item.tile_end; ++tile) attend_tile(item, rows, tile, nullptr);
      finish(item, s_.sums, s_.state);
      return;
    }
    const Job& job = step_.jobs[item.job];
    for (int tile = item.tile_begin; tile < item.tile_end; ++tile)
      attend_tile(item, rows, tile, partial(job, tile));
  }

  // Merges the partial results of a query tile in the order in which a single item computes them.
  void merge_parts(const Job& job) {
    const int rows = job.all.num_queries * g_.group(), head_size = g_.head_size;
    std::fill_n(s_.sums, static_cast<int64_t>(rows) * head_size, 0.f);
    std::fill_n(s_.state, rows, Softmax{});
    for (int tile = job.all.tile_begin; tile < job.all.tile_end; ++tile) {
      const float* part = partial(job, tile);
      const auto* states = reinterpret_cast<const Softmax*>(part + static_cast<int64_t>(rows) * head_size);
      for (int r = 0; r < rows; ++r) {
        const Factors f = merge(s_.state[r], states[r]);
        for (int64_t d = static_cast<int64_t>(r) * head_size; d < static_cast<int64_t>(r + 1) * head_size; d += kLanes)
          store(s_.sums + d, merge(load(s_.sums + d), load(part + d), f));
      }
    }
    finish(job.all, s_.sums, s_.state);
  }

 private:
  // Returns the partial result of a key tile: [rows, D] sums, then [rows] softmax states.
  float* partial(const Job& job, int tile) const {
    const int64_t rows = static_cast<int64_t>(job.all.num_queries) * g_.group();
    return partials_ + job.partials + (tile - job.all.tile_begin) * rows * (g_.head_size + 2);
  }

  void pack_queries(const Item& item) {
    auto* packed = reinterpret_cast<std::conditional_t<E::pair == 1, float, uint16_t>*>(s_.q);
    for (int i = 0; i < item.num_queries; ++i)
      for (int h = 0; h < g_.group(); ++h, packed += g_.head_size) {
        const int64_t from = (item.token + i) * q_.token_stride + (item.head * g_.group() + h) * q_.head_stride;
        for (int d = 0; d < g_.head_size; d += kLanes) {
          const Vec x = load_as(q_.type, q_.data, from + d);
          if constexpr (E::pair == 1)
            store(packed + d, x);
          else
            store_bf16(packed + d, x);
        }
      }
  }

  void finish(const Item& item, const float* sums, const Softmax* state) {
    for (int i = 0, r = 0; i < item.num_queries; ++i)
      for (int h = 0; h < g_.group(); ++h, ++r) {
        const int head = item.head * g_.group() + h;
        write_out(sums + static_cast<int64_t>(r) * g_.head_size, state[r], layer_.sinks ? layer_.sinks + head : nullptr,
                  value_unit_, g_.head_size, out_, (item.token + i) * out_.token_stride + head * out_.head_stride);
      }
  }

  // Returns the keys [lo, hi) of a tile, counted from its start, that the query at `position` attends to. Empty if hi <= lo.
  std::pair<int, int> visible(int position, int tile) const {
    const int from = g_.window ? std::max(0, position - g_.window + 1) : 0;
    return {std::max(0, from - tile * kTile), std::min(kTile, position + 1 - tile * kTile)};
  }

  // Returns a copy of a group's values with zeros outside the tokens [lo, hi). The other slots are undefined and may hold NaN,
  // which a weight of zero would not remove.
  const store_t* clean(const store_t* values, int lo, int hi, store_t* copy) const {
    for (int t = 0; t < kGroup; t += E::pair)
      for (int d = 0; d < g_.head_size; ++d)
        for (int i = 0; i < E::pair; ++i) {
          const int at = (t / E::pair * g_.head_size + d) * E::pair + i;
          copy[at] = t + i >= lo && t + i < hi ? values[at] : store_t{0};
        }
    return copy;
  }

  // Converts groups of a one-byte type to the layout that BF16 loads, once for all blocks of rows instead of once per block.
  void widen(const store_t* const* groups, int begin, int end, const wide_t** wide) const {
    if constexpr (is_byte<E>) {
      const int count = kGroup * g_.head_size;
      for (int j = begin; j < end; ++j) {
        uint16_t* to = s_.wide + static_cast<int64_t>(j - begin) * count;
        wide[j] = to;
        for (int i = 0; i < count; i += kLanes * E::pair) {
          const auto x = E::load(groups[j] + i);
          if constexpr (E::pair == 1)
            store_bf16(to + i, x);
          else
            std::memcpy(to + i, &x, sizeof x);
        }
      }
    }
  }

  void attend_tile(const Item& item, int rows, int tile, float* part) {
    const int head_size = g_.head_size, group = g_.group(), steps = head_size / E::pair;
    const int last_position = item.position + item.num_queries - 1;
    const int lo = visible(item.position, tile).first, hi = visible(last_position, tile).second;
    const int begin = lo / kGroup, end = (hi + kGroup - 1) / kGroup;

    const store_t *keys[kGroupsPerTile + 8], *values[kGroupsPerTile];
    const int32_t* table = step_.block_table + item.row * step_.block_table_stride;
    const int64_t half = static_cast<int64_t>(g_.block_size) * head_size;
    for (int j = begin; j < end; ++j) {
      const int position = tile * kTile + j * kGroup;
      const int64_t block = table[position / g_.block_size];
      keys[j] = cache_ + (block * g_.num_kv_heads + item.head) * 2 * half + position % g_.block_size * head_size;
      values[j] = keys[j] + half;
    }
    for (int j = end; j < end + 8; ++j) keys[j] = keys[end - 1];  // padding of the last call: computed, not used
    if (lo % kGroup) values[begin] = clean(values[begin], lo % kGroup, hi - begin * kGroup, s_.edges);
    if (hi % kGroup && !(lo % kGroup && end - 1 == begin))
      values[end - 1] = clean(values[end - 1], 0, hi % kGroup, s_.edges + kGroup * head_size);

    // Registers hold up to kMaxRows rows. The numbers of rows of any two blocks differ by at most one.
    const int num_blocks = (rows + kMaxRows - 1) / kMaxRows;
    auto first_row = [&](int b) { return rows * b / num_blocks; };
    auto groups_of = [&](int b) {  // key groups that a block of rows attends to
      const int from = visible(item.position + first_row(b) / group, tile).first;
      const int to = visible(item.position + (first_row(b + 1) - 1) / group, tile).second;
      return std::pair{from / kGroup, (to + kGroup - 1) / kGroup};
    };
    auto for_blocks = [&](auto&& f) {
      for (int b = 0; b < num_blocks; ++b)
        with_rows(first_row(b + 1) - first_row(b), [&](auto m) { f(b, first_row(b), m); },
                  std::make_integer_sequence<int, kMaxRows>{});
    };

    const bool widens = is_byte<E> && num_blocks > 1;
    const wide_t *wide_keys[kGroupsPerTile + 8], *wide_values[kGroupsPerTile];
    constexpr int kChunk = 8;  // key groups that stay in L1 while all rows are computed
    for (int c = begin; c < end; c += kChunk) {
      const int chunk_end = std::min(c + kChunk, end);
      if (widens) {
        widen(keys, c, chunk_end, wide_keys);
        std::fill_n(wide_keys + chunk_end, 8, wide_keys[c]);
      }
      for_blocks([&](int b, int r, auto m) {
        constexpr int M = decltype(m)::value, N = wide(M);
        const auto [from, to] = groups_of(b);
        const int stop = std::min(chunk_end, to);
        for (int j = std::max(c, from); j < stop; j += N) {
          float* logits = s_.logits + r * kLogitStride + j * kGroup;
          if (widens)
            dot_keys<Wide, M, N>(s_.q + r * steps, steps, wide_keys + j, steps, stop - j, logits);
          else
            dot_keys<E, M, N>(s_.q + r * steps, steps, keys + j, steps, stop - j, logits);
        }
      });
    }

    for (int r = 0; r < rows; ++r) {
      const auto [from, to] = visible(item.position + r / group, tile);
      s_.tile[r] = exponentials<E>(s_.logits + r * kLogitStride, s_.p + r * (kLogitStride / E::pair), from, to, begin, end, layer_);
    }
    if (part)
      std::copy_n(s_.tile, rows, reinterpret_cast<Softmax*>(part + static_cast<int64_t>(rows) * head_size));
    else
      for (int r = 0; r < rows; ++r) s_.factors[r] = merge(s_.state[r], s_.tile[r]);

    if (widens) widen(values, begin, end, wide_values);
    float* sums = part ? part : s_.sums;
    const int vectors = head_size / kLanes;
    for (int d = 0; d < vectors; d += kChunk)
      for_blocks([&](int b, int r, auto m) {
        constexpr int M = decltype(m)::value, N = wide(M);
        const auto [from, to] = groups_of(b);
        const Factors* factors = part ? nullptr : s_.factors + r;
        auto weigh = [&](auto n, int at) {
          const auto* weights = s_.p + r * (kLogitStride / E::pair);
          constexpr int vectors_at_once = decltype(n)::value;
          const int first = std::max(from, begin), last = std::min(to, end);
          if (widens)
            weigh_values<Wide, M, vectors_at_once>(weights, wide_values, first, last, head_size, at * kLanes,
                                                   sums + r * head_size, factors);
          else
            weigh_values<E, M, vectors_at_once>(weights, values, first, last, head_size, at * kLanes, sums + r * head_size,
                                                factors);
        };
        int at = d;
        const int stop = std::min(vectors, d + kChunk);
        for (; at + N <= stop; at += N) weigh(std::integral_constant<int, N>{}, at);
        if constexpr (N > 4)
          if (at + 4 <= stop) weigh(std::integral_constant<int, 4>{}, at), at += 4;
        if constexpr (N > 2)
          if (at + 2 <= stop) weigh(std::integral_constant<int, 2>{}, at), at += 2;
        if (at < stop) weigh(std::integral_constant<int, 1>{}, at);
      });
  }

  const Step& step_;
  const Geometry g_;
  LayerArgs layer_;
  float value_unit_ = 1.f;
  const Rows &q_, &out_;
  const store_t* cache_;
  float* partials_;
  Scratch<E> s_;
};

}  // namespace

int64_t scratch_bytes(const Step& step) {
  const int64_t rows = step.max_rows, head_size = step.geometry.head_size;
  const int64_t bytes = rows * (8 * head_size + 6 * kLogitStride + 24) + (8 * kGroup + 2 * kTile) * head_size + 16 * 64;
  return (bytes + 4095) / 4096 * 4096;
}

int num_pieces(const Step& step, Phase phase) {
  switch (phase) {
    case Phase::write: return std::min(step.num_tokens, 4 * step.num_threads);
    case Phase::attend: return static_cast<int>(step.items.size());
    default: return static_cast<int>(step.jobs.size());
  }
}

void do_piece(const Step& step, const Layer& layer, Phase phase, int piece, int thread) {
  if (phase == Phase::write) {
    const int64_t n = step.num_tokens, pieces = num_pieces(step, phase);
    quantize_tokens(step.geometry, layer.cache, step.slots, layer.k, layer.v, layer.args.kv_scales, n * piece / pieces,
                    n * (piece + 1) / pieces);
    return;
  }
  auto* partials = reinterpret_cast<float*>(step.workspace + step.num_threads * scratch_bytes(step));
  with_element(layer.cache.type, [&](auto e) {
    char* scratch = step.workspace + thread * scratch_bytes(step);
    Worker<decltype(e)> worker(step, layer.args, layer.q, layer.cache, layer.out, scratch, partials);
    if (phase == Phase::attend)
      worker.attend(step.items[piece]);
    else
      worker.merge_parts(step.jobs[piece]);
  });
}

void run(const Step& step, const Layer& layer) {
  Pieces phases[3];
  const int num_threads = step.cost < kWorthThreads ? 1 : step.num_threads;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
  for (const Phase phase : {Phase::write, Phase::attend, Phase::merge})
    phases[static_cast<int>(phase)].work(num_pieces(step, phase), [&](int piece) {
      do_piece(step, layer, phase, piece, omp_get_thread_num());
    });
}

const char* instruction_set() {
#if defined(DOVETAIL_AVX512) && defined(__AVX512BF16__)
  return "AVX-512 with BF16";
#elif defined(DOVETAIL_AVX512)
  return "AVX-512";
#else
  return "AVX2";
#endif
}

}  // namespace dovetail
