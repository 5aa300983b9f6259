// Linear layers with weights packed once, at load.
//
// Weights [N, K] lie in panels of 64 outputs: [N / 64][K / pair][64][pair], so that one vector load gives 16 outputs and a
// panel is one stretch of memory. N and K are filled up with zeros. Every output is one sum over K in ascending order,
// whatever the number of rows: that makes the layer batch invariant.
#pragma once

#include <dovetail/panels.h>

#include <cstdint>

#include "amx.h"

namespace dovetail {

constexpr int kUnitK = 32;  // K is filled up to a multiple of it: an AMX tile's depth

struct Linear {
  Type type;                  // float32 or bfloat16: of weights and inputs
  int64_t num_outputs, depth;
  void* weight;
  const float* bias;          // [N filled up to 64] or null

  int64_t num_panels() const { return (num_outputs + kPanel - 1) / kPanel; }
  int64_t padded_depth() const { return (depth + kUnitK - 1) / kUnitK * kUnitK; }
  int64_t panel_elements() const { return padded_depth() * kPanel; }
};

// Rows of x, zero from `depth` to the padded depth; strides in elements.
struct LinearCall {
  const void* x;
  void* y;
  int64_t x_stride, y_stride;
  Type y_type;  // x has the weights'
};

int64_t weight_bytes(const Linear& linear);

// Outputs [first, first + count) from rows [count, K] of the linear's own type.
void pack(const Linear& linear, const void* rows, int64_t stride, int64_t first, int64_t count);

// Rows of the weight, as an embedding reads them.
void unpack_row(const Linear& linear, int64_t row, void* out);

int num_pieces(const Linear& linear, int num_rows, int num_threads);
void do_piece(const Linear& linear, const LinearCall& call, int num_rows, int piece, int num_threads);

}  // namespace dovetail
