#include "linear.h"

#include <algorithm>
#include <utility>

namespace dovetail {
namespace {

#ifdef DOVETAIL_AVX512
constexpr int kMaxRows = 6;  // 6 rows × 4 vectors of sums, 4 operands and a broadcast fill the 32 registers
#else
constexpr int kMaxRows = 1;
#endif

// Inputs between two visits of the same rows. With few rows that part of a panel stays in L1, with many in L2, and the sums
// are visited less often.
constexpr int kShallow = 128, kDeep = 512;

// The operand that every lane is multiplied with, from a row of x.
template <class E>
auto operand(const typename E::store_t* x) {
  if constexpr (E::pair == 2) {
    uint32_t two;
    std::memcpy(&two, x, 4);
    return E::splat(two);
  } else if constexpr (sizeof(typename E::store_t) == 2) {
    const uint32_t bits = static_cast<uint32_t>(*x) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return E::splat(f);
  } else {
    return E::splat(*x);
  }
}

// sums[M][64] (+)= x[M] · panel over `steps` steps of `pair` inputs. `prefetch` lines of what comes next are fetched on the way.
template <class E, int M>
void multiply(const typename E::store_t* x, int64_t x_stride, const typename E::store_t* panel, int steps, bool first, float* sums,
              const char* next, int64_t next_lines) {
  Vec s[M][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) s[i][j] = first ? splat(0.f) : load(sums + i * kPanel + j * kLanes);
  const int64_t rate = (next_lines << 16) / steps;  // lines a step, 16 bits after the point
  int64_t fetched = 0, due = 0;
  for (int k = 0; k < steps; ++k) {
    typename E::vec_t w[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) w[j] = E::load(panel + (k * kPanel + j * kLanes) * E::pair);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const auto a = operand<E>(x + i * x_stride + k * E::pair);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) s[i][j] = E::dot(s[i][j], a, w[j]);
    }
    for (due += rate; fetched < due >> 16; ++fetched) _mm_prefetch(next + fetched * 64, _MM_HINT_T0);
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) store(sums + i * kPanel + j * kLanes, s[i][j]);
}

// The sums [rows, 64] of one panel. Depth outermost: a panel is read once from memory, and while rows are computed with a
// part of it, the next part is fetched, of this panel or of the one that this thread is likely to take next.
template <class E>
void panel_sums(const typename E::store_t* x, int64_t x_stride, int rows, const typename E::store_t* panel,
                const typename E::store_t* next_panel, int64_t depth, float* sums) {
  const int num_blocks = (rows + kMaxRows - 1) / kMaxRows;
  const int64_t stride = rows > kMaxRows && rows <= kFewRows ? kShallow : kDeep;
  for (int64_t k = 0; k < depth; k += stride) {
    const int64_t part = std::min(stride, depth - k), bytes = part * kPanel * sizeof(typename E::store_t);
    const bool last = k + stride >= depth;
    const char* next = reinterpret_cast<const char*>(last ? next_panel : panel + (k + part) * kPanel);
    for (int b = 0; b < num_blocks; ++b) {
      const int row = rows * b / num_blocks, end = rows * (b + 1) / num_blocks;
      // Each block of rows fetches its share of the next part.
      const int64_t lines = bytes / 64, from = lines * b / num_blocks, to = lines * (b + 1) / num_blocks;
      with_rows(end - row, [&](auto m) {
        multiply<E, decltype(m)::value>(x + row * x_stride + k, x_stride, panel + k * kPanel, static_cast<int>(part / E::pair),
                                        k == 0, sums + row * kPanel, next + from * 64, to - from);
      }, std::make_integer_sequence<int, kMaxRows>{});
    }
  }
}

#ifdef DOVETAIL_AMX
// As above, 32 rows and 32 outputs at a time.
void panel_sums_amx(const uint16_t* x, int64_t x_stride, int rows, const uint16_t* panel, int64_t depth, float* sums) {
  constexpr int64_t row_bytes = kPanel * 4;  // of packed weights: a pair of each output
  for (int row = 0; row < rows; row += 32) {
    const int first = std::min(16, rows - row), more = std::clamp(rows - row - 16, 0, 16);
    configure(TileConfig(first, more));
    const uint16_t *a = x + row * x_stride, *b = a + 16 * x_stride;
    for (int half = 0; half < 2; ++half) {
      float* out = sums + row * kPanel + half * 32;
      tile_zero<0>(), tile_zero<1>();
      if (more) tile_zero<2>(), tile_zero<3>();
      for (int64_t k = 0; k < depth; k += kUnitK) {
        const char* w = reinterpret_cast<const char*>(panel + k * kPanel) + half * 128;
        tile_load<4>(a + k, 2 * x_stride);
        tile_load<6>(w, row_bytes);
        tile_load<7>(w + 64, row_bytes);
        tile_dot<0, 4, 6>(), tile_dot<1, 4, 7>();
        if (more) {
          tile_load<5>(b + k, 2 * x_stride);
          tile_dot<2, 5, 6>(), tile_dot<3, 5, 7>();
        }
      }
      tile_store<0>(out, row_bytes), tile_store<1>(out + 16, row_bytes);
      if (more) tile_store<2>(out + 16 * kPanel, row_bytes), tile_store<3>(out + 16 * kPanel + 16, row_bytes);
    }
  }
  release_tiles();
}
#endif

template <class E>
void compute(const Linear& linear, const LinearCall& call, int row, int rows, int64_t panel, int64_t next_panel) {
  using store_t = typename E::store_t;
  alignas(64) float sums[kMaxChunk * kPanel];
  const auto* x = static_cast<const store_t*>(call.x) + row * call.x_stride;
  const auto* weight = static_cast<const store_t*>(linear.weight) + panel * linear.panel_elements();
  const auto* next = static_cast<const store_t*>(linear.weight) + next_panel * linear.panel_elements();
  bool done = false;
#ifdef DOVETAIL_AMX
  if constexpr (E::pair == 2)
    if (amx_allowed()) panel_sums_amx(x, call.x_stride, rows, weight, linear.padded_depth(), sums), done = true;
#endif
  if (!done) panel_sums<E>(x, call.x_stride, rows, weight, next, linear.padded_depth(), sums);
  const int64_t first = panel * kPanel, count = std::min<int64_t>(kPanel, linear.num_outputs - first);
  const float* bias = linear.bias ? linear.bias + first : nullptr;
  for (int r = 0; r < rows; ++r) store_panel(call.y_type, call.y, (row + r) * call.y_stride + first, sums + r * kPanel, bias, count);
}

}  // namespace

int64_t weight_bytes(const Linear& linear) {
  return linear.num_panels() * linear.panel_elements() * (linear.type == Type::f32 ? 4 : 2);
}

void pack(const Linear& linear, const void* rows, int64_t stride, int64_t first, int64_t count) {
  with_type(linear.type, [&](auto e) {
    using E = decltype(e);
    using store_t = typename E::store_t;
    auto* weight = static_cast<store_t*>(linear.weight);
    const auto* from = static_cast<const store_t*>(rows);
#pragma omp parallel for schedule(static)
    for (int64_t panel = first / kPanel; panel < (first + count + kPanel - 1) / kPanel; ++panel) {
      const int64_t begin = std::max(first, panel * kPanel), end = std::min(first + count, (panel + 1) * kPanel);
      auto* to = weight + panel * linear.panel_elements();
      // Some inputs of all the panel's outputs at a time: both sides stay in L1.
      for (int64_t k = 0; k < linear.depth; k += kUnitK)
        for (int64_t n = begin; n < end; ++n)
          for (int64_t i = k; i < std::min(k + kUnitK, linear.depth); ++i)
            to[(i / E::pair * kPanel + n % kPanel) * E::pair + i % E::pair] = from[(n - first) * stride + i];
    }
  });
}

void unpack_row(const Linear& linear, int64_t row, void* out) {
  with_type(linear.type, [&](auto e) {
    using E = decltype(e);
    auto* to = static_cast<typename E::store_t*>(out);
    const auto* from = static_cast<const typename E::store_t*>(linear.weight) + row / kPanel * linear.panel_elements();
    for (int64_t i = 0; i < linear.depth; ++i) to[i] = from[(i / E::pair * kPanel + row % kPanel) * E::pair + i % E::pair];
  });
}

int num_pieces(const Linear& linear, int num_rows, int num_threads) {
  return panel_pieces(linear.num_panels(), num_rows, num_threads);
}

void do_piece(const Linear& linear, const LinearCall& call, int num_rows, int piece, int num_threads) {
  const Hand hand(linear.num_panels(), num_rows, num_threads);
  const int chunk = chunk_rows(num_rows), pieces = hand.pieces(), part = piece % pieces;
  const int row = piece / pieces * chunk, rows = std::min(chunk, num_rows - row);
  const int likely = part < hand.num_stretches ? hand.num_stretches + part : part + num_threads;
  with_type(linear.type, [&](auto e) {
    for (int64_t panel = hand.begin(part), end = hand.end(part); panel < end; ++panel)
      compute<decltype(e)>(linear, call, row, rows, panel, panel + 1 < end ? panel + 1 : hand.begin(likely) % hand.panels);
  });
}

}  // namespace dovetail
