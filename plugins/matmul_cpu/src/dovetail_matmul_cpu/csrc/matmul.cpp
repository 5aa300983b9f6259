#pragma GCC optimize("no-tree-pre")  // with tree-pre, g++ 12 uses up the registers of the sums

#include "matmul.h"

#include <algorithm>
#include <utility>

#include "fetch.h"

namespace dovetail {
namespace {

constexpr int kBlock = 6;                 // rows, with 4 vectors of sums each: 24 of the 32 registers
constexpr int64_t kTogether = 32 << 10;  // bytes of chunks that all rows use before the next ones: they stay in L1
constexpr int kMaxUnits = 256 / kUnit;   // maximum for a chunk that is dequantized to memory: 32 KiB, which stay in L1

constexpr uint16_t bf16_of(int whole) {  // `whole` is from 0 to 255
  if (whole == 0) return 0;
  int exponent = 0;
  while (whole >> (exponent + 1)) ++exponent;
  return static_cast<uint16_t>((127 + exponent) << 7 | ((whole << 7 >> exponent) & 0x7F));
}

constexpr uint16_t bf16_of_e4m3(int code) {  // without its sign
  const int exponent = code >> 3, mantissa = code & 7;
  if (code == 127) return 0x7FC0;  // NaN
  if (exponent) return static_cast<uint16_t>((exponent - 7 + 127) << 7 | mantissa << 4);
  return mantissa ? static_cast<uint16_t>(bf16_of(mantissa) - (9 << 7)) : 0;  // mantissa * 2^-9
}

// High and low bytes of the bfloat16 value of each code.
struct Table {
  alignas(64) uint8_t high[256], low[256];
  template <class F>
  constexpr explicit Table(F&& value) : high(), low() {
    for (int code = 0; code < 256; ++code) high[code] = value(code) >> 8, low[code] = value(code) & 0xFF;
  }
};
struct Nibbles {
  alignas(64) uint16_t value[32];
  constexpr Nibbles() : value() {
    for (int i = 0; i < 32; ++i) value[i] = bf16_of(i % 16);
  }
};
constexpr Nibbles kNibbles;
constexpr Table kWhole{bf16_of}, kE4M3{[](int code) { return bf16_of_e4m3(code & 127); }};

__m512i table(const uint8_t* from) { return _mm512_load_si512(from); }

// One chunk of a panel.
struct Chunk {
  const uint8_t* codes;
  const float* scales;   // [64]
  const uint8_t* zeros;  // [64] or null
  int64_t index, units;  // units of kUnit inputs
};

Vec zero_of(const Weight& w, const Chunk& chunk, int64_t at) {
  if (!chunk.zeros) return splat(static_cast<float>(w.zero));
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(chunk.zeros + at))))};
}

// Integer products.

int32_t four(const char* p) {
  int32_t bits;
  std::memcpy(&bits, p, 4);
  return bits;
}

// Loads the codes of four inputs as 4 vectors. uint4 codes are in one half of each byte, and those of the next four inputs in the
// other half.
template <Codes C>
void load_codes(const uint8_t* codes, int half, __m512i* to) {
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) {
    if constexpr (C == Codes::uint4) {
      const __m512i both = _mm512_loadu_si512(codes + j * 64);
      to[j] = _mm512_and_si512(half ? _mm512_srli_epi16(both, 4) : both, _mm512_set1_epi8(15));
    } else {
      to[j] = _mm512_loadu_si512(codes + half * 4 * kPanel + j * 64);
    }
  }
}

// sums[M][64] += the product of the chunk and inputs of D digits.
template <Codes C, int D, int M, class F>
[[gnu::noinline]] void multiply_integers(const Weight& w, const Rows& layout, const char* rows, const Chunk& chunk, float* sums,
                                         F fetch) {
  __m512i acc[D * M][kVectors];  // of the first digits of all rows, then of their second digits
#pragma GCC unroll 8
  for (int i = 0; i < D * M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) acc[i][j] = _mm512_setzero_si512();
  const int64_t row = layout.bytes, part = layout.part;
  const char* x = rows + chunk.index * w.chunk_width();
  const uint8_t* codes = chunk.codes;
  for (int64_t u = 0; u < chunk.units; ++u, x += kUnit, codes += C == Codes::uint4 ? 4 * kPanel : 8 * kPanel) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      __m512i weight[kVectors];
      load_codes<C>(codes, half, weight);
#pragma GCC unroll 8
      for (int i = 0; i < D * M; ++i) {
        const __m512i inputs = _mm512_set1_epi32(four(x + i % M * row + i / M * part + half * 4));
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) acc[i][j] = _mm512_dpbusd_epi32(acc[i][j], weight[j], inputs);
      }
    }
    fetch.step(codes, 0);
  }
  Vec scales[kVectors];
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) scales[j] = load(chunk.scales + j * kLanes);
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
    const char* of_row = rows + i * row + chunk.index * 4;
    const Vec step = splat(*reinterpret_cast<const float*>(of_row + layout.scales));
    const Vec x_sum = splat(*reinterpret_cast<const float*>(of_row + layout.sums));
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      __m512i whole = acc[i][j];
      if constexpr (D == 2) whole = _mm512_add_epi32(_mm512_slli_epi32(whole, 8), acc[M + i][j]);
      const Vec zeros = chunk.zeros ? mul(zero_of(w, chunk, j * kLanes), x_sum) : x_sum;
      float* sum = sums + i * kPanel + j * kLanes;
      store(sum, fma(fma(Vec{_mm512_cvtepi32_ps(whole)}, step, zeros), scales[j], load(sum)));
    }
  }
}

// bfloat16 products. A decoder returns the weights of a pair of inputs as 4 vectors of pairs.

template <Codes C>
struct Decoder;

inline void interleave(__m512i low, __m512i high, __m512i* to) {
  to[0] = _mm512_unpacklo_epi8(low, high);
  to[1] = _mm512_unpackhi_epi8(low, high);
}

template <>
struct Decoder<Codes::uint4> {
  static constexpr int kBytes = 64;
  // Five bits select an entry, and the fifth belongs to the next code, so the table is stored twice.
  const __m512i values = _mm512_load_si512(kNibbles.value);
  void operator()(const uint8_t* codes, __m512i* to) const {
    const __m512i four = _mm512_loadu_si512(codes);
    to[0] = _mm512_permutexvar_epi16(four, values);
    to[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(four, 4), values);
    to[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(four, 8), values);
    to[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(four, 12), values);
  }
};

template <>
struct Decoder<Codes::float8> {
  static constexpr int kBytes = 128;
  const __m512i high0 = table(kE4M3.high), high1 = table(kE4M3.high + 64), low0 = table(kE4M3.low), low1 = table(kE4M3.low + 64);
  const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
  void operator()(const uint8_t* codes, __m512i* to) const {
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const __m512i code = _mm512_loadu_si512(codes + h * 64);
      // 0xF8 is a | (b & c): the entry of the table with the sign of the code.
      const __m512i high = _mm512_ternarylogic_epi32(_mm512_permutex2var_epi8(high0, code, high1), code, sign, 0xF8);
      interleave(_mm512_permutex2var_epi8(low0, code, low1), high, to + 2 * h);
    }
  }
};

template <>
struct Decoder<Codes::int8> {  // unsigned, with an offset of 128
  static constexpr int kBytes = 128;
  const __m512i high0 = table(kWhole.high), high1 = table(kWhole.high + 64), low0 = table(kWhole.low), low1 = table(kWhole.low + 64);
  const __m512i large = _mm512_set1_epi8(0x43), top = _mm512_set1_epi8(static_cast<char>(0x80));
  void operator()(const uint8_t* codes, __m512i* to) const {
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const __m512i code = _mm512_loadu_si512(codes + h * 64);
      const __mmask64 is_large = _mm512_movepi8_mask(code);  // codes from 128 on share an exponent and are their own mantissa
      const __m512i high = _mm512_mask_mov_epi8(_mm512_permutex2var_epi8(high0, code, high1), is_large, large);
      const __m512i low = _mm512_mask_mov_epi8(_mm512_permutex2var_epi8(low0, code, low1), is_large, _mm512_andnot_si512(top, code));
      interleave(low, high, to + 2 * h);
    }
  }
};

// Reads a dequantized chunk from memory.
struct Expanded {
  static constexpr int kBytes = kVectors * 64;
  void operator()(const uint8_t* from, __m512i* to) const {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) to[j] = _mm512_load_si512(from + j * 64);
  }
};

// Decodes a chunk for the first block of rows and stores it for the others. Arithmetic hides most of the cost.
template <Codes C>
struct Expanding {
  static constexpr int kBytes = Decoder<C>::kBytes;
  Decoder<C> decode;
  uint8_t* to;
  void operator()(const uint8_t* codes, __m512i* weight) {
    decode(codes, weight);
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) _mm512_store_si512(to + j * 64, weight[j]);
    to += Expanded::kBytes;
  }
};

// sums[M][64] += the products of S consecutive chunks. The sums of one chunk are a dependency chain, so with few rows several
// chunks are computed in parallel. They are still added in order.
template <class D, int P, int M, int S, class F>
void multiply_floats(const Weight& w, const Rows& layout, const char* rows, const Chunk& chunk, const uint8_t* codes, D decode,
                     float* sums, F fetch) {
  __m512 acc[S][M][kVectors];
  const int64_t group = w.has_groups ? kPanel : 0;
#pragma GCC unroll 8
  for (int s = 0; s < S; ++s)
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const float x_sum = -reinterpret_cast<const float*>(rows + i * layout.bytes + layout.sums)[chunk.index + s];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) acc[s][i][j] = _mm512_set1_ps(static_cast<float>(w.zero) * x_sum);
      if (chunk.zeros)
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) acc[s][i][j] = mul(zero_of(w, chunk, s * group + j * kLanes), splat(x_sum)).x;
    }
  const int64_t pairs = chunk.units * kUnit / 2, next = pairs * D::kBytes;
  const char* x = rows + chunk.index * w.chunk_width() * 2;
  for (int64_t pair = 0; pair < pairs; ++pair, x += 4, codes += D::kBytes) {
    fetch.step(codes, next);
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s) {
      __m512i weight[kVectors];
      decode(codes + s * next, weight);
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) {
          const __m512i two = _mm512_set1_epi32(four(x + i * layout.bytes + p * layout.part + s * pairs * 4));
#pragma GCC unroll 4
          for (int j = 0; j < kVectors; ++j)
            acc[s][i][j] = _mm512_dpbf16_ps(acc[s][i][j], reinterpret_cast<__m512bh>(two), reinterpret_cast<__m512bh>(weight[j]));
        }
    }
  }
#pragma GCC unroll 8
  for (int s = 0; s < S; ++s)
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        float* sum = sums + i * kPanel + j * kLanes;
        store(sum, fma(Vec{acc[s][i][j]}, load(chunk.scales + s * group + j * kLanes), load(sum)));
      }
}

// Calls f(first row, number of rows, fetch) for each block. The number is a compile-time constant. `next` is to be prefetched.
template <int B, class F>
void for_blocks(const Blocks<B>& blocks, const uint8_t* next, F&& f) {
  for (int b = 0; b < blocks.count; ++b) {
    const auto& one = blocks.blocks[b];
    with_rows(one.rows, [&](auto m) { f(one.row, m, Fetch{next + one.from, one.rate}); }, std::make_integer_sequence<int, B>{});
  }
}

template <Codes C, int P>
void add_floats(const Weight& w, const Rows& layout, const char* rows, int num_rows, Chunk chunk, int64_t end, float* sums) {
  const int64_t bytes = w.panel_bytes() / w.num_chunks(), group = w.has_groups ? kPanel : 0, steps = chunk.units * kUnit / 2;
  const auto go_on = [&](int done) {
    chunk.index += done, chunk.codes += done * bytes, chunk.scales += done * group;
    if (chunk.zeros) chunk.zeros += done * group;
  };
  // Computes S chunks at a time while at least S remain, and decodes them in registers.
  const auto direct = [&]<int B, int S>() {
    const Ahead<S, Decoder<C>::kBytes> ahead(bytes);
    for (; chunk.index + S <= end; go_on(S))
      with_rows(num_rows, [&](auto m) {
        multiply_floats<Decoder<C>, P, decltype(m)::value, S>(w, layout, rows, chunk, chunk.codes, Decoder<C>{}, sums, ahead);
      }, std::make_integer_sequence<int, B>{});
  };
  if (num_rows == 1) direct.template operator()<1, 4>();
  if (num_rows <= 3) direct.template operator()<3, 2>();
  if (num_rows <= kBlock) return direct.template operator()<kBlock, 1>();
  alignas(64) uint8_t buffer[kMaxUnits * kUnit * kPanel * 2];
  const bool expand = chunk.units <= kMaxUnits;
  const Blocks<kBlock> blocks(num_rows, bytes, steps);
  for (; chunk.index < end; go_on(1))
    for_blocks(blocks, chunk.codes + bytes, [&](int row, auto m, Fetch fetch) {
      constexpr int M = decltype(m)::value;
      const char* from = rows + row * layout.bytes;
      float* to = sums + row * kPanel;
      if (!expand)
        multiply_floats<Decoder<C>, P, M, 1>(w, layout, from, chunk, chunk.codes, Decoder<C>{}, to, fetch);
      else if (row == 0)
        multiply_floats<Expanding<C>, P, M, 1>(w, layout, from, chunk, chunk.codes, Expanding<C>{{}, buffer}, to, fetch);
      else
        multiply_floats<Expanded, P, M, 1>(w, layout, from, chunk, buffer, Expanded{}, to, fetch);
    });
}

template <Codes C, int D>
void add_integers(const Weight& w, const Rows& layout, const char* rows, int num_rows, Chunk chunk, int64_t end, float* sums) {
  constexpr int kRows = kBlock / D;
  const int64_t bytes = w.panel_bytes() / w.num_chunks(), group = w.has_groups ? kPanel : 0;
  // Computes `count` chunks in order, and prefetches meanwhile.
  const auto multiply = [&](int row, auto m, int64_t count, auto fetch_of) {
    Chunk one = chunk;
    for (int64_t i = 0; i < count; ++i, ++one.index, one.codes += bytes, one.scales += group, one.zeros += one.zeros ? group : 0)
      multiply_integers<C, D, decltype(m)::value>(w, layout, rows + row * layout.bytes, one, sums + row * kPanel, fetch_of(i));
  };
  if (num_rows <= kRows) {
    const Ahead<1, kUnit * kPanel / (C == Codes::uint4 ? 2 : 1)> ahead(bytes);
    const auto all = [&](auto m) { multiply(0, m, end, [&](int64_t) { return ahead; }); };
    with_rows(num_rows, all, std::make_integer_sequence<int, kRows>{});
    return;
  }
  const Blocks<kRows> blocks(num_rows, bytes, chunk.units);
  for (const int64_t most = std::max<int64_t>(1, kTogether / bytes); chunk.index < end;) {
    const int64_t count = std::min(most, end - chunk.index);
    for_blocks(blocks, chunk.codes + count * bytes, [&](int row, auto m, Fetch fetch) {
      multiply(row, m, count, [&](int64_t i) { return Fetch{fetch.next + i * bytes, fetch.rate}; });
    });
    chunk.index += count, chunk.codes += count * bytes, chunk.scales += count * group;
    if (chunk.zeros) chunk.zeros += count * group;
  }
}

// Computes the sums [rows, 64] of one panel.
template <Codes C>
void panel_sums(const Weight& w, const char* rows, int num_rows, int64_t panel, float* sums) {
  const Rows layout(w);
  const int64_t end = w.num_chunks(), place = panel * kPanel * (w.has_groups ? end : 1);
  const Chunk first{w.packed + panel * w.panel_bytes(), w.scales + place, w.zeros ? w.zeros + place : nullptr, 0, w.chunk_width() / kUnit};
  const bool two = w.num_parts() == 2;
  std::fill(sums, sums + num_rows * kPanel, 0.f);
  if constexpr (C != Codes::float8)
    if (w.is_integer())
      return two ? add_integers<C, 2>(w, layout, rows, num_rows, first, end, sums)
                 : add_integers<C, 1>(w, layout, rows, num_rows, first, end, sums);
  two ? add_floats<C, 2>(w, layout, rows, num_rows, first, end, sums) : add_floats<C, 1>(w, layout, rows, num_rows, first, end, sums);
}

void compute(const Weight& w, const Call& call, int row, int rows, int64_t panel) {
  alignas(64) float sums[kMaxChunk * kPanel];
  const Rows layout(w);
  const char* prepared = static_cast<const char*>(call.rows) + row * layout.bytes;
  switch (w.codes) {
    case Codes::int8: panel_sums<Codes::int8>(w, prepared, rows, panel, sums); break;
    case Codes::uint4: panel_sums<Codes::uint4>(w, prepared, rows, panel, sums); break;
    case Codes::float8: panel_sums<Codes::float8>(w, prepared, rows, panel, sums); break;
  }
  const int64_t first = panel * kPanel, count = std::min<int64_t>(kPanel, w.num_outputs - first);
  const float* bias = w.bias ? w.bias + first : nullptr;
  for (int r = 0; r < rows; ++r) {
    float* s = sums + r * kPanel;
    if (w.inputs == Inputs::float8) {
      const Vec scale = splat(*reinterpret_cast<const float*>(prepared + r * layout.bytes + layout.scales));
      for (int j = 0; j < kPanel; j += kLanes) store(s + j, mul(load(s + j), scale));
    }
    store_panel(w.type, call.y, (row + r) * call.y_stride + first, s, bias, count);
  }
}

}  // namespace

int num_pieces(const Weight& w, int num_rows, int num_threads) { return panel_pieces(w.num_panels(), num_rows, num_threads); }

void do_piece(const Weight& w, const Call& call, int num_rows, int piece, int num_threads) {
  const Hand hand(w.num_panels(), num_rows, num_threads);
  const int chunk = chunk_rows(num_rows), pieces = hand.pieces(), part = piece % pieces;
  const int row = piece / pieces * chunk, rows = std::min(chunk, num_rows - row);
  for (int64_t panel = hand.begin(part), end = hand.end(part); panel < end; ++panel) compute(w, call, row, rows, panel);
}

}  // namespace dovetail
