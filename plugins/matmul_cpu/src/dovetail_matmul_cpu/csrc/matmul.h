// Products by quantized weights that stay packed in memory and are expanded in registers.
//
// y[t, o] = sum over chunks c of  scale[o, c] * sum over k in c of  x[t, k] * (code[o, k] - zero[o, c])
//
// A chunk is a group of inputs that share a scale, or, of a weight with one scale a row, as many as go well (kernels.py). Chunks
// are filled up to a multiple of kUnit inputs with zeros of x.
//
// Codes that are integers are multiplied as integers (VNNI: unsigned codes by signed bytes), which takes no expanding of bytes.
// Inputs are then numbers of one digit, if the format rounds them to bytes, or of two digits to the base 256: of a chunk's largest
// value 32,639 steps, where bfloat16 tells 256 apart. Both give the products of a chunk exactly.
//
// All others are multiplied in bfloat16, in which every code is exact, by table; x is bfloat16, or two of them where its type is
// finer (the value, and what rounding left of it). With many rows a chunk's codes are expanded once for all of them.
//
// The order of all sums that round is fixed, whatever the number of rows: batch invariant.
#pragma once

#include <dovetail/panels.h>

#include <cstdint>

namespace dovetail {

constexpr int kUnit = 8;  // inputs

enum class Codes : int32_t { int8, uint4, float8 };
enum class Inputs : int32_t { plain, int8, float8 };

// Filled in by kernels.py.
struct Weight {
  Codes codes;
  Inputs inputs;
  Type type;             // of x and of y
  int32_t has_groups;
  int64_t num_outputs, depth, chunk;
  uint8_t* packed;       // [panels][padded depth][kPanel], see pack.cpp
  const float* scales;   // [panels][chunks or 1][kPanel]
  const uint8_t* zeros;  // likewise, or null: then all are `zero`
  const float* bias;     // [outputs filled up] or null
  const int64_t* order;  // [depth] or null
  float input_scale;     // 0: each row has one of its own
  int32_t zero;

  int64_t num_panels() const { return (num_outputs + kPanel - 1) / kPanel; }
  int64_t width() const { return num_panels() * kPanel; }
  int64_t num_chunks() const { return (depth + chunk - 1) / chunk; }
  int64_t chunk_width() const { return (chunk + kUnit - 1) / kUnit * kUnit; }
  int64_t padded_depth() const { return num_chunks() * chunk_width(); }
  int64_t panel_bytes() const { return padded_depth() * kPanel / (codes == Codes::uint4 ? 2 : 1); }
  bool is_integer() const {
    return inputs == Inputs::int8 || (inputs == Inputs::plain && codes != Codes::float8 && type == Type::bf16);
  }
  // Of the largest value of a chunk of two digits: no sum of a chunk may leave 32 bits.
  float num_steps() const {
    const int64_t most = INT32_MAX / ((codes == Codes::uint4 ? 15 : 255) * chunk_width());
    return static_cast<float>(most < 127 * 257 ? most : 127 * 257);
  }
  int num_parts() const { return inputs == Inputs::plain && (is_integer() || type != Type::bf16) ? 2 : 1; }
};

// A row of x as the product takes it: for each part [padded depth] bytes or bfloat16; then for each chunk what a step of its inputs
// is worth, and the sum of what stands for them.
struct Rows {
  int64_t part, scales, sums, bytes;  // offsets, and the size of a row
  explicit Rows(const Weight& w) {
    part = (w.padded_depth() * (w.is_integer() ? 1 : 2) + 127) / 64 * 64;  // vectors may write past its end
    scales = part * w.num_parts();
    sums = scales + w.num_chunks() * 4;
    bytes = (sums + w.num_chunks() * 4 + 63) / 64 * 64;
  }
};

void pack(const Weight& weight, const uint8_t* codes);

void prepare_row(const Weight& weight, const void* x, void* row);

struct Call {
  const void* x;
  void* y;
  int64_t x_stride, y_stride;  // elements
  void* rows;                  // where prepared rows lie, Rows::bytes each
};

int num_pieces(const Weight& weight, int num_rows, int num_threads);
void do_piece(const Weight& weight, const Call& call, int num_rows, int piece, int num_threads);

}  // namespace dovetail
