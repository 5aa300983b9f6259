// Prefetching of weights while a chunk of codes is multiplied by some rows.
#pragma once

#include <dovetail/panels.h>
#include <immintrin.h>

#include <algorithm>
#include <cstdint>

namespace dovetail {

// Prefetches a block of rows' share of the next chunks while the block is computed, so that memory accesses and arithmetic
// overlap.
struct Fetch {
  const uint8_t* next;
  int64_t rate, due = 0;  // cache lines per step, as fixed point with 16 fraction bits
  int64_t most = (rate + 0xFFFF) >> 16;

  // Every step prefetches the same number of lines, some of them twice, because a mispredicted branch costs more.
  void step(const uint8_t*, int64_t) {
    for (int64_t i = 0; i < most; ++i) _mm_prefetch(reinterpret_cast<const char*>(next + ((due >> 16) + i) * 64), _MM_HINT_T0);
    due += rate;
  }
};

// With few rows, memory bandwidth is the bottleneck. Each of S chunks that are read in parallel is prefetched kAhead / S bytes
// ahead, and near their ends the beginnings of the next S chunks.
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

// Rows in blocks of at most B, with each block's share of the `bytes` to prefetch in `steps`. It is computed once for all chunks,
// because a division takes as long as many products.
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
