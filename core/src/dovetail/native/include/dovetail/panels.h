// GEMM with weights stored in panels of kPanel outputs: how rows and panels are assigned to threads, and how the sums of a panel
// become outputs.
#pragma once

#include <dovetail/element.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

namespace dovetail {

constexpr int kPanel = 64;      // outputs
constexpr int kVectors = kPanel / kLanes;
constexpr int kFewRows = 32;    // up to here the time of a layer is roughly that of reading its weights
constexpr int kMaxChunk = 192;  // rows of a piece: they fit into L2 with part of a panel and the sums

// Calls f with the number of rows as a compile-time constant.
template <class F, int... I>
void with_rows(int rows, F&& f, std::integer_sequence<int, I...>) {
  (void)((rows == I + 1 && (f(std::integral_constant<int, I + 1>{}), true)) || ...);
}

// Number of rows that are computed together; all chunks have about the same size.
inline int chunk_rows(int num_rows) {
  const int chunks = std::max(1, (num_rows + kMaxChunk - 1) / kMaxChunk);
  return std::max(1, (num_rows + chunks - 1) / chunks);
}

// How the panels of some rows are assigned. With few rows, each thread first takes one long stretch, which streams at memory
// bandwidth; the remaining panels are taken one by one, for load balance.
struct Hand {
  int64_t panels, stretch = 0;
  int num_stretches = 0;

  Hand(int64_t num_panels, int num_rows, int num_threads) : panels(num_panels) {
    if (num_rows > kFewRows) return;
    stretch = panels * 3 / 4 / num_threads;
    num_stretches = stretch > 1 ? num_threads : 0;
  }
  int pieces() const { return static_cast<int>(num_stretches + panels - num_stretches * stretch); }
  int64_t begin(int piece) const {
    return piece < num_stretches ? piece * stretch : num_stretches * stretch + piece - num_stretches;
  }
  int64_t end(int piece) const { return begin(piece) + (piece < num_stretches ? stretch : 1); }
};

// Number of pieces for all rows: all panels of some rows, then the next rows, so that consecutive pieces read adjacent weights.
inline int panel_pieces(int64_t num_panels, int num_rows, int num_threads) {
  const int chunk = chunk_rows(num_rows);
  return Hand(num_panels, num_rows, num_threads).pieces() * ((num_rows + chunk - 1) / chunk);
}

// Stores the outputs of one panel of a row, from its sums [kPanel], at y + `to`. `bias` is the panel's bias or null. Only the first
// `count` outputs of the panel exist.
inline void store_panel(Type type, void* y, int64_t to, float* sums, const float* bias, int64_t count) {
  if (bias)
    for (int j = 0; j < kPanel; j += kLanes) store(sums + j, add(load(sums + j), load(bias + j)));
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) store_as(type, y, to + j, load(sums + j));
  if (j < count) {  // do not write beyond the row's last output
    alignas(64) char last[kLanes * 4];
    store_as(type, last, 0, load(sums + j));
    const int64_t size = type == Type::f32 ? 4 : 2;
    std::memcpy(static_cast<char*>(y) + (to + j) * size, last, (count - j) * size);
  }
}

}  // namespace dovetail
