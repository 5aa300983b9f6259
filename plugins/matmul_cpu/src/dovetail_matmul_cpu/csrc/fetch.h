// What is fetched from memory while a chunk of codes is multiplied by some rows.
#pragma once

#include <dovetail/panels.h>
#include <immintrin.h>

#include <algorithm>
#include <cstdint>

namespace dovetail {

// While a block of rows is computed, its share of what comes next is fetched, so that memory and arithmetic work at a time.
struct Fetch {
  const uint8_t* next;
  int64_t rate, due = 0;  // lines a step, 16 bits after the point
  int64_t most = (rate + 0xFFFF) >> 16;

  // As many each time, some of them twice: a branch that is not foreseen costs more.
  void step(const uint8_t*, int64_t) {
    for (int64_t i = 0; i < most; ++i) _mm_prefetch(reinterpret_cast<const char*>(next + ((due >> 16) + i) * 64), _MM_HINT_T0);
    due += rate;
  }
};

// With few rows what counts is memory alone: of each of S chunks that are read side by side, what comes kAhead / S bytes later,
// and towards their ends what the S chunks after them begin with.
constexpr int64_t kAhead = 4096;
template <int S, int kBytes>
struct Ahead {
  int64_t steps, offset = kAhead / S, jump;

  explicit Ahead(int64_t chunk_bytes) : steps(std::max<int64_t>(0, chunk_bytes - offset) / kBytes), jump((S - 1) * chunk_bytes) {}
  void step(const uint8_t* codes, int64_t next) {
    if (steps-- == 0) offset += jump;
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s)
#pragma GCC unroll 8
      for (int line = 0; line < kBytes; line += 64)
        _mm_prefetch(reinterpret_cast<const char*>(codes + s * next + offset + line), _MM_HINT_T0);
  }
};

// Rows in blocks of at most B, and each one's share of the `bytes` to be fetched in `steps`. The same for all chunks: divisions
// take as long as many products.
template <int B>
struct Blocks {
  struct Block {
    int row, rows;
    int64_t from, rate;
  };
  Block blocks[(kMaxChunk + B - 1) / B];
  int count;

  Blocks(int num_rows, int64_t bytes, int64_t steps) : count((num_rows + B - 1) / B) {
    const int64_t lines = bytes / 64;
    for (int b = 0; b < count; ++b) {
      const int row = num_rows * b / count;
      const int64_t from = lines * b / count;
      blocks[b] = {row, num_rows * (b + 1) / count - row, from * 64, ((lines * (b + 1) / count - from) << 16) / steps};
    }
  }
};

}  // namespace dovetail
