// Intel AMX: tiles of 16 rows of 64 bytes, and the product of bfloat16 tiles that adds up in float32.
//
// With DOVETAIL_EMULATE_AMX the tiles are arrays, so that what is built on them can be tested on any CPU.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(DOVETAIL_EMULATE_AMX)
#define DOVETAIL_AMX 1
#elif defined(__AMX_BF16__) && defined(__AMX_TILE__)
#define DOVETAIL_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

#ifdef DOVETAIL_AMX
namespace dovetail {

// Eight tiles. 0 to 3: sums, [rows, 16] float32; 4 and 5: inputs, [rows, 32] bfloat16; 6 and 7: weights, [16, 16, 2] bfloat16.
// 0, 1 and 4 have `rows`, 2, 3 and 5 have `more_rows`: 1 to 16, or 0 for tiles that are not used.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};

  TileConfig(int first_rows, int more_rows) {
    const int each[8] = {first_rows, first_rows, more_rows, more_rows, first_rows, more_rows, 16, 16};
    for (int i = 0; i < 8; ++i)
      if (each[i]) bytes[i] = 64, rows[i] = static_cast<uint8_t>(each[i]);
  }
};

#ifdef DOVETAIL_EMULATE_AMX

inline thread_local uint8_t tiles[8][16][64];
inline thread_local int tile_rows[8];

inline bool amx_allowed() { return true; }
inline void configure(const TileConfig& c) {
  for (int i = 0; i < 8; ++i) tile_rows[i] = c.rows[i];
}
inline void release_tiles() { std::memset(tile_rows, 0, sizeof tile_rows); }
template <int T>
void tile_zero() {
  std::memset(tiles[T], 0, sizeof tiles[T]);
}
template <int T>
void tile_load(const void* p, int64_t stride) {
  for (int i = 0; i < tile_rows[T]; ++i) std::memcpy(tiles[T][i], static_cast<const char*>(p) + i * stride, 64);
}
template <int T>
void tile_store(void* p, int64_t stride) {
  for (int i = 0; i < tile_rows[T]; ++i) std::memcpy(static_cast<char*>(p) + i * stride, tiles[T][i], 64);
}
inline float tile_value(int t, int row, int i) {
  uint16_t half;
  std::memcpy(&half, tiles[t][row] + 2 * i, 2);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
template <int C, int A, int B>
void tile_dot() {
  for (int m = 0; m < tile_rows[C]; ++m)
    for (int n = 0; n < 16; ++n) {
      float even = 0, odd = 0, sum;
      for (int k = 0; k < 16; ++k) {
        even += tile_value(A, m, 2 * k) * tile_value(B, k, 2 * n);
        odd += tile_value(A, m, 2 * k + 1) * tile_value(B, k, 2 * n + 1);
      }
      std::memcpy(&sum, tiles[C][m] + 4 * n, 4);
      sum += even + odd;
      std::memcpy(tiles[C][m] + 4 * n, &sum, 4);
    }
}

#else

// Linux gives a process the tiles' state only if it asks. False: the kernel or a sandbox refuses.
inline bool amx_allowed() {
  static const bool allowed = [] {
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return allowed;
}

// Not the compiler's intrinsics: those take a tile's number as a word of the source, and some compilers' do not say that
// they read memory.
inline void configure(const TileConfig& c) { asm volatile("ldtilecfg %0" : : "m"(c) : "memory"); }
inline void release_tiles() { asm volatile("tilerelease" : : : "memory"); }
template <int T>
void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(T));
}
template <int T>
void tile_load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
void tile_store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(T) : "memory");
}
template <int C, int A, int B>
void tile_dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

#endif
}  // namespace dovetail
#endif
