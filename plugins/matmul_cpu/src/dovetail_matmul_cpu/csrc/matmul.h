// GEMM with quantized weights that stay packed in memory and are dequantized in registers.
//
// y[t, o] = sum over chunks c of  scale[o, c] * sum over k in c of  x[t, k] * (code[o, k] - zero[o, c])
//
// A chunk is a group of inputs that share a scale or, for a weight with one scale per row, a number of inputs that kernels.py
// chooses. Chunks are padded to a multiple of kUnit inputs with zeros of x.
//
// Integer codes are multiplied as integers (VNNI: unsigned codes by signed bytes), without dequantization. Inputs are then
// one-digit numbers if the format rounds them to bytes, and two-digit numbers in base 256 otherwise: up to 32,639 steps to the
// chunk's largest value, where bfloat16 has 256. In both cases the products of a chunk are exact.
//
// All other codes are converted to bfloat16 by table, which is exact, and multiplied in bfloat16. x is bfloat16, or two bfloat16
// numbers if its type is more precise (the rounded value and the remainder). With many rows, a chunk is converted once for all
// rows.
//
// The order of all sums that round does not depend on the number of rows: the product is batch invariant.
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
  uint8_t* packed;       // [panels][padded depth][kPanel], see rows.cpp
  const float* scales;   // [panels][chunks or 1][kPanel]
  const uint8_t* zeros;  // the same shape, or null: all zero points are `zero`
  const float* bias;     // [padded outputs] or null
  const int64_t* order;  // [depth] or null
  float input_scale;     // 0: each row has its own scale
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
  // Returns the number of steps to a chunk's largest value, for inputs of two digits. It keeps the sums of a chunk within 32 bits.
  float num_steps() const {
    const int64_t most = INT32_MAX / ((codes == Codes::uint4 ? 15 : 255) * chunk_width());
    return static_cast<float>(most < 127 * 257 ? most : 127 * 257);
  }
  int num_parts() const { return inputs == Inputs::plain && (is_integer() || type != Type::bf16) ? 2 : 1; }
};

// The layout of a prepared row of x: for each part, [padded depth] bytes or bfloat16 numbers; then, for each chunk, the step size
// of its inputs and the term for the zero points.
struct Rows {
  int64_t part, scales, sums, bytes;  // offsets in bytes, and the size of a row
  explicit Rows(const Weight& w) {
    part = (w.padded_depth() * (w.is_integer() ? 1 : 2) + 127) / 64 * 64;  // vectors may write past the end
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
  void* rows;                  // prepared rows, Rows::bytes each
};

int num_pieces(const Weight& weight, int num_rows, int num_threads);
void do_piece(const Weight& weight, const Call& call, int num_rows, int piece, int num_threads);

}  // namespace dovetail
